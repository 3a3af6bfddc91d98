"""Checks of what is passed to a model's forward: one line that names the argument, the value and the limit.

Values are read only where that needs no copy from a device: on a CPU, outside of graphs that are compiled, exported or
traced. Elsewhere a value out of range ends in the device's own assertion.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from .cross_entropy import IGNORE_INDEX

BACKENDS = ("eager", "sdpa", "flex_attention")  # and flash attention
# What transformers, Trainer and the backends may hand on.
# Programs give these to every encoder-decoder; DETR's decoder reads queries of its own, as in transformers.
OF_DECODERS = frozenset({"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"})
HANDED_ON = {
    *TransformersKwargs.__annotations__,
    *("return_dict", "return_loss", "output_cross_attentions", "use_cache", "cache_position", "dropout", "scaling"),
    *("sliding_window", "softcap", "deterministic", "target_dtype"),
}
ROUNDING = 1e-4  # by which a number may miss its limits


def readable(values: Tensor) -> bool:
    """Whether values can be read without a host-device copy and outside of a traced graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # A subclass may stand for data that is elsewhere or nowhere (fake and distributed tensors).
    plain = type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu"
    return plain and not torch._C._functorch.is_batchedtensor(values)


def require_tensor(name: str, values: object, shape: tuple[int, ...] | None = None) -> None:
    """Refuse what is no tensor, or a tensor of another shape.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if shape is not None and tuple(values.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")


def require_range(name: str, values: Tensor, limit: int, meaning: str, ignore: bool = False) -> None:
    """Refuse integers outside [0, ``limit``).

    Args:
        meaning: what the limit is, such as "vocab_size".
        ignore: `IGNORE_INDEX` is allowed.

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
    """Refuse NaN, infinity and numbers outside [``least``, ``most``], other than `IGNORE_INDEX`.

    Raises:
        ValueError: with the first such number.
    """
    if not readable(values) or not values.numel():
        return
    inside = (values >= least - ROUNDING) & (values <= most + ROUNDING)
    wrong = ~(values.isfinite() & inside) & (values != IGNORE_INDEX)
    if wrong.any():
        limits = "finite" if least == -torch.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {limits}, or {IGNORE_INDEX} for none; got {values[wrong][0].item():g}")


def require_mask(name: str, mask: Tensor | None, rows: int, length: int) -> None:
    """Refuse a mask (B, T) of another shape; masks of other dimensions are a backend's own.

    Raises:
        ValueError: with both shapes.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2 and not torch.compiler.is_compiling():
        require_tensor(name, mask, (rows, length))


def require_elements(name: str, values: Tensor) -> None:
    """Refuse a tensor without elements, such as a batch of no rows or of no tokens.

    Raises:
        ValueError: with its shape.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and 0 in values.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(values.shape)}")


def look_up(table: nn.Module, indices: Tensor, name: str, meaning: str) -> Tensor:
    """Rows of an embedding, ``table(indices)``; on a CPU the error of an index out of range names it.

    Args:
        name: of the argument that the indices come from.
        meaning: what the number of rows is, such as "vocab_size".

    Raises:
        ValueError: the table has no such row.
    """
    if torch.compiler.is_compiling():
        return table(indices)
    try:  # costs nothing where all is well
        return table(indices)
    except IndexError:
        require_range(name, indices, getattr(table, "num_embeddings", torch.inf), meaning)
        raise


def refuse_unknown(kwargs: Mapping[str, object], attention: str) -> None:
    """Refuse keyword arguments of a forward pass over images that nothing reads, such as a misspelt one.

    Args:
        kwargs: those that are handed on to the layers.
        attention: name of the backend. One of the user's own may read anything.

    Raises:
        TypeError: with the name.
    """
    if attention.startswith("flash") or attention in BACKENDS:
        for name in kwargs:
            if name not in HANDED_ON and name not in OF_DECODERS:
                raise TypeError(f"forward() got an unexpected keyword argument '{name}'")


def embed(table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str = "") -> Tensor:
    """Embeddings (B, T, D) of ids (B, T), or those given.

    Args:
        prefix: of the arguments' names, such as "decoder_".

    Raises:
        TypeError: the input is no tensor.
        ValueError: both or neither are given, the input is empty or has another number of dimensions, or, on a CPU, an
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
