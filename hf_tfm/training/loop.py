"""One training step, and one evaluation, of every recipe.

    micro-batches of a step -> count items over all of them and all ranks -> backward of sums / counts -> clip -> step

Counts come before losses: the normalisers (tokens, boxes, masked patches) of the whole optimizer step are known before
the first backward, and each sum of losses is divided once. So a step is the same, to rounding, however it is cut into
micro-batches and ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import inner


class Task(Protocol):
    """What the loop needs to know of a task.

    ``count(batch)`` -> {term: items, or their weight}, from the targets alone; ``losses(model, batch)`` -> {term: sum
    over items}. ``term`` names what throughput is counted in, a term with or without a loss; ``item`` is its plural.
    """

    item: str
    term: str

    def count(self, batch: Any) -> dict[str, float]: ...

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]: ...


class Loader(Protocol):
    """Where steps come from.

    ``epoch(epoch, start)`` gives this rank's micro-batches of every step of an epoch, from step ``start`` on, equally
    many on every rank; ``steps_per_epoch(epoch)`` the number of steps, or None where it is not known.
    """

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]: ...

    def steps_per_epoch(self, epoch: int = 0) -> int | None: ...


@dataclass
class StepResult:
    """What a step was, all tensors on the device.

    Args:
        losses: {term: mean over its items}, of this rank's part alone times the number of ranks; see `train`.
        counts: {term: items}, over all ranks.
        gradient_norm: before clipping.
    """

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    gradient_norm: Tensor


def global_counts(
    accelerator: Accelerator, task: Task, micro_batches: Sequence[Any], flag: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Items of each term over all micro-batches and ranks; and on how many ranks ``flag`` is set."""
    totals: dict[str, float] = {}
    for batch in micro_batches:
        for term, count in task.count(batch).items():
            totals[term] = totals.get(term, 0) + count
    numbers = torch.tensor([*totals.values(), int(flag)]).to(accelerator.device, non_blocking=True)
    numbers = accelerator.reduce(numbers, "sum")
    return dict(zip(totals, numbers[:-1], strict=True)), numbers[-1]


def mean(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; of nothing, the total."""
    return total / count.where(count != 0, 1)


def train_step(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Sequence[Any],
    max_grad_norm: float = 0.0,
    counts: dict[str, Tensor] | None = None,
) -> StepResult:
    """One optimizer step over a list of micro-batches; equal to one large batch, on any number of ranks.

    A step whose gradient is not finite changes nothing; on the device's own word, without the host waiting for it.

    Args:
        model, optimizer: prepared by the accelerator; the optimizer with ``fused=True``.
        micro_batches: this rank's, at least one (a rank without samples gives one that counts for nothing).
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it.
        counts: as `global_counts` gives them, where they are known already.

    Raises:
        ValueError: the optimizer is not a fused one, which alone can leave out a step on the device's word.
    """
    if not inner(optimizer).defaults.get("fused"):
        raise ValueError(f"optimizer must be made with fused=True, got {type(inner(optimizer)).__name__} without")
    if counts is None:
        counts, _ = global_counts(accelerator, task, micro_batches)
    losses: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            sums = task.losses(model, batch)
            # Data-parallel training averages gradients over ranks; the sums need adding up.
            means = {term: mean(value * accelerator.num_processes, counts[term]) for term, value in sums.items()}
            accelerator.backward(sum(means.values()))
        for term, value in means.items():
            losses[term] = losses.get(term, 0) + value.detach()
    limit = max_grad_norm or torch.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    if accelerator.scaler is None:  # a loss scaler makes the same check itself
        inner(optimizer).found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(losses, counts, norm)


def widest_float(device: torch.device) -> torch.dtype:
    """What sums over many items are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def evaluate(accelerator: Accelerator, task: Task, model: nn.Module, loader: Loader) -> dict[str, float]:
    """Mean of each loss term over a data set, exact over uneven ranks; ``loss`` is their sum."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    wide = widest_float(accelerator.device)
    training = model.training
    model.eval()
    for micro_batches in loader.epoch(0):
        for batch in micro_batches:
            for term, count in task.count(batch).items():
                counts[term] = counts.get(term, 0) + count
            for term, value in task.losses(model, send_to_device(batch, accelerator.device)).items():
                sums[term] = sums.get(term, 0) + value.to(wide)
    model.train(training)
    totals = accelerator.reduce(
        {term: torch.stack([sums[term], sums[term].new_tensor(counts[term])]) for term in sums}
    )
    means = {term: mean(total, count).item() for term, (total, count) in totals.items()}
    return {"loss": sum(means.values()), **(means if len(means) > 1 else {})}
