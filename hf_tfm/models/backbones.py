"""Feature maps of timm models, used as the stem of a Transformer (hybrid ViT; DETR).

pixels (B, C, H, W) -> feature maps (B, F, H / s, W / s), where s is the stride of a stage
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import initialization as init
from transformers.utils import is_timm_available

from .linear import is_plain

NORMS = ("batch", "frozen", "group")
MOST_GROUPS, LEAST_OF_GROUP = 32, 16  # group norm: maximum number of groups, minimum number of channels per group


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and affine parameters (Carion et al. 2020, appendix A.4).

    If it directly follows a convolution, `Fold` folds its scale and shift into the convolution, which saves one read
    and write of the feature map in both the forward and the backward pass.

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
        """Reset to the identity."""
        init.ones_(self.weight)
        init.zeros_(self.bias)
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the factor and the offset that the norm applies: (F,) each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, F, h, w)."""
        if self.folded:
            return features
        scale, shift = self.scale_and_shift()
        return features * scale[:, None, None] + shift[:, None, None]


class FrozenBatchNormAct(FrozenBatchNorm):
    """`FrozenBatchNorm` followed by the dropout and activation of timm's `BatchNormAct2d`."""

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module):
        super().__init__(channels, eps)
        self.drop, self.act = drop, act

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, F, h, w)."""
        return self.act(self.drop(super().forward(features)))


class GroupedConv2d(nn.Conv2d):
    """Convolution that runs in float32 under CPU autocast if it has groups; see `convert_grouped`."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, F, h', w'), in autocast's dtype."""
        if self.groups == 1 or features.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.convolve(features)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return self.convolve(features.float()).to(dtype)

    def convolve(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, F, h', w')."""
        return super().forward(features)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle; the classes made by `grouped_kind` have no name to import them by."""
        if type(self) in (GroupedConv2d, FoldedConv2d):
            return super().__reduce_ex__(protocol)
        return new_grouped, (type(self).__mro__[2],), self.__dict__


@lru_cache
def grouped_kind(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Return `GroupedConv2d` with the forward pass of ``kind``."""
    return GroupedConv2d if kind is nn.Conv2d else type(f"Grouped{kind.__name__}", (GroupedConv2d, kind), {})


def new_grouped(kind: type[nn.Conv2d]) -> nn.Conv2d:
    """Create a layer of `grouped_kind` without attributes."""
    new = grouped_kind(kind)
    return new.__new__(new)


def convert_grouped(module: nn.Module) -> bool:
    """Convert every convolution with groups below ``module`` to `GroupedConv2d` in place; weights stay unchanged.

    The backward pass of a grouped convolution on a CPU is slower in bfloat16 than in float32, also with bfloat16
    instructions (torch 2.14), so that models with depthwise convolutions trained more slowly with autocast than
    without it.

    Returns:
        True if there is such a convolution.
    """
    found = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    for layer in found:
        if not isinstance(layer, GroupedConv2d):
            layer.__class__ = grouped_kind(type(layer))
    return bool(found)


class FoldedConv2d(GroupedConv2d):
    """Convolution that also applies the following frozen norm while ``norm.folded``; its weights stay unchanged."""

    norm: FrozenBatchNorm | None = None  # None in a layer that an adapter creates from this class

    def convolve(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, F, h', w')."""
        if self.norm is None or not self.norm.folded:
            return super().convolve(features)
        scale, shift = self.norm.scale_and_shift()
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(features, self.weight * scale[:, None, None, None], shift)


class Fold:
    """Fold a frozen norm into the preceding convolution, as long as neither is replaced or wrapped.

    For example, an adapter around the convolution adds to its output; the norm then has to scale the sum.

    Args:
        body: model that contains both.
        convolution, norm: their module names in ``body``.
    """

    def __init__(self, body: nn.Module, convolution: str, norm: str):
        self.slots = [(body.get_submodule(parent), name) for parent, name in map(split_name, (convolution, norm))]
        self.convolution, self.norm = body.get_submodule(convolution), body.get_submodule(norm)
        self.convolution.__class__ = FoldedConv2d
        # Bypass nn.Module, which would register the norm as a submodule and list its buffers twice.
        object.__setattr__(self.convolution, "norm", self.norm)
        self.norm.folded = True

    def check(self) -> None:
        """Disable the fold if either module has been replaced, hooked or offloaded, and restore it afterwards."""
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
    """Split a module name into the name of its parent and its name there."""
    parent, _, own = name.rpartition(".")
    return parent, own


class _FoldTracer(fx.Tracer):
    """Tracer that treats convolutions and frozen norms as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | FrozenBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def fold_norms(body: nn.Module) -> list[Fold]:
    """Fold every frozen norm that is the only consumer of a plain convolution; none if ``body`` cannot be traced.

    Both must run exactly once per forward pass, since a module that runs twice has two consumers or two inputs.
    """
    try:
        graph = _FoldTracer().trace(body)
    except Exception:  # a model's own code may raise anything when it is traced
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
    """Convert every batch norm below ``module`` in place.

    Args:
        kind: "frozen", see `FrozenBatchNorm`; "group", group norm (Wu and He 2018, arXiv:1803.08494), which also works
            for small batches; or "batch", which keeps batch norm.
        momentum: momentum of the running statistics with "batch".
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and kind == "batch":
            child.momentum = momentum
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, frozen(child) if kind == "frozen" else grouped(child))
        else:
            convert_norms(child, kind, momentum)


def frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm:
    """Convert a batch norm, or timm's batch norm with activation, to a frozen one."""
    if hasattr(norm, "act"):
        return FrozenBatchNormAct(norm.num_features, norm.eps, norm.drop, norm.act)
    return FrozenBatchNorm(norm.num_features, norm.eps)


def grouped(norm: nn.BatchNorm2d) -> nn.Module:
    """Convert a batch norm to group norm, keeping its activation if it has one.

    At most 32 groups of at least 16 channels, two settings of Wu and He 2018, table 3. With fewer channels, the groups
    of a narrow layer are single channels, whose magnitude is then lost (and torch's kernel is many times slower).
    """
    most = max(1, min(MOST_GROUPS, norm.num_features // LEAST_OF_GROUP))
    groups = next(n for n in range(most, 0, -1) if norm.num_features % n == 0)
    new = nn.GroupNorm(groups, norm.num_features)
    return nn.Sequential(new, norm.drop, norm.act) if hasattr(norm, "act") else new


class Backbone(nn.Module):
    """Feature maps of an image model: (B, C, H, W) -> one map (B, F, ceil(H / s), ceil(W / s)) per stride s.

    Attributes:
        body: the image model.
        channels: number of channels F of each map, the largest map first.
        strides: stride s of each map in pixels.
        frozen_stages: number of frozen stages, in addition to the stem; 0 freezes nothing.
        depthwise: whether it has convolutions with groups.
    """

    body: nn.Module
    channels: list[int]
    strides: list[int]
    frozen_stages: int
    depthwise: bool = False

    def arrange(self, pixel_values: Tensor) -> Tensor:
        """Return (B, C, H, W) in the memory format with which the model trains fastest: channels last for depthwise
        convolutions on a CPU."""
        if not (self.training and self.depthwise and pixel_values.device.type == "cpu"):
            return pixel_values
        return pixel_values.contiguous(memory_format=torch.channels_last)

    @property
    def stride(self) -> int:
        """Stride of the last feature map."""
        return self.strides[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the last feature map for an image size."""
        return -(-height // self.stride), -(-width // self.stride)

    def freeze(self) -> None:
        """Disable gradients of the frozen stages."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Backbone":
        """Set training mode as in torch, but keep the statistics of batch norms whose weights are frozen."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self


class TimmFeatures(Backbone):
    """Feature maps of a timm model with random weights; pretrained weights come from a checkpoint.

    Args:
        name: name of the timm model.
        num_channels: number of image channels.
        out_indices: indices of the feature maps, as numbered by timm.
        norm: conversion of its batch norms, see `convert_norms`.
        frozen_stages: number of frozen stages, in addition to the stem; no gradient flows into them. 0 freezes
            nothing. Each stage halves the feature map; the first stage of a ResNet has a quarter of the image's size.
        output_stride: maximum stride of the last feature map, enforced by dilation; default: that of the model.
        momentum: momentum of batch norm's running statistics.
        arguments: further arguments of the timm model.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, its stride cannot be changed, ``norm`` is unknown, or the model cannot be
            frozen in stages.
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
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        if not is_timm_available():
            raise ImportError(f'backbone="{name}" needs timm: pip install timm')
        if is_timm_available():  # local import: slow; this condition is required by transformers' import check
            import timm
        if norm not in NORMS:
            raise ValueError(f'norm must be one of {", ".join(NORMS)}, got "{norm}"')
        if not timm.is_model(name):
            raise ValueError(f'backbone must be the name of a timm model (see timm.list_models()), got "{name}"')
        options = {**(arguments or {}), **({} if output_stride is None else {"output_stride": output_stride})}
        self.name, self.options = name, {"in_chans": num_channels, "out_indices": tuple(out_indices), **options}
        try:
            self.body = timm.create_model(name, features_only=True, pretrained=False, **self.options)
        except (TypeError, AssertionError) as error:  # timm asserts that the stride is the only one
            if output_stride is not None and (isinstance(error, AssertionError) or "output_stride" in str(error)):
                raise ValueError(
                    f'backbone "{name}" has a fixed stride, so dilation must be false and backbone_output_stride '
                    f"null, got a stride of {output_stride}"
                ) from error
            raise
        convert_norms(self.body, norm, momentum)
        self.folds = fold_norms(self.body) if norm == "frozen" else []
        self.depthwise = convert_grouped(self.body)
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # Swin, MambaOut and others
        for module in self.body.modules():
            module.of_timm = True  # read by `reset`: transformers initialises modules one by one, without their names
        self.channels = self.body.feature_info.channels()
        self.strides = self.body.feature_info.reduction()
        self.frozen_stages = frozen_stages
        self.freeze()

    def freeze(self) -> None:
        """Disable gradients of the frozen stages."""
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
        self.train(self.training)  # puts the frozen batch norms in eval mode

    def load_pretrained(self, source: str | None = None) -> None:
        """Load pretrained weights.

        Args:
            source: name of a timm model with a prefix, "local-dir:FOLDER" or "hf-hub:ID"; default, timm's weights of
                this model, downloaded from the Hub if they are not cached.
        """
        import timm

        found = timm.create_model(source or self.name, features_only=True, pretrained=True, **self.options)
        weights = found.state_dict()
        kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
        self.body.load_state_dict(kept)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> list[Tensor]:
        """Compute one feature map (B, F, ceil(H / s), ceil(W / s)) per entry of ``out_indices`` from (B, C, H, W).

        Args:
            pixel_mask: (B, H, W), as other backbones take it; convolutions read padding like the border of an image.
        """
        for fold in self.folds:
            fold.check()
        maps = self.body(self.arrange(pixel_values))
        return [states.permute(0, 3, 1, 2) for states in maps] if self.channels_last else maps


def reset(module: nn.Module) -> bool:
    """Reset a module of a timm model by its own ``reset_parameters``; return whether it belongs to a timm model."""
    of_timm = getattr(module, "of_timm", False)
    if of_timm and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    return of_timm
