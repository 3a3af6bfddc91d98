"""Signals: the named outputs and activations of a teacher or a student that distillation compares.

    model, inputs, names -> one forward pass -> {name: tensor}

A name is "logits", "boxes", "<kind>/<layer>" or "<stack>/<kind>/<layer>":

    logits                 (n, C) at the positions that have a target, (B, C), or of queries (B, Q, C + 1)
    boxes                  (B, Q, 4) cxcywh
    set_logits, set_boxes  the same for all supervised decoder layers, (L, B, Q, ...)
    hidden/3               (B, T, D) output of block 3; 0 is the input of the first block
    score/3                (B, H, T, T) before the softmax, -inf at masked positions; blocks count from 1
    decoder/score/3        the same for one of several stacks: "encoder", "decoder", "cross"
    map/<module>           (B, D, h, w) output of the named module
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .attention import record_attention

SEGMENTS = "token_type_ids"
Signals = dict[str, Tensor]
LOGITS, BOXES = "logits", "boxes"
SET_LOGITS, SET_BOXES = "set_logits", "set_boxes"
HIDDEN, SCORE, MAP = "hidden", "score", "map"
# Stored instead of a teacher's logits (n, C): the k largest (n, k) in descending order, their classes (n, k), and the
# log of the sum of the exponentials of all others (n,).
TOP, PLACES, REST = "logits/top", "logits/places", "logits/rest"


def signal(kind: str, layer: int | str, stack: str = "") -> str:
    """Return the name of a layer's signal."""
    return "/".join([*([stack] if stack else []), kind, str(layer)])


def parts(name: str) -> tuple[str, str, str]:
    """Split a name into (stack, kind, layer)."""
    if name.startswith(f"{MAP}/"):
        return "", MAP, name.removeprefix(f"{MAP}/")
    stack, kind, layer = (["", "", *name.split("/")])[-3:] if "/" in name else ("", name, "")
    return stack, kind, layer


def collect(
    model: nn.Module, inputs: dict[str, Any], names: Collection[str], positions: Tensor | None = None
) -> tuple[Signals, ModelOutput]:
    """Run a model once and collect the requested signals.

    Args:
        inputs: keyword arguments of the model; token_type_ids are dropped if the model does not accept them, because
            the other model may.
        names: of signals, see above.
        positions: (n,) int64 indices of the wanted rows among the B T rows of logits. If the model has an output
            embedding, only these rows are computed, and none if no name asks for logits. None keeps all rows.

    Returns:
        the signals, and the model's output, whose logits are restricted to those rows.

    Raises:
        ValueError: the model does not provide a signal; the error names it.
    """
    wanted = {name: parts(name) for name in names}
    kinds = {kind for _, kind, _ in wanted.values()}
    blocks = timm_blocks(model)
    modules = {layer: layer for _, kind, layer in wanted.values() if kind == MAP}
    if SEGMENTS in inputs and SEGMENTS not in inspect.signature(model.forward).parameters:
        inputs = {name: value for name, value in inputs.items() if name != SEGMENTS}
    options: dict[str, Any] = {"return_dict": True}
    if HIDDEN in kinds and blocks is None:
        options["output_hidden_states"] = True
    if getattr(model.config, "use_cache", None):
        options["use_cache"] = False
    with ExitStack() as stack:
        if positions is not None:
            stack.enter_context(only_rows(model, positions if LOGITS in wanted else positions[:0]))
        recorded = stack.enter_context(record_attention(model, partial(is_wanted, wanted))) if SCORE in kinds else None
        seen = {name: stack.enter_context(output_of(model, name)) for name in modules}
        states = [stack.enter_context(states_of(blocks))] if HIDDEN in kinds and blocks is not None else []
        output = model(**inputs, **options)
    found: Signals = {}
    for name, (part, kind, layer) in wanted.items():
        if kind == HIDDEN:
            given = states[0] if states else output.get(f"{part}_hidden_states" if part else "hidden_states")
            found[name] = pick(model, name, given, int(layer))
        elif kind == SCORE:
            found[name] = recorded.scores[pick(model, name, recorded.of(part), int(layer) - 1)]
        elif kind == MAP:
            found[name] = seen[layer][0]
        else:
            found[name] = READERS[kind](model, output, positions)
    return found, output


def is_wanted(wanted: Mapping[str, tuple[str, str, str]], stack: str, layer: int) -> bool:
    """Return True if the scores of a layer are among the wanted signals, given as `parts`."""
    return any(kind == SCORE and part in ("", stack) and int(n) == layer for part, kind, n in wanted.values())


def pick(model: nn.Module, name: str, values: Any, place: int) -> Tensor:
    """Return the value at an index.

    Raises:
        ValueError: there is no such value.
    """
    if not values or not 0 <= place < len(values):
        raise ValueError(f'{type(model).__name__} gives no signal "{name}": it has {len(values or ())} of these')
    return values[place]


def logits_of(model: nn.Module, output: ModelOutput, positions: Tensor | None) -> Tensor:
    """Return the logits at `positions`; for a pretraining model, those of the tokens."""
    logits = output.get("prediction_logits") if output.get("logits") is None else output.logits
    if logits is None:
        raise ValueError(f"{type(model).__name__} gives no logits")
    if positions is not None and logits.ndim == 3:  # no output embedding to restrict: all rows were computed
        return logits.flatten(0, 1)[positions.to(logits.device)]
    return logits


def layers_of(field: str) -> Callable[[nn.Module, ModelOutput, Tensor | None], Tensor]:
    """Return a reader that stacks ``field`` of every supervised decoder layer, the last layer last: (L, ...)."""

    def read(model: nn.Module, output: ModelOutput, positions: Tensor | None) -> Tensor:
        earlier = [part[field] for part in output.get("auxiliary_outputs") or ()]
        return torch.stack([*earlier, output[field]])

    return read


def field_of(field: str) -> Callable[[nn.Module, ModelOutput, Tensor | None], Tensor]:
    """Return a reader of ``field``."""

    def read(model: nn.Module, output: ModelOutput, positions: Tensor | None) -> Tensor:
        if output.get(field) is None:
            raise ValueError(f"{type(model).__name__} gives no {field}")
        return output[field]

    return read


READERS = {
    LOGITS: logits_of,
    BOXES: field_of("pred_boxes"),
    SET_LOGITS: layers_of("logits"),
    SET_BOXES: layers_of("pred_boxes"),
    # The two heads of DeiT (Touvron et al. 2021, section 3), on the class token and on the distillation token.
    "cls_logits": field_of("cls_logits"),
    "distillation_logits": field_of("distillation_logits"),
}


@contextmanager
def only_rows(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Restrict the output embedding, if there is one, to some of the B T rows: (B, T, D) -> (n, V).

    The projection to the vocabulary dominates the cost of a masked language model, and only 15 % of tokens are masked.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, -2)[positions.to(args[0].device)], *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_of(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Yield a list to which the forward pass appends the first tensor that the named module returns.

    Raises:
        ValueError: there is no such module, or it did not run.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f'"{name}" is not a module of {type(model).__name__}') from error
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, given: Any) -> None:
        found.append(given if isinstance(given, Tensor) else given[0])

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
    if not found:
        raise ValueError(f'module "{name}" of {type(model).__name__} does not run in its forward pass')


def timm_blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """Return the blocks of a timm Vision Transformer in transformers' wrapper; None for any other model.

    They are hooked because the wrapper's hidden states are feature maps without the class token and the first block's
    input.
    """
    blocks = getattr(getattr(model, "timm_model", None), "blocks", None)
    return blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else None


@contextmanager
def states_of(blocks: nn.ModuleList | nn.Sequential) -> Iterator[list[Tensor]]:
    """Yield a list that the forward pass fills with the input and all outputs of the blocks: L + 1 of (B, T, D)."""
    states: list[Tensor] = []

    def first(_: nn.Module, given: tuple) -> None:
        states.append(given[0])

    def later(_: nn.Module, __: Any, given: Tensor) -> None:
        states.append(given)

    handles = [blocks[0].register_forward_pre_hook(first), *(b.register_forward_hook(later) for b in blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
