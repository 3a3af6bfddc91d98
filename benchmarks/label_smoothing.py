"""Label-smoothed loss over a large vocabulary: time, memory and gradients against transformers' LabelSmoother.

python -m benchmarks label_smoothing

Both start from hidden states and the output matrix, and end with the gradients of both. The lower bound of their time
is that of the three matrix products.
"""

import statistics
from functools import partial

import torch
from transformers.trainer_pt_utils import LabelSmoother

from hf_tfm.models.cross_entropy import linear_cross_entropy

from . import common


def inputs(tokens: int, vocab_size: int, hidden_size: int):
    """Hidden states (N, D), output matrix (V, D) and labels (N,)."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) * hidden_size**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (tokens,))


def ours(hidden, weight, labels):
    (linear_cross_entropy(hidden, weight, labels, 0.1) / len(labels)).backward()


def label_smoother(hidden, weight, labels):
    # The tokens are in one row, like a batch of one sentence.
    LabelSmoother(epsilon=0.1)({"logits": (hidden @ weight.t())[None]}, labels[None]).backward()


@torch.no_grad()
def matrix_products(hidden, weight, labels):
    """Lower bound: the three products that every method must compute."""
    logits = hidden @ weight.t()
    logits @ weight
    logits.t() @ hidden


IMPLEMENTATIONS = {"ours": ours, "label_smoother": label_smoother}


def peak_megabytes(name: str, sizes: tuple[int, int, int]) -> float:
    """Growth of the process's memory above the inputs and their gradients, in MB."""
    torch.set_num_threads(1)
    hidden, weight, labels = inputs(*sizes)
    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    small = inputs(64, 1000, sizes[2])
    IMPLEMENTATIONS[name](*small)  # buffers allocated on first use are not counted
    return common.peak_growth(lambda: IMPLEMENTATIONS[name](hidden, weight, labels))


def main(tokens: int = 2048, vocab_size: int = 37_000, hidden_size: int = 512, rounds: int = 7) -> None:
    """Measure and write benchmarks/results/label_smoothing.json.

    Args:
        tokens: N, target tokens per step.
        vocab_size: V.
        hidden_size: D.
        rounds: timed rounds; medians are reported.
    """
    sizes = (tokens, vocab_size, hidden_size)
    hidden, weight, labels = inputs(*sizes)
    gradients = {}
    for name, implementation in IMPLEMENTATIONS.items():
        hidden.grad = weight.grad = None
        implementation(hidden, weight, labels)
        gradients[name] = hidden.grad, weight.grad
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients.values(), strict=True))
    largest = max(float(g.abs().max()) for g in gradients["label_smoother"])
    memory = {name: round(common.in_fresh_process(peak_megabytes, name, sizes), 1) for name in IMPLEMENTATIONS}
    results = {
        "tokens": tokens,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "speed": {p: speed(hidden, weight, labels, p, rounds) for p in ("fp32", "bf16")},
        "extra_megabytes": memory,
        "memory_ratio": round(memory["ours"] / memory["label_smoother"], 3),
        "max_abs_gradient_difference": difference,
        "max_abs_gradient": largest,
    }
    common.write("label_smoothing", results)


def speed(hidden, weight, labels, precision: str, rounds: int) -> dict:
    """Medians of the variants and of the matrix products alone; bf16 means autocast."""

    def work(implementation, number: int) -> int:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            implementation(hidden, weight, labels)
        return len(labels)

    implementations = {**IMPLEMENTATIONS, "matrix_products": matrix_products}
    rates = common.interleaved({name: partial(work, c) for name, c in implementations.items()}, rounds)
    return {
        "milliseconds": {name: round(1e3 * len(labels) / statistics.median(r), 1) for name, r in rates.items()},
        "ratio": round(common.ratio(rates, "ours", "label_smoother"), 2),
        "share_of_floor": round(common.ratio(rates, "ours", "matrix_products"), 2),
    }
