"""Feature maps of timm's models, as the stem of a Transformer (hybrid ViT; DETR).

pixels (B, C, H, W) -> feature maps (B, F, H / s, W / s), s the stride of a stage
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from transformers import initialization as init
from transformers.utils import is_timm_available

from .linear import is_plain

NORMS = ("batch", "frozen", "group")
MOST_GROUPS, LEAST_OF_GROUP = 32, 16  # of group norm, and of its groups' channels


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine parameters are fixed (Carion et al. 2020, appendix A.4).

    Where it follows a convolution directly, `fold` moves its scale into the convolution's weights: the feature map is
    then read and written once less, in the forward and in the backward pass.

    Args:
        channels: F.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.folded = eps, False
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def reset_parameters(self) -> None:
        """Make it the identity."""
        init.ones_(self.weight)
        init.zeros_(self.bias)
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What it multiplies by and adds: (F,) each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, F, h, w)."""
        if self.folded:
            return features
        scale, shift = self.scale_and_shift()
        return features * scale[:, None, None] + shift[:, None, None]


class FrozenBatchNormAct(FrozenBatchNorm):
    """The same with what timm's `BatchNormAct2d` does after it: dropout and an activation."""

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module):
        super().__init__(channels, eps)
        self.drop, self.act = drop, act

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, F, h, w)."""
        return self.act(self.drop(super().forward(features)))


class FoldedConv2d(nn.Conv2d):
    """A convolution that also applies the frozen norm behind it, while ``norm.folded``; its own weights stay as they
    are."""

    norm: FrozenBatchNorm | None = None  # of a layer that an adapter makes of this class

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, F, h', w')."""
        if self.norm is None or not self.norm.folded:
            return super().forward(features)
        scale, shift = self.norm.scale_and_shift()
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(features, self.weight * scale[:, None, None, None], shift)


class Fold:
    """A convolution that applies the norm behind it, as long as both stand where they stood and are called plainly.

    An adapter around the convolution, for instance, adds to its output what the norm has to scale too.

    Args:
        body: the model with both.
        convolution, norm: their names there.
    """

    def __init__(self, body: nn.Module, convolution: str, norm: str):
        self.slots = [(body.get_submodule(parent), name) for parent, name in map(split_name, (convolution, norm))]
        self.convolution, self.norm = body.get_submodule(convolution), body.get_submodule(norm)
        self.convolution.__class__ = FoldedConv2d
        # Not through nn.Module, which would take the norm for a part of the convolution and list its buffers twice.
        object.__setattr__(self.convolution, "norm", self.norm)
        self.norm.folded = True

    def check(self) -> None:
        """Undo the fold if either was replaced, hooked or offloaded since, and redo it when that has ended."""
        (outer, first), (inner, second) = self.slots
        folded = (
            outer._modules.get(first) is self.convolution
            and inner._modules.get(second) is self.norm
            and is_plain(self.convolution, FoldedConv2d)
            and is_plain(self.norm, type(self.norm))
        )
        if self.norm.folded != folded:
            self.norm.folded = folded


def split_name(name: str) -> tuple[str, str]:
    """Name of a module's parent, and its own name there."""
    parent, _, own = name.rpartition(".")
    return parent, own


class _FoldTracer(fx.Tracer):
    """Sees convolutions and frozen norms as wholes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | FrozenBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def fold_norms(body: nn.Module) -> list[Fold]:
    """Fold every frozen norm that reads a plain convolution which nothing else reads; none if ``body`` hides that.

    Both must run once in a forward pass: what runs twice has two readers, or two sources.
    """
    try:
        graph = _FoldTracer().trace(body)
    except Exception:  # whatever a model's own code raises when it is run on symbols
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    runs, folds = Counter(body.get_submodule(node.target) for node in calls), []
    for node in calls:
        source = node.args[0]
        norm = body.get_submodule(node.target)
        if isinstance(norm, FrozenBatchNorm) and source.op == "call_module" and len(source.users) == 1:
            convolution = body.get_submodule(source.target)
            if type(convolution) is nn.Conv2d and runs[convolution] == runs[norm] == 1:
                folds.append(Fold(body, source.target, node.target))
    return folds


def convert_norms(module: nn.Module, kind: str, momentum: float) -> None:
    """Make every batch norm below ``module`` what a model wants.

    Args:
        kind: "frozen", see `FrozenBatchNorm`, or "group", group norm (Wu and He 2018, arXiv:1803.08494), which
            also works for small batches; "batch" leaves them.
        momentum: of batch norm's running statistics.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and kind == "batch":
            child.momentum = momentum
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, frozen(child) if kind == "frozen" else grouped(child))
        else:
            convert_norms(child, kind, momentum)


def frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm:
    """A batch norm, or timm's one with an activation, with its statistics fixed."""
    if hasattr(norm, "act"):
        return FrozenBatchNormAct(norm.num_features, norm.eps, norm.drop, norm.act)
    return FrozenBatchNorm(norm.num_features, norm.eps)


def grouped(norm: nn.BatchNorm2d) -> nn.Module:
    """Group norm in the place of a batch norm, with its activation if it has one.

    At most 32 groups of at least 16 channels, two settings of Wu and He 2018, table 3: with less, a narrow layer's
    groups are its channels, which then lose how strong they are (and torch's kernel is many times as slow).
    """
    most = max(1, min(MOST_GROUPS, norm.num_features // LEAST_OF_GROUP))
    groups = next(n for n in range(most, 0, -1) if norm.num_features % n == 0)
    new = nn.GroupNorm(groups, norm.num_features)
    return nn.Sequential(new, norm.drop, norm.act) if hasattr(norm, "act") else new


class TimmFeatures(nn.Module):
    """Feature maps of a timm model with random weights; a checkpoint brings its own.

    Args:
        name: of the timm model.
        num_channels: of the images.
        out_indices: which of its feature maps, as timm counts them.
        norm: what `convert_norms` makes of its batch norms.
        frozen_stages: the stem and this many stages do not learn; no gradient flows into them. 0 freezes nothing.
            A stage halves the size of the feature map; the first of a ResNet is at a quarter of the image's.
        output_stride: of the last feature map, reached by dilation where the model would go below; default, its own.
        momentum: of batch norm's running statistics.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no model of this name, there is no such norm, or the model cannot be frozen in stages.
    """

    def __init__(
        self,
        name: str,
        num_channels: int = 3,
        out_indices: Sequence[int] = (-1,),
        norm: str = "batch",
        frozen_stages: int = 0,
        output_stride: int | None = None,
        momentum: float = 0.1,
    ):
        super().__init__()
        if not is_timm_available():
            raise ImportError(f'backbone="{name}" needs timm: pip install timm')
        if is_timm_available():  # here and in this form, since the import is slow and the file travels
            import timm
        if norm not in NORMS:
            raise ValueError(f'norm must be one of {", ".join(NORMS)}, got "{norm}"')
        if not timm.is_model(name):
            raise ValueError(f'backbone must be the name of a timm model (see timm.list_models()), got "{name}"')
        options = {} if output_stride is None else {"output_stride": output_stride}
        self.name, self.options = name, {"in_chans": num_channels, "out_indices": tuple(out_indices), **options}
        self.body = timm.create_model(name, features_only=True, pretrained=False, **self.options)
        convert_norms(self.body, norm, momentum)
        self.folds = fold_norms(self.body) if norm == "frozen" else []
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # Swin, MambaOut and others
        for module in self.body.modules():
            module.of_timm = True  # for `reset`: transformers hands over modules one by one, without their names
        self.channels = self.body.feature_info.channels()
        self.stride = self.body.feature_info.reduction()[-1]
        self.frozen_stages = frozen_stages
        self.freeze()

    def freeze(self) -> None:
        """Take the gradient off the frozen stages."""
        stages, info = self.frozen_stages, self.body.feature_info.info
        if not stages:
            return
        strides = sorted({entry["reduction"] for entry in info if entry["reduction"] >= 4})
        if stages > len(strides):
            raise ValueError(f"backbone_frozen_stages must be at most {len(strides)} for {self.name}, got {stages}")
        last = next(e["module"] for e in reversed(info) if e["reduction"] <= strides[stages - 1])
        named = list(self.body.named_parameters())
        inside = [
            i for i, (name, _) in enumerate(named) if name.startswith((f"{last}.", last.replace(".", "_") + "."))
        ]
        if not inside:
            raise ValueError(f"backbone {self.name} has no stages that could be frozen: use backbone_frozen_stages=0")
        for _, parameter in named[: inside[-1] + 1]:
            parameter.requires_grad_(False)
        self.train(self.training)  # their batch norms take notice

    def train(self, mode: bool = True) -> "TimmFeatures":
        """As in torch; but a batch norm that does not learn keeps its statistics too."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def load_pretrained(self) -> None:
        """Take the weights that timm has for this model, from the Hub where they are not in its cache."""
        import timm

        weights = timm.create_model(self.name, features_only=True, pretrained=True, **self.options).state_dict()
        kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
        self.body.load_state_dict(kept)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> maps (B, F, ceil(H / s), ceil(W / s)), one for each of ``out_indices``."""
        for fold in self.folds:
            fold.check()
        maps = self.body(pixel_values)
        return [states.permute(0, 3, 1, 2) for states in maps] if self.channels_last else maps

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the last feature map of an image."""
        return -(-height // self.stride), -(-width // self.stride)


def reset(module: nn.Module) -> bool:
    """Draw new weights by torch's own rule if the module is part of a timm model; whether it is."""
    of_timm = getattr(module, "of_timm", False)
    if of_timm and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    return of_timm
