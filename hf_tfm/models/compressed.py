"""Compressed layers: low-rank factors (Lan et al. 2020, arXiv:1909.11942, section 3.1) and int8 weights.

    fields ``low_rank`` and ``int8`` of the configuration -> layers replaced when the model is built -> weights loaded

A compressed model is thus saved and loaded like any other model of its class.

Shapes: N inputs; M outputs; R rank; V rows of an embedding; D features.
"""

import warnings
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INT8 = ("linear", "all")  # linear layers; embeddings, too
LEVELS = 127.5  # half the range of int8, as in torch.ao's observers of weights
SMALLEST_SCALE = torch.finfo(torch.float32).eps


class LowRankLinear(nn.Module):
    """A linear layer whose weight (M, N) is the product of two matrices (M, R) and (R, N)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        return self.up(self.down(x))


class LowRankEmbedding(nn.Module):
    """An embedding whose table (V, D) is the product of a table (V, R) and a matrix (R, D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx)
        self.up = nn.Linear(rank, embedding_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) -> (..., D)."""
        return self.up(self.table(ids))


@torch.no_grad()
def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of a matrix (M, N) symmetrically: int8 (M, N) and the scales (M,) of the rows."""
    weight = weight.detach().float().cpu()
    scale = (weight.abs().amax(1) / LEVELS).clamp_min(SMALLEST_SCALE)
    return (weight * (1.0 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


@cache
def has_kernel() -> bool:
    """Return whether this torch has a kernel of dynamic quantisation for the CPU; its API is deprecated."""
    names = ("linear_dynamic", "linear_prepack")
    exists = all(hasattr(torch.ops.quantized, name) for name in names)
    return (
        exists and hasattr(torch, "_make_per_channel_quantized_tensor") and torch.backends.quantized.engine != "none"
    )


class Int8Rows(nn.Module):
    """Base class of layers with an int8 matrix (M, N) and a scale of each row; they cannot be trained."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(rows), requires_grad=False)

    def set_weight(self, weight: Tensor) -> None:
        """Quantise a floating-point matrix (M, N); a meta tensor leaves the layer as it is."""
        if not weight.is_meta:
            quantized, scale = quantized_rows(weight)
            self.weight.data, self.scale.data = quantized.to(weight.device), scale.to(weight.device)


class Int8Linear(Int8Rows):
    """A linear layer with int8 weights.

    On a CPU, inputs are quantised too, with one scale per call (dynamic quantisation), as by torch.ao's
    `quantize_dynamic`; elsewhere the weights are dequantised.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.packed = None  # weights in the layout of the CPU's kernel, made by the first call

    @classmethod
    def of(cls, layer: nn.Linear) -> "Int8Linear":
        """Quantise a linear layer."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None).to(layer.weight.device)
        made.set_weight(layer.weight)
        if layer.bias is not None:
            made.bias.data = layer.bias.detach()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if x.device.type == "cpu" and not traced and has_kernel():
            return torch.ops.quantized.linear_dynamic(x.float(), self.packed_weight(), reduce_range=True).to(x.dtype)
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def packed_weight(self) -> torch.ScriptObject:
        """Return weights and biases as the kernel reads them."""
        if self.packed is None:
            zero = torch.zeros(self.out_features, dtype=torch.long)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated; `has_kernel` notices when it is gone
                weight = torch._make_per_channel_quantized_tensor(self.weight.data, self.scale.data.double(), zero, 0)
            bias = None if self.bias is None else self.bias.data.float()
            self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        return self.packed

    def _apply(self, *args, **kwargs):
        self.packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "packed": None}  # the kernel's object cannot be copied

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(Int8Rows):
    """An embedding with an int8 table (V, D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def of(cls, layer: nn.Embedding) -> "Int8Embedding":
        """Quantise an embedding."""
        made = cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx).to(layer.weight.device)
        made.set_weight(layer.weight)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) -> (..., D)."""
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids].unsqueeze(-1)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def factorize(model: nn.Module, ranks: dict[str, int]) -> None:
    """Replace linear layers and embeddings by low-rank ones with new weights.

    Args:
        ranks: {name of the module: rank}.

    Raises:
        ValueError: a module does not exist or has another type.
    """
    for name, rank in ranks.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f'low_rank: {type(model).__name__} has no module "{name}"') from error
        if type(old) is nn.Linear:
            new: nn.Module = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None)
        elif type(old) is nn.Embedding:
            new = LowRankEmbedding(old.num_embeddings, old.embedding_dim, rank, old.padding_idx)
        else:
            raise ValueError(f'low_rank: "{name}" is a {type(old).__name__}, not a linear layer or an embedding')
        replace(model, name, new)


def quantize(model: nn.Module, what: str) -> int:
    """Quantise all layers of a model in place, and return their number.

    Args:
        what: one of `INT8`.
    """
    kinds = {nn.Linear: Int8Linear, **({nn.Embedding: Int8Embedding} if what == "all" else {})}
    found = {name: module for name, module in model.named_modules() if type(module) in kinds}
    for name, module in found.items():
        replace(model, name, kinds[type(module)].of(module))
    return len(found)


def build_compressed(model: nn.Module, is_base: bool) -> None:
    """Replace the layers of a new model that its configuration describes as compressed.

    Args:
        is_base: it is a base model, which ``low_rank`` refers to, not a model with a head around one.
    """
    if is_base and model.config.low_rank:
        factorize(model, model.config.low_rank)
    if model.config.int8 is not None:
        quantize(model, model.config.int8)


def check_compressed(config) -> None:
    """Validate the fields of a configuration that describe a compressed model.

    Raises:
        ValueError: a field is out of range, or they do not fit each other.
    """
    for name, most in (("layer_num_attention_heads", "num_attention_heads"), ("layer_intermediate_sizes", None)):
        values = getattr(config, name)
        if values is None:
            continue
        if len(values) != config.num_hidden_layers:
            raise ValueError(f"{name} must have num_hidden_layers = {config.num_hidden_layers} values, got {values}")
        for value in values:
            if value < 1 or (most is not None and value > getattr(config, most)):
                limit = "at least 1" if most is None else f"in [1, {most} = {getattr(config, most)}]"
                raise ValueError(f"{name} must be {limit}, got {value}")
    if config.layer_num_attention_heads is not None:
        kind = config.position_embedding_type
        if kind in ("alibi", "floater"):
            raise ValueError(f'layer_num_attention_heads cannot be combined with position_embedding_type="{kind}"')
        if config.encoder_attention != "full":
            raise ValueError(
                f'layer_num_attention_heads needs encoder_attention="full", got "{config.encoder_attention}"'
            )
    for name, rank in (config.low_rank or {}).items():
        if rank < 1:
            raise ValueError(f"low_rank must be at least 1, got {rank} for {name}")
    if config.int8 is not None and config.int8 not in INT8:
        raise ValueError(f'int8 must be one of {", ".join(INT8)}, got "{config.int8}"')
