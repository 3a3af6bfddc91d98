"""The training loop of every recipe.

    micro-batches of a step -> count items over all of them and all ranks -> backward of sums / counts -> clip -> step

Counts come before losses: the normalisers (tokens, boxes, masked patches) of the whole optimizer step are known before
the first backward, and each sum of losses is divided once. So a step is the same, to rounding, however it is cut into
micro-batches and ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from . import folder as folders
from . import state as states
from .arguments import TrainingArguments
from .monitor import Monitor
from .optim import average_weights, build_ema, build_optimizer, build_schedule
from .state import Progress
from .stop import StopRequest

# Reading a number back makes the host wait for the device: on an accelerator the loop looks only after so many
# micro-batches whether gradients were finite and whether a rank was asked to stop.
LOOK_MICRO_BATCHES = 10

# fp16's loss scale starts at 2^16 and halves at every overflow: so many in a row are its search, not a divergence.
SCALE_SEARCH_STEPS = 16


class Task(Protocol):
    """What the loop needs to know of a task.

    ``count(batch)`` -> {term: items}, from the targets alone; ``losses(model, batch)`` -> {term: sum over items}.
    ``term`` names the main term, ``item`` what it counts.
    """

    item: str
    term: str

    def count(self, batch: Any) -> dict[str, int]: ...

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
    totals: dict[str, int] = {}
    for batch in micro_batches:
        for term, count in task.count(batch).items():
            totals[term] = totals.get(term, 0) + count
    numbers = torch.tensor([*totals.values(), int(flag)]).to(accelerator.device, non_blocking=True)
    numbers = accelerator.reduce(numbers, "sum")
    return dict(zip(totals, numbers[:-1], strict=True)), numbers[-1]


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
    if not states.inner(optimizer).defaults.get("fused"):
        raise ValueError(
            f"optimizer must be made with fused=True, got {type(states.inner(optimizer)).__name__} without"
        )
    if counts is None:
        counts, _ = global_counts(accelerator, task, micro_batches)
    losses = {term: torch.zeros((), device=accelerator.device) for term in counts}
    for i, batch in enumerate(micro_batches):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            sums = task.losses(model, batch)
            # Data-parallel training averages gradients over ranks; the sums need adding up.
            means = {
                term: value * accelerator.num_processes / counts[term].clamp_min(1) for term, value in sums.items()
            }
            accelerator.backward(sum(means.values()))
        for term, value in means.items():
            losses[term] += value.detach()
    limit = max_grad_norm or torch.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    if accelerator.scaler is None:  # a loss scaler makes the same check itself
        states.inner(optimizer).found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(losses, counts, norm)


@torch.no_grad()
def evaluate(accelerator: Accelerator, task: Task, model: nn.Module, loader: Loader) -> dict[str, float]:
    """Mean of each loss term over a data set, exact over uneven ranks; ``loss`` is their sum."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    training = model.training
    model.eval()
    for micro_batches in loader.epoch(0):
        for batch in micro_batches:
            for term, count in task.count(batch).items():
                counts[term] = counts.get(term, 0) + count
            for term, value in task.losses(model, send_to_device(batch, accelerator.device)).items():
                sums[term] = sums.get(term, 0) + value.double()
    model.train(training)
    totals = accelerator.reduce(
        {term: torch.stack([sums[term], sums[term].new_tensor(counts[term])]) for term in sums}
    )
    means = {term: (total / count.clamp_min(1)).item() for term, (total, count) in totals.items()}
    return {"loss": sum(means.values()), **(means if len(means) > 1 else {})}


@dataclass
class TrainingResult:
    """How a run ended.

    Args:
        progress: where it stands.
        epochs: passes over the training data; of a stream, whole ones.
        stopped: it was asked to stop (SIGTERM) and has saved its state; the same command goes on.
    """

    progress: Progress
    epochs: float
    stopped: bool


class _Run:
    """One run of `train`: its objects, and what happens in and after a step."""

    def __init__(
        self, accelerator: Accelerator, task: Task, model: nn.Module, args: TrainingArguments, num_steps: int
    ):
        self.accelerator, self.task, self.args, self.num_steps = accelerator, task, args, num_steps
        self.output_dir = Path(args.output_dir)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if args.compile:
            model.compile(dynamic=True)
        self.plain = model
        optimizer = build_optimizer(model, args)
        self.schedule = build_schedule(optimizer, args, num_steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = build_ema(model, args.ema_decay) if args.ema_decay else None
        self.keep = max(args.keep_checkpoints, args.average_checkpoints)
        if accelerator.is_main_process:
            states.clean(self.output_dir)
            to_come = max(1, self.keep + 2 - len(states.checkpoints(self.output_dir)))  # with the best and the next
            folders.require_room(self.output_dir, model, to_come, self.ema is not None)
        accelerator.wait_for_everyone()
        self.progress = Progress()
        if saved := states.checkpoints(self.output_dir):
            self.progress = states.load_checkpoint(
                accelerator, saved[-1], self.model, self.optimizer, self.schedule, self.ema
            )
        self.saved_step = self.progress.step
        self.monitor = Monitor(accelerator, args, num_steps, self.progress, task.item)
        self.unseen = 0  # micro-batches since the last look
        self.stopped = False

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or evaluations have not become better for long enough."""
        return self.progress.step >= self.num_steps or 0 < self.args.patience <= self.progress.waited

    def step(self, micro_batches: list[Any], stop: bool) -> None:
        """Train on one step; ``stop``: this rank was asked to stop."""
        states.seed_step(self.args.seed, self.progress.step, self.accelerator.process_index)
        counts, stops = global_counts(self.accelerator, self.task, micro_batches, stop)
        result = train_step(
            self.accelerator, self.task, self.model, self.optimizer, micro_batches, self.args.max_grad_norm, counts
        )
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        self.monitor.add(result.losses, result.gradient_norm, result.counts[self.task.term])
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self.unseen += len(micro_batches)
        on_host = self.accelerator.device.type == "cpu"
        if on_host or self.unseen >= LOOK_MICRO_BATCHES or self.finished:
            self.unseen = 0
            self.check_finite()
            self.stopped = bool(stops.item())
        if self.accelerator.num_processes == 1:
            self.stopped = stop

    def check_finite(self) -> None:
        """Raise once too many gradients in a row were not finite."""
        limit = self.args.max_nonfinite_steps + (SCALE_SEARCH_STEPS if self.accelerator.scaler else 0)
        streak = int(self.monitor.streak.item())
        if streak >= limit:
            raise FloatingPointError(
                f"the gradient was not finite in {streak} steps in a row, up to step {self.progress.step} "
                f"(max_nonfinite_steps={self.args.max_nonfinite_steps}): lower learning_rate, raise warmup_steps, set "
                "max_grad_norm, or use another precision. The weights are those before the first of these steps"
            )

    def end_of_step(self, score: Callable[[nn.Module], dict[str, float]], eval_steps: int) -> None:
        """Log, evaluate and save where it is time to."""
        step, args = self.progress.step, self.args
        last = step == self.num_steps
        if step % args.log_steps == 0 or last:
            self.monitor.log(self.schedule.get_last_lr()[0])
        better = (step % eval_steps == 0 or last) and self.evaluate(score)
        if better or step % (args.save_steps or eval_steps) == 0 or self.finished:
            self.save()

    def evaluate(self, score: Callable[[nn.Module], dict[str, float]]) -> bool:
        """Evaluate, and say whether best_metric is better than ever."""
        with self.monitor.paused():
            scores = score(self.ema.module if self.args.final_weights == "ema" else self.plain)
        name, progress = self.args.best_metric, self.progress
        self.monitor.write({"step": progress.step, "epoch": progress.epoch, "evaluation": scores})
        if name not in scores:
            raise ValueError(f'best_metric "{name}" is not evaluated; there are {", ".join(scores)}')
        value = scores[name]
        better = not math.isnan(value) and (
            progress.best is None or (value < progress.best if name == "loss" else value > progress.best)
        )
        if better:
            progress.best, progress.best_step, progress.waited = value, progress.step, 0
        else:
            progress.waited += 1
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
        self.monitor.say(f"step {progress.step}: {shown}" + (" (best)" if better else ""))
        return better

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self.saved_step == self.progress.step:
            return
        self.monitor.record()
        with self.monitor.paused():
            states.save_checkpoint(
                self.accelerator, self.output_dir, self.progress, self.model, self.optimizer, self.schedule, self.ema
            )
            if self.accelerator.is_main_process:
                states.rotate(self.output_dir, self.keep, self.progress.best_step)
        self.saved_step = self.progress.step


def train(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    loader: Loader,
    args: TrainingArguments,
    num_steps: int,
    eval_steps: int,
    score: Callable[[nn.Module], dict[str, float]],
) -> TrainingResult:
    """Train until ``num_steps``, early stopping or SIGTERM; go on from the last checkpoint in ``args.output_dir``.

    SIGTERM ends the run after the step that is under way, and after the evaluation if one is. In the end the model
    holds the weights ``args.final_weights`` names, and computes in their own precision.

    Args:
        num_steps: optimizer steps of the whole run; the schedule's length.
        eval_steps: steps between evaluations.
        score: model -> {metric: value}, with ``args.best_metric`` among them.

    Raises:
        FloatingPointError: too many steps in a row had a gradient that is not finite.
        OSError: a checkpoint could not be written.
        ValueError: the checkpoint is of another model, or the loader gives no step.
    """
    run = _Run(accelerator, task, model, args, num_steps)
    progress = run.progress
    run.model.train()
    with StopRequest() as request, run.monitor.bar as bar:
        while not (run.finished or run.stopped):
            for micro_batches in loader.epoch(progress.epoch, progress.step_in_epoch):
                run.step(micro_batches, request.set)
                run.end_of_step(score, eval_steps)
                bar.update()
                if run.finished or run.stopped:
                    break
            else:
                if progress.step_in_epoch == 0:
                    raise ValueError("the training data gave no step")
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    stopped = not run.finished
    if stopped:
        run.save()
    else:
        accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)  # takes autocast off the model
        take_final_weights(run)
    steps = loader.steps_per_epoch(progress.epoch)
    return TrainingResult(progress, progress.epoch + (progress.step_in_epoch / steps if steps else 0.0), stopped)


def take_final_weights(run: _Run) -> None:
    """Put the weights that the run ships into its model."""
    args, output_dir, best_step = run.args, run.output_dir, run.progress.best_step
    if args.final_weights == "best" and best_step is None:
        run.monitor.say(f"no evaluation gave a {args.best_metric} that is a number: the last weights are taken")
    elif args.final_weights == "best":
        states.load_weights(run.plain, states.checkpoint_path(output_dir, best_step) / states.MODEL_FILE)
    elif args.final_weights == "average":
        states.set_weights(run.plain, average_weights(states.checkpoints(output_dir)[-args.average_checkpoints :]))
    elif args.final_weights == "ema":
        states.set_weights(run.plain, states.full_weights(run.ema.module))
