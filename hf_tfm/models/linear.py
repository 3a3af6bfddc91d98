"""Linear layers: faster products on a CPU, and a test of whether a layer's weight may be read directly.

Models call their layers, so that hooks, adapters, offloading and quantisation work. Where reading the weight directly
saves time or memory, `is_plain` first checks that the result would be the same as calling the layer.

During generation on a CPU, `project` uses oneDNN instead of MKL, which is slow for few rows and a large matrix: for
GPT-2's output matrix, 16 rows took 28 ms with MKL and 12 ms with oneDNN, one row 13 ms and 6 ms (torch 2.14, 2 cores
of an AMD processor).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

LARGE = 2**19  # minimum number of elements of a matrix for which oneDNN gains more than its preparation costs
GENERATING: ContextVar[bool] = ContextVar("generating", default=False)  # separate value per thread


@contextmanager
def generating() -> Iterator[None]:
    """Enable oneDNN in `project` within this context."""
    token = GENERATING.set(True)
    try:
        yield
    finally:
        GENERATING.reset(token)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling ``layer`` is just ``kind.forward`` on an ordinary weight.

    False for a layer that an adapter or a quantiser has replaced, whose weight is sharded or on the meta device, that
    has hooks, or whose ``forward`` was replaced (as accelerate does for offloading): such a layer must be called.
    Global module hooks do not count; profilers and operation counters use them to observe.

    Args:
        kind: a class with the attribute ``weight``, such as `nn.Linear`.
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
    """Compute ``layer(x)``, (..., in) -> (..., out); within `generating` by oneDNN where that is faster.

    oneDNN sums in a different order, so results differ in the last digits. The layer is not changed, and generation in
    one thread does not affect other threads.
    """
    if not torch.compiler.is_compiling() and GENERATING.get() and suits_onednn(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def suits_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Return whether this is a product of ordinary float32 matrices on a CPU with a `LARGE` weight."""
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
    """Return the dtype of the layer's first floating-point parameter, or ``default`` if it has none (quantised)."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), default)


def embedding_table(embedding: nn.Module, length: int, device: torch.device) -> Tensor:
    """Return the first ``length`` rows of an embedding, (length, D), on ``device``.

    The weight of a plain embedding is read directly: a table shared by several checkpointed blocks must not save
    tensors for its own backward pass.
    """
    if is_plain(embedding, nn.Embedding):
        return embedding.weight if embedding.num_embeddings == length else embedding.weight[:length]
    return embedding(torch.arange(length, device=device))
