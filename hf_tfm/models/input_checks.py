"""Input checks of the models' forward methods. Errors are one line with the argument, the value and the limit.

Values are read only where that needs no copy from a device: on a CPU, outside of compiled, exported or traced graphs.
Elsewhere a value out of range triggers an assertion on the device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from .cross_entropy import IGNORE_INDEX

BACKENDS = ("eager", "sdpa", "flex_attention")  # besides flash attention
# Some callers pass these to every encoder-decoder. As in transformers, DETR ignores them: its decoder input is the
# object queries.
OF_DECODERS = frozenset({"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"})
# Keyword arguments that transformers, Trainer and the attention backends may pass on.
HANDED_ON = {
    *TransformersKwargs.__annotations__,
    *("return_dict", "return_loss", "output_cross_attentions", "use_cache", "cache_position", "dropout", "scaling"),
    *("sliding_window", "softcap", "deterministic", "target_dtype"),
}
ROUNDING = 1e-4  # tolerance of range checks of floating-point values


def readable(values: Tensor) -> bool:
    """Return whether values can be read without a device-to-host copy, outside of a traced graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # The data of a subclass may be elsewhere or absent (distributed and fake tensors).
    plain = type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu"
    return plain and not torch._C._functorch.is_batchedtensor(values)


def require_tensor(name: str, values: object, shape: tuple[int, ...] | None = None) -> None:
    """Raise if a value is not a tensor, or has a wrong shape.

    Raises:
        TypeError: the value is not a tensor.
        ValueError: the shape is wrong.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if shape is not None and tuple(values.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")


def require_range(name: str, values: Tensor, limit: int, meaning: str, ignore: bool = False) -> None:
    """Raise if integers are outside [0, ``limit``).

    Args:
        meaning: name of the limit, such as "vocab_size".
        ignore: allow `IGNORE_INDEX`.

    Raises:
        ValueError: with the first value out of range.
    """
    if not readable(values) or not values.numel():
        return
    least, most = torch.aminmax(values)
    if least >= 0 and most < limit:
        return
    wrong = (values < 0) | (values >= limit)
    if ignore:
        wrong &= values != IGNORE_INDEX
    if wrong.any():
        also = f", or {IGNORE_INDEX} for none" if ignore else ""
        raise ValueError(f"{name} must be in [0, {limit}), the {meaning}{also}; got {values[wrong][0].item()}")


def require_numbers(name: str, values: Tensor, least: float = -torch.inf, most: float = torch.inf) -> None:
    """Raise if values are NaN, infinite or outside [``least``, ``most``], except for `IGNORE_INDEX`.

    Raises:
        ValueError: with the first such value.
    """
    if not readable(values) or not values.numel():
        return
    inside = (values >= least - ROUNDING) & (values <= most + ROUNDING)
    wrong = ~(values.isfinite() & inside) & (values != IGNORE_INDEX)
    if wrong.any():
        limits = "finite" if least == -torch.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {limits}, or {IGNORE_INDEX} for none; got {values[wrong][0].item():g}")


def require_mask(name: str, mask: Tensor | None, rows: int, length: int) -> None:
    """Raise if a mask (B, T) has a wrong shape; masks that are not two-dimensional are left to the backend.

    Raises:
        ValueError: with both shapes.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2 and not torch.compiler.is_compiling():
        require_tensor(name, mask, (rows, length))


def require_elements(name: str, values: Tensor) -> None:
    """Raise if a tensor is empty, such as a batch without rows or tokens.

    Raises:
        ValueError: with the shape.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and 0 in values.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(values.shape)}")


def look_up(table: nn.Module, indices: Tensor, name: str, meaning: str) -> Tensor:
    """Look up rows of an embedding, ``table(indices)``; on a CPU the error names an index that is out of range.

    Args:
        name: name of the argument that contains the indices.
        meaning: name of the number of rows, such as "vocab_size".

    Raises:
        ValueError: the table has no such row.
    """
    if torch.compiler.is_compiling():
        return table(indices)
    try:  # free unless it fails
        return table(indices)
    except IndexError:
        require_range(name, indices, getattr(table, "num_embeddings", torch.inf), meaning)
        raise


def refuse_unknown(kwargs: Mapping[str, object], attention: str) -> None:
    """Raise on keyword arguments of an image model's forward that nothing reads, such as misspelt ones.

    Args:
        kwargs: keyword arguments passed on to the layers.
        attention: name of the attention backend. A user-defined backend may read any argument.

    Raises:
        TypeError: with the argument's name.
    """
    if attention.startswith("flash") or attention in BACKENDS:
        for name in kwargs:
            if name not in HANDED_ON and name not in OF_DECODERS:
                raise TypeError(f"forward() got an unexpected keyword argument '{name}'")


def embed(table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str = "") -> Tensor:
    """Return embeddings (B, T, D) of ids (B, T), or the given embeddings.

    Args:
        prefix: prefix of the argument names, such as "decoder_".

    Raises:
        TypeError: the input is not a tensor.
        ValueError: both or neither are given, the input is empty or has a wrong number of dimensions, or, on a CPU, an
            id is not in the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"give exactly one of {prefix}input_ids and {prefix}inputs_embeds")
    name = f"{prefix}input_ids" if inputs_embeds is None else f"{prefix}inputs_embeds"
    given = input_ids if inputs_embeds is None else inputs_embeds
    require_tensor(name, given)
    require_elements(name, given)
    if inputs_embeds is not None:
        return inputs_embeds
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, tokens), got {tuple(input_ids.shape)}")
    return look_up(table, input_ids, name, "vocab_size")
