"""Products by the weight of a linear layer, and the test of whether a layer's weight may be read at all.

Models call their layers, so that hooks, adapters, offloading and quantisation work. Where reading the weight instead
saves time or memory, `is_plain` first makes sure that a call would compute nothing else.

In generation on a CPU, `project` multiplies by oneDNN instead of MKL. MKL is slow where few rows meet a large matrix:
16 rows by GPT-2's output matrix took 28 ms with MKL and 12 with oneDNN, one row 13 and 6 (torch 2.14, 2 cores of an
AMD processor).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

LARGE = 2**19  # elements of a matrix; for smaller ones oneDNN's preparation costs more than it gains
GENERATING: ContextVar[bool] = ContextVar("generating", default=False)  # each thread has its own value


@contextmanager
def generating() -> Iterator[None]:
    """Let `project` use oneDNN in this block."""
    token = GENERATING.set(True)
    try:
        yield
    finally:
        GENERATING.reset(token)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` runs ``kind.forward`` on an ordinary weight and nothing else.

    False for a layer that an adapter or a quantiser has replaced, whose weight is sharded or on the meta device, that
    has hooks, or whose ``forward`` was replaced (as accelerate does to offload it): such a layer has to be called.
    Hooks on all modules at once do not count; profilers and operation counters use them to observe.

    Args:
        kind: a class with the attribute ``weight``, as `nn.Linear`.
    """
    return (
        type(layer) is kind
        and type(layer.weight) in (nn.Parameter, Tensor)
        and not layer.weight.is_meta
        and "forward" not in layer.__dict__
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and not (layer._backward_pre_hooks or layer._backward_hooks)
    )


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, (..., in) -> (..., out); in `generating` by oneDNN where that is faster.

    oneDNN adds in another order, so results differ in the last digits. The layer is not changed, and generation in one
    thread does not affect other threads.
    """
    if not torch.compiler.is_compiling() and GENERATING.get() and suits_onednn(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def suits_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether this is a product of ordinary float32 matrices on a CPU, and the weight is `LARGE`."""
    if type(layer) is not nn.Linear or layer.weight.numel() < LARGE:
        return False
    weight = layer.weight
    return (
        is_plain(layer, nn.Linear)
        and weight.layout is torch.strided
        and weight.device.type == x.device.type == "cpu"
        and weight.dtype == x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def floating_dtype(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """Dtype of the first floating-point parameter of ``layer``; ``default`` where it has none (quantised)."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), default)


def embedding_table(embedding: nn.Module, length: int, device: torch.device) -> Tensor:
    """The first ``length`` rows of an embedding, (length, D), on ``device``.

    Those of a plain one are read: what several checkpointed blocks use must not save tensors for its backward pass.
    """
    if is_plain(embedding, nn.Embedding):
        return embedding.weight if embedding.num_embeddings == length else embedding.weight[:length]
    return embedding(torch.arange(length, device=device))
