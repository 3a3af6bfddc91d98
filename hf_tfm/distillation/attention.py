"""Record attention scores and probabilities of any model that uses transformers' attention interface.

    with record_attention(model) as recorded: model(...) -> raw scores and probabilities of every attention layer

TinyBERT's loss uses attention scores before the softmax, which no model returns. While recording, the model's
attention implementation is replaced with a function that computes the scores explicitly and stores them.

Shapes: B sequences; H heads; Tq, Tk query and key positions; Dh features per head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..models.dropout import dropout as fast_dropout

NAME = "tfm_recorded"  # name of the attention implementation
CROSS = ("cross", "encoder_attn", "encdec")  # substrings that identify cross-attention modules by name


@dataclass
class RecordedAttention:
    """Scores and probabilities collected by `record_attention`.

    Args:
        names: maps id(module) to the module's name.
        wanted: (stack, layer) -> True if the layer is recorded; layers count from 1.
        layers: names of the attention modules of each stack (see `stack_of`), in execution order.
        scores: maps a module name to its scores (B, H, Tq, Tk) before the softmax; -inf at masked positions.
        probabilities: maps a module name to its attention probabilities, before dropout.
    """

    names: dict[int, str]
    wanted: Callable[[str, int], bool]
    layers: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)

    def add(self, module: nn.Module, scores: Tensor, probabilities: Tensor) -> None:
        """Store the output of an attention module if it belongs to this model and is wanted."""
        name = self.names.get(id(module))
        if name is None:
            return
        stack = stack_of(name)
        passed = self.layers.setdefault(stack, [])
        if name not in passed:
            passed.append(name)
        if self.wanted(stack, passed.index(name) + 1):
            self.scores[name], self.probabilities[name] = scores, probabilities

    def of(self, stack: str) -> list[str]:
        """Return the layer names of a stack; "" selects the only stack of a single-stack model."""
        if not stack and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        return self.layers.get(stack, [])


recorders: ContextVar[tuple[RecordedAttention, ...]] = ContextVar("recorders", default=())


def recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Compute attention with explicit scores, as an attention function for transformers' interface (Vaswani et al.
    2017, equation 1).

    Args:
        query: (B, H, Tq, Dh); key, value: (B, G, Tk, Dh), where G divides H.
        attention_mask: broadcastable to (B, H, Tq, Tk), bool or additive; None attends to every position, except
            that a causal module still applies its causal mask.

    Returns:
        attention output (B, Tq, H, Dh) and probabilities (B, H, Tq, Tk).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    lowest = torch.finfo(scores.dtype).min
    unseen = None
    if attention_mask is None:
        if (getattr(module, "is_causal", False) if is_causal is None else is_causal) and scores.shape[2] > 1:
            unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(1)
    elif attention_mask.dtype == torch.bool:
        unseen = ~attention_mask
    else:
        unseen = attention_mask <= lowest / 2
        scores = scores + attention_mask.masked_fill(unseen, 0.0)  # the remaining mask values are a bias
    # The softmax uses the lowest finite number instead of -inf: a fully masked row stays finite.
    probabilities = (scores if unseen is None else scores.masked_fill(unseen, lowest)).softmax(-1)
    for recorder in recorders.get():
        recorder.add(module, scores if unseen is None else scores.masked_fill(unseen, -torch.inf), probabilities)
    kept = fast_dropout(probabilities, dropout) if module.training and dropout else probabilities
    return (kept @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(NAME, recorded_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def configurations(model: nn.Module) -> list[PreTrainedConfig]:
    """Return every distinct configuration that sets the attention implementation of a part of the model."""
    found: dict[int, PreTrainedConfig] = {}
    todo = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, name, None) for name in config.sub_configs]
            todo += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return list(found.values())


@contextmanager
def record_attention(
    model: nn.Module, wanted: Callable[[str, int], bool] = lambda stack, layer: True
) -> Iterator[RecordedAttention]:
    """Record the attention of a model's forward passes; the original implementation is restored on exit.

    Args:
        model: a `PreTrainedModel`, or a module that contains some.
        wanted: (stack, layer) -> True if the layer is recorded; by default all layers are.

    Raises:
        ValueError: on exit, if no layer was recorded because the model does not use transformers' attention interface.
    """
    names = {id(module): name for name, module in model.named_modules()}
    recorded = RecordedAttention(names, wanted)
    before = [(config, config._attn_implementation) for config in configurations(model)]
    token = recorders.set((*recorders.get(), recorded))
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield recorded
    finally:
        recorders.reset(token)
        for config, implementation in before:
            config._attn_implementation = {"": implementation}  # restores this config only, not its sub-configs
    if not recorded.layers:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface: its scores cannot be recorded"
        )


def stack_of(name: str) -> str:
    """Return the stack of an attention module, from its name: "encoder", "decoder", "cross" or, of the backbone of a
    detector, "backbone"."""
    if ".backbone." in f".{name}":
        return "backbone"
    above, _, leaf = f".{name}".rpartition(".")
    if ".decoder." not in f"{above}.":
        return "encoder"
    return "cross" if any(part in leaf.lower() for part in CROSS) else "decoder"
