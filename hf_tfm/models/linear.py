"""The linear layer, in generation up to twice as fast on a CPU.

torch multiplies float32 matrices there with MKL, which on the AMD processor that this was measured on is slow where
few rows meet a large matrix, as in each step of generation. oneDNN, which torch has too, is not: 16 rows by GPT-2's
output matrix took 12 instead of 28 ms, one row 6 instead of 13 (torch 2.14, 2 cores).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

LARGE = 2**19  # numbers in a matrix; with smaller ones oneDNN's preparation costs more than it gains
GENERATING: ContextVar[bool] = ContextVar("generating", default=False)


@contextmanager
def generating() -> Iterator[None]:
    """In here `Linear` gets plain tensors, whose gradients nobody asks for."""
    token = GENERATING.set(True)
    try:
        yield
    finally:
        GENERATING.reset(token)


class Linear(nn.Linear):
    """`nn.Linear`, whose products in `generating` are the same sums in another order.

    What looks for the very class `nn.Linear`, as torch's old `quantize_dynamic` does, passes it by: `hf-tfm convert`
    first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not torch.compiler.is_compiling() and GENERATING.get() and self.suits_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def suits_onednn(self, x: Tensor) -> bool:
        """Whether this is a product of ordinary float32 matrices on a CPU, and the weights are `LARGE`."""
        weight = self.weight
        return (
            weight.numel() >= LARGE
            and type(weight) is nn.Parameter  # not quantized, not sharded
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
