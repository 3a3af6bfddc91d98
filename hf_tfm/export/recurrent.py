"""Recurrent layers as one node of a graph of any length.

torch.export infers the shapes of a GRU or an LSTM by unrolling it, which fixes the length of the sequence. Here the
shapes are stated instead, so that the node stays as it is and a runtime's own recurrent layer takes its place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


def gru(inputs: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return outputs (B, T, D) and the last state (1, B, D) of a GRU of one layer, batch first, without values."""
    return inputs.new_empty(*inputs.shape[:2], state.shape[-1]), torch.empty_like(state)


def lstm(inputs: Tensor, states: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs (B, T, D) and the last states (1, B, D) of an LSTM, as `gru` does."""
    return inputs.new_empty(*inputs.shape[:2], states[0].shape[-1]), *map(torch.empty_like, states)


@contextmanager
def recurrent_nodes() -> Iterator[None]:
    """Keep GRU and LSTM layers as nodes in graphs that are traced within this context."""
    layers: list[tuple[Any, Callable]] = [(torch.ops.aten.gru.input, gru), (torch.ops.aten.lstm.input, lstm)]
    before = [dict(operator.py_kernels) for operator, _ in layers]
    try:
        for operator, shapes in layers:
            operator.py_kernels.update(dict.fromkeys(KEYS, shapes))
            operator._dispatch_cache.clear()
        yield
    finally:
        for (operator, _), kernels in zip(layers, before, strict=True):
            operator.py_kernels.clear()
            operator.py_kernels.update(kernels)
            operator._dispatch_cache.clear()
