"""Attention methods beside SDPA: time of a forward pass, and of one with its backward pass, and memory.

python -m benchmarks attention_methods

Attention alone, without projections, interleaved on the same machine; every method with its default options.
"""

import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_tfm.models.encoder_attention import METHODS, make_method

from . import common

FULL = "full"


def attention(name: str, length: int, num_heads: int, head_dim: int) -> Callable[..., Tensor]:
    """A function of queries, keys and values, (B, H, T, Dh) each."""
    if name == FULL:
        return lambda *tensors: scaled_dot_product_attention(*tensors).transpose(1, 2)
    method = make_method(name)
    layer = SimpleNamespace(is_causal=False, attention_weights=method.weights(num_heads, head_dim, length))
    return lambda *tensors: method(layer, *tensors, None)[0]


def forward(attend: Callable[..., Tensor], tensors: list[Tensor], number: int) -> int:
    with torch.inference_mode():
        attend(*tensors)
    return 1


def training(attend: Callable[..., Tensor], tensors: list[Tensor], number: int) -> int:
    given = [tensor.detach().requires_grad_() for tensor in tensors]
    attend(*given).sum().backward()
    return 1


def memory(name: str, length: int, num_heads: int, head_dim: int) -> float:
    """Megabytes by which a forward and backward pass grows the process, which is a fresh one."""
    attend, tensors = attention(name, length, num_heads, head_dim), draw(1, num_heads, length, head_dim)
    training(attention(name, 64, num_heads, head_dim), draw(1, num_heads, 64, head_dim), 0)  # loads libraries
    return common.peak_growth(partial(training, attend, tensors, 0))


def draw(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


def main(
    lengths: tuple[int, ...] = (256, 1024, 4096),
    num_heads: int = 8,
    head_dim: int = 32,
    rounds: int = 5,
    names: tuple[str, ...] = (FULL, *METHODS),
) -> None:
    """Measure and write benchmarks/results/attention_methods.json.

    Args:
        lengths: numbers of tokens, T.
        num_heads: H.
        head_dim: Dh.
        rounds: timed rounds; medians are reported.
        names: methods; "full" is SDPA, with which the others are compared.
    """
    results: dict[str, Any] = {}
    for length in lengths:
        torch.manual_seed(0)
        tensors = draw(1, num_heads, length, head_dim)
        attends = {name: attention(name, length, num_heads, head_dim) for name in names}
        row = results[f"{length} tokens"] = {}
        for use, work in {"forward": forward, "forward and backward": training}.items():
            rates = common.interleaved({name: partial(work, one, tensors) for name, one in attends.items()}, rounds)
            row[f"{use}, ms"] = {name: round(1e3 / statistics.median(rate), 2) for name, rate in rates.items()}
            row[f"{use}, speedup"] = {name: round(common.ratio(rates, name, FULL), 2) for name in names[1:]}
        row["memory, MB"] = {
            name: round(common.in_fresh_process(memory, name, length, num_heads, head_dim), 1) for name in names
        }
        print(length, row, flush=True)
    content = {"batch": 1, "num_heads": num_heads, "head_dim": head_dim, "rounds": rounds}
    common.write("attention_methods", {**content, "results": results})
