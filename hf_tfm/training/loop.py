"""Training step and evaluation, shared by all recipes.

    micro-batches of a step -> count items over all of them and all ranks -> backward of sums / counts -> clip -> step

Items are counted before losses are computed: the normalisers (tokens, boxes, masked patches) of the whole optimizer
step are known before the first backward pass, and each sum of losses is divided once. A step is therefore the same, up
to rounding, however it is divided into micro-batches and ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from ..sharding import full_tensor
from ..tasks.base import mean
from .checkpoint import inner


class Task(Protocol):
    """Interface of a task for the training loop.

    ``count(batch)`` -> {term: number or total weight of items}, from the targets alone; ``losses(model, batch)`` ->
    {term: sum over items}. ``term`` is the term whose items measure throughput and need not have a loss; ``item`` is
    the plural name of these items.
    """

    @property
    def item(self) -> str: ...

    @property
    def term(self) -> str: ...

    def count(self, batch: Any) -> Mapping[str, float]: ...

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]: ...


class StatefulTask(Task, Protocol):
    """Interface of a task for `session.train`; the parts are described in `tasks.base.Task`."""

    @property
    def statistics(self) -> tuple[str, ...]: ...

    @property
    def out_of_budget(self) -> bool: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class StepResult:
    """Result of a step; all tensors are on the device.

    Args:
        losses: {term: mean over its items}, of this rank's items only, times the number of ranks; see `train_step`.
        counts: {term: items}, over all ranks.
        gradient_norm: before clipping.
    """

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    gradient_norm: Tensor


def global_counts(
    accelerator: Accelerator, task: Task, micro_batches: Sequence[Any], flags: Sequence[bool] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """Count the items of each term over all micro-batches and ranks, and the ranks on which each of ``flags`` is
    set."""
    totals: dict[str, float] = {}
    for batch in micro_batches:
        for term, count in task.count(batch).items():
            totals[term] = totals.get(term, 0) + count
    numbers = torch.tensor([*totals.values(), *map(int, flags)]).to(accelerator.device, non_blocking=True)
    numbers = accelerator.reduce(numbers, "sum")
    return dict(zip(totals, numbers[: len(totals)], strict=True)), numbers[len(totals) :]


def train_step(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Sequence[Any],
    max_grad_norm: float = 0.0,
    counts: dict[str, Tensor] | None = None,
    seed: Callable[[int], None] | None = None,
) -> StepResult:
    """Run one optimizer step over a list of micro-batches, equivalent to one large batch on any number of ranks.

    A step whose gradient is not finite leaves the weights unchanged. The check runs on the device, without a
    synchronisation with the host.

    Args:
        model, optimizer: prepared by the accelerator; the optimizer needs ``fused=True``.
        micro_batches: those of this rank, at least one; a rank without samples passes a batch with zero items.
        max_grad_norm: clips the gradient to this norm; 0 disables clipping.
        counts: result of `global_counts`, if already known.
        seed: called with the index of each micro-batch before its forward pass, for instance to seed dropout.

    Raises:
        ValueError: the optimizer is not fused; only fused ones can skip a step on the device.
    """
    if not inner(optimizer).defaults.get("fused"):
        raise ValueError(f"optimizer must be created with fused=True, got {type(inner(optimizer)).__name__} without")
    if counts is None:
        counts, _ = global_counts(accelerator, task, micro_batches)
    losses: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        last = i == len(micro_batches) - 1
        if seed is not None:
            seed(i)
        with nullcontext() if last else accelerator.no_sync(model):
            sums = task.losses(model, batch)
            # Data-parallel training averages gradients over ranks, but the sums have to be added up.
            means = {term: mean(value * accelerator.num_processes, counts[term]) for term, value in sums.items()}
            accelerator.backward(sum(means.values()))
        for term, value in means.items():
            losses[term] = losses.get(term, 0) + value.detach()
    limit = max_grad_norm or torch.inf
    norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), limit))
    if accelerator.scaler is None:  # a gradient scaler does the same check itself
        inner(optimizer).found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(losses, counts, norm)
