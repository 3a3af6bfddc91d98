"""Base class of attention methods: alternatives to softmax attention over all keys, chosen by name.

    queries, keys, values (B, H, T, Dh) and which keys are tokens (B, T) -> a method -> (B, H, T, Dh)

A method is a frozen dataclass of its options; its `AttentionMethod.attend` is the whole implementation. Weights that a
method needs besides the projections are in an `AttentionWeights` of the attention layer.

Shapes: B sequences; H heads; T tokens; Dh width of a head.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


def option(default: Any, least: int = 0, most: int = 2**20, choices: Collection[str] = ()) -> Any:
    """Return a field of an `AttentionMethod` with its limits, which are checked when a method is built.

    Args:
        least, most: smallest and largest value of an integer; a float must be above 0.
        choices: all values of a string.
    """
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


class AttentionWeights(nn.Module):
    """Weights of a method in one attention layer.

    Args:
        weights: {name: (shape, function that initialises a parameter in place)}. Functions of
            `transformers.initialization` leave weights alone that were loaded from a file.
    """

    def __init__(self, **weights: tuple[tuple[int, ...], Callable[[Tensor], Any]]):
        super().__init__()
        self.initializers = {name: initializer for name, (_, initializer) in weights.items()}
        for name, (shape, _) in weights.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Set the initial weights."""
        for name, initializer in self.initializers.items():
            initializer(self.get_parameter(name))


class AttentionInputs(NamedTuple):
    """Inputs of an attention method.

    Args:
        query: (B, H, Tq, Dh); of a causal layer with a cache, the last Tq tokens.
        key: (B, H, T, Dh).
        value: (B, H, T, Dv); Dv is Dh, or T for an attention map.
        tokens: (B, T) bool, False at padding; None if there is none.
        scaling: factor of the scores.
        dropout: rate of the probabilities.
        layer: with ``is_causal``, and ``attention_weights`` as returned by `AttentionMethod.weights`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: Tensor | None
    scaling: float
    dropout: float
    layer: nn.Module


@dataclass(frozen=True)
class AttentionMethod:
    """Base class of attention methods; a transformers attention function with ``output_attentions``.

    Subclasses are dataclasses whose fields, made with `option`, are the options of the method.

    Attributes:
        causal: it can mask later tokens.
        unused: projections of an attention layer that it does not read, and that are not trained.

    Raises:
        ValueError: an option is out of range.
    """

    causal: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for one in fields(self):
            check_option(one.name, getattr(self, one.name), one.type, **one.metadata)

    def weights(self, num_heads: int, head_dim: int, length: int | None) -> AttentionWeights | None:
        """Return the weights of one layer, if the method has any.

        Args:
            num_heads: H.
            head_dim: Dh.
            length: maximum number of tokens of the model, if it has one.

        Raises:
            ValueError: they need a maximum number of tokens.
        """
        return None

    def attend(self, given: AttentionInputs) -> Tensor:
        """Compute self-attention.

        Returns:
            (B, H, Tq, Dv); no row depends on padding or on other rows of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attend")

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute self-attention; a transformers attention function.

        Args:
            module: the calling attention layer.
            query: (B, H, Tq, Dh); key, value: (B, H, T, Dh).
            attention_mask: bool or additive, broadcastable to (B, 1, Tq, T). The last query attends to all tokens, so
                its row is the padding.
            scaling: factor of the scores; default, Dh^-0.5.
            dropout: rate of the probabilities.
            output_attentions: also return the weight of each value in the output, which may be negative.

        Returns:
            (B, Tq, H, Dh), and (B, H, Tq, T) or None.
        """
        tokens, slots = None, key.shape[2]
        if attention_mask is not None:
            last = attention_mask[:, 0, -1].expand(query.shape[0], -1)
            tokens = last if last.dtype == torch.bool else last > -1
            if query.shape[2] != slots and module.is_causal:  # a static cache has empty slots after the last query
                used = int(tokens.any(dim=0).nonzero().max()) + 1
                key, value, tokens = key[:, :, :used], value[:, :, :used], tokens[:, :used]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        given = AttentionInputs(query, key, value, tokens, scaling, dropout, module)
        mixed = self.attend(given)
        maps = None
        if output_attentions:  # the output is linear in the values
            unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device)
            unit = unit.expand(*value.shape[:2], -1, -1)
            maps = self.attend(given._replace(value=unit, dropout=0.0))
            maps = nn.functional.pad(maps, (0, slots - key.shape[2]))
        return mixed.transpose(1, 2), maps


def check_option(name: str, value: Any, kind: Any, least: int, most: int, choices: Collection[str]) -> None:
    """Check the value of an option of type ``kind``; see `option`.

    Raises:
        ValueError: it has another type, or is out of range.
    """
    if value is None and kind not in (bool, int, float, str):  # a type such as int | None
        return
    if choices:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    elif kind is bool:
        if type(value) is not bool:
            raise ValueError(f"{name} must be true or false, got {value!r}")
    elif kind is float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    elif type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer in [{least}, {most}], got {value!r}")


def masked_scores(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Set scores (..., Tq, Tk) to a large negative number where ``allowed``, broadcastable to them, is False."""
    return scores if allowed is None else scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)


def without_padding(states: Tensor, tokens: Tensor | None) -> Tensor:
    """Set padded rows of (B, H, T, n) to 0.

    `torch.where` rather than a product: padding may be infinite or NaN.
    """
    return states if tokens is None else states.where(tokens[:, None, :, None], 0)
