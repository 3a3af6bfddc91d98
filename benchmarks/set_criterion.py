"""The criterion of a detector, matching and losses of six layers: time, device synchronizations, gradients.

python -m benchmarks set_criterion [--authors DIR] [--architecture deformable_detr --queries 300]

Forward and backward passes for random predictions, interleaved. Each value that the host reads from the
device is a synchronization, which leaves a GPU idle.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import common
from .detection_peers import criteria, outputs_of, scenes


class Waits(TorchDispatchMode):
    """Counts operations, and those by which the host reads from a device."""

    def __init__(self):
        super().__init__()
        self.reads = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.name()
        self.reads += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        self.reads += name in ("aten::_to_copy",) and str((kwargs or {}).get("device", "")) == "cpu"
        return func(*args, **(kwargs or {}))


def main(
    batch_sizes: tuple[int, ...] = (2, 16),
    objects: int = 20,
    layers: int = 6,
    queries: int = 100,
    rounds: int = 10,
    authors: str | None = None,
    architecture: str = "detr",
) -> None:
    """Measure and write benchmarks/results/set_criterion.json, or ARCHITECTURE_criterion.json for another detector.

    Args:
        batch_sizes: images per batch.
        objects: objects per image.
        layers: decoder layers.
        queries: queries per image.
        rounds: timed rounds; medians are reported.
        authors: folder of a copy of facebookresearch/detr.
        architecture: detr or deformable_detr.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for batch_size in batch_sizes:
        *_, labels = scenes(batch_size, 32, 32, objects)
        labels = [{name: value.to(device) for name, value in label.items()} for label in labels]
        torch.manual_seed(0)
        logits = torch.randn(layers, batch_size, queries, outputs_of(architecture), device=device)
        boxes = torch.rand(layers, batch_size, queries, 4, device=device) * 0.4 + 0.3
        implementations = criteria(authors, labels, architecture)
        gradients = {name: gradient(loss, logits, boxes) for name, loss in implementations.items()}
        counted = {name: count(loss, logits, boxes) for name, loss in implementations.items()}
        variants = {name: partial(once, loss, logits, boxes) for name, loss in implementations.items()}
        rates = common.interleaved(variants, rounds)
        largest = max(part.abs().max() for part in gradients["ours"])
        results[f"batch {batch_size}"] = {
            "milliseconds": {name: round(1e3 / statistics.median(r), 2) for name, r in rates.items()},
            "ratios": {f"ours / {n}": round(common.ratio(rates, "ours", n), 2) for n in rates if n != "ours"},
            "operations": {name: waits.operations for name, waits in counted.items()},
            "reads_by_the_host": {name: waits.reads for name, waits in counted.items()},
            "gradient_difference": {
                name: max((a - b).abs().max().item() for a, b in zip(gradients["ours"], theirs, strict=True))
                for name, theirs in gradients.items()
                if name != "ours"
            },
            "largest_gradient": largest.item(),
        }
        print(batch_size, results[f"batch {batch_size}"], flush=True)
    common.write(
        "set_criterion" if architecture == "detr" else f"{architecture}_criterion",
        {
            "architecture": architecture,
            "objects": objects,
            "layers": layers,
            "queries": queries,
            "rounds": rounds,
            "batches": results,
        },
    )


def gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a loss with respect to logits and boxes."""
    logits, boxes = logits.detach().requires_grad_(), boxes.detach().requires_grad_()
    loss(logits, boxes).backward()
    return logits.grad, boxes.grad


def once(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, boxes: Tensor, number: int) -> int:
    """One forward and backward pass."""
    gradient(loss, logits, boxes)
    return 1


def count(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, boxes: Tensor) -> Waits:
    """Operations and host reads of a forward and backward pass."""
    with Waits() as waits:
        gradient(loss, logits, boxes)
    return waits
