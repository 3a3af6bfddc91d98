"""The linear layer, without gradients up to twice as fast on a CPU.

In float32 torch multiplies there with MKL, which is slow where few rows meet a large matrix, as in each step of
generation. oneDNN, which torch has too and `torch.compile` uses, is not: 16 rows by GPT-2's output matrix took 12
instead of 28 ms, one row 6 instead of 13 (torch 2.14, 2 cores of an AMD processor); from 1,000 rows on, 6 to 15 %.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LARGE = 2**19  # numbers in a matrix; with smaller ones oneDNN's preparation costs more than it gains


class Linear(nn.Linear):
    """`nn.Linear` in all but speed: the same sums in another order.

    What looks for the very class `nn.Linear`, as torch's old `quantize_dynamic` does, passes it by: `hf-tfm convert`
    first. torchao, bitsandbytes and PEFT take it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.suits_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def suits_onednn(self, x: Tensor) -> bool:
        """Whether nothing but a plain product is asked for: no gradient, no autocast, no compiler, no other kind of
        tensor."""
        return (
            not torch.is_grad_enabled()
            and self.weight.numel() >= LARGE
            and type(self.weight) is nn.Parameter  # not quantized, not sharded
            and self.weight.device.type == x.device.type == "cpu"
            and self.weight.dtype == x.dtype == torch.float32
            and x.numel() > 0
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not is_in_torch_dispatch_mode()  # a counter of operations knows torch's own product
        )
