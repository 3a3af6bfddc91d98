"""The training loop of every recipe.

    micro-batches of a step -> count items over all of them and all ranks -> backward of sums / counts -> clip -> step

Counts come before losses: the normalisers (tokens, boxes, masked patches) of the whole optimizer step are known before
the first backward, and each sum of losses is divided once. So a step is the same, to rounding, however it is cut into
micro-batches and ranks.
"""

import signal
import threading
import time
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
from tqdm.auto import tqdm

from . import state as states
from .arguments import TrainingArguments
from .optim import average_weights, build_ema, build_optimizer, build_schedule
from .state import History, Progress

# Reading a number back makes the host wait for the device: on an accelerator the loop looks only this often at
# whether gradients were finite and whether a rank was asked to stop.
CHECK_STEPS = 10


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
    """Where steps come from: this rank's micro-batches of every step of an epoch, from step ``start`` on."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]: ...


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
        model, optimizer: prepared by the accelerator; the optimizer fused Adam or AdamW.
        micro_batches: this rank's, at least one (a rank without samples gives one that counts for nothing).
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it.
        counts: as `global_counts` gives them, where they are known already.
    """
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
        history: the rows of history.jsonl.
        stopped: it was asked to stop (SIGTERM) and has saved its state; the same command goes on.
    """

    progress: Progress
    history: list[dict[str, Any]]
    stopped: bool


class StopRequest:
    """Notices SIGTERM, a cluster's notice that the job ends soon; the loop then saves and returns."""

    def __init__(self):
        self.set = False

    def __enter__(self) -> "StopRequest":
        self.main_thread = threading.current_thread() is threading.main_thread()
        if self.main_thread:  # Python delivers signals nowhere else
            self.before = signal.signal(signal.SIGTERM, self.notice)
        return self

    def notice(self, *_: Any) -> None:
        self.set = True

    def __exit__(self, *_: Any) -> None:
        if self.main_thread:
            signal.signal(signal.SIGTERM, self.before)


class _Run:
    """One run of `train`: its objects, and what happens at the end of a step."""

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
        self.progress = Progress()
        self.keep = max(args.keep_checkpoints, args.average_checkpoints)
        if accelerator.is_main_process:
            states.require_room(self.output_dir, model, self.keep + 1, self.ema is not None)
        saved = states.checkpoints(self.output_dir)
        if saved:
            self.progress = states.load_checkpoint(
                accelerator, saved[-1], self.model, self.optimizer, self.schedule, self.ema
            )
        accelerator.wait_for_everyone()
        self.history = History(self.output_dir, self.progress.step) if accelerator.is_main_process else None
        self.window = {name: self.tensor(value) for name, value in self.progress.window.items()}
        self.streak = self.tensor(0.0)  # steps in a row that were not finite
        self.skipped = self.tensor(float(self.progress.skipped))
        self.items = self.tensor(float(self.progress.items))
        self.clock = time.perf_counter()

    def tensor(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)

    def add(self, name: str, value: Tensor) -> None:
        self.window[name] = self.window.get(name, 0) + value.double()

    def step(self, micro_batches: list[Any], stop: bool) -> Tensor:
        """Train on one step; returns on how many ranks a stop was asked for."""
        states.seed_step(self.args.seed, self.progress.step, self.accelerator.process_index)
        counts, stops = global_counts(self.accelerator, self.task, micro_batches, stop)
        result = train_step(
            self.accelerator, self.task, self.model, self.optimizer, micro_batches, self.args.max_grad_norm, counts
        )
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        bad = ~torch.isfinite(result.gradient_norm)
        self.streak = (self.streak + 1) * bad
        self.skipped += bad
        for term, loss in result.losses.items():
            self.add(f"loss/{term}", loss.where(~bad, 0.0))
        self.add("gradient_norm", result.gradient_norm.where(~bad, 0.0))
        self.add("items", result.counts[self.task.term])
        self.items += result.counts[self.task.term]
        self.add("steps", ~bad)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        return stops

    def check_finite(self) -> None:
        if self.streak.item() >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {int(self.streak)} steps in a row, up to step {self.progress.step} "
                f"(max_nonfinite_steps={self.args.max_nonfinite_steps}): lower learning_rate, raise warmup_steps, set "
                "max_grad_norm, or use another precision. The weights are those before the first of these steps"
            )

    def log(self, bar: tqdm) -> None:
        """Write the means since the last log line."""
        window = {name: value.item() for name, value in self.window.items()}
        losses = {n: v for n, v in window.items() if n.startswith("loss/")}
        if self.accelerator.num_processes > 1:
            reduced = self.accelerator.reduce({name: self.tensor(v) for name, v in losses.items()}, "mean")
            losses = {name: value.item() for name, value in reduced.items()}
        steps = max(window["steps"], 1.0)
        seconds = self.stop_clock()
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "loss": sum(losses.values()) / steps,
            "learning_rate": self.schedule.get_last_lr()[0],
            "gradient_norm": window["gradient_norm"] / steps,
            "skipped": int(self.skipped.item()),
            "items_per_second": window["items"] / seconds,
        }
        if len(losses) > 1:
            row |= {name: value / steps for name, value in losses.items()}
        self.window = {}
        self.write(row, bar)
        bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['items_per_second']:.0f} {self.task.item}/s")

    def stop_clock(self) -> float:
        """Seconds of training since the clock was last started; starts it again."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.clock
        self.progress.seconds += seconds
        self.clock = time.perf_counter()
        return seconds

    def write(self, row: dict[str, Any], bar: tqdm) -> None:
        if self.history is not None:
            self.history.add(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        numbers |= {f"evaluation/{k}": v for k, v in row.get("evaluation", {}).items()}
        self.accelerator.log(numbers, step=row["step"])

    def evaluate(self, score: Callable[[nn.Module], dict[str, float]], bar: tqdm) -> bool:
        """Evaluate, and say whether best_metric is better than ever."""
        self.stop_clock()
        shipped = self.ema.module if self.args.final_weights == "ema" else self.plain
        scores = score(shipped)
        self.write({"step": self.progress.step, "epoch": self.progress.epoch, "evaluation": scores}, bar)
        name = self.args.best_metric
        if name not in scores:
            raise ValueError(f'best_metric "{name}" is not evaluated; there are {", ".join(scores)}')
        progress, value = self.progress, scores[name]
        better = progress.best is None or (value < progress.best if name == "loss" else value > progress.best)
        if better:
            progress.best, progress.best_step, progress.waited = value, progress.step, 0
        else:
            progress.waited += 1
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
            bar.write(f"step {progress.step}: {shown}" + (" (best)" if better else ""))
        self.clock = time.perf_counter()
        return better

    def save(self) -> None:
        self.stop_clock()
        self.progress.window = {name: value.item() for name, value in self.window.items()}
        self.progress.skipped, self.progress.items = int(self.skipped.item()), int(self.items.item())
        states.save_checkpoint(
            self.accelerator, self.output_dir, self.progress, self.model, self.optimizer, self.schedule, self.ema
        )
        if self.accelerator.is_main_process:
            states.rotate(self.output_dir, self.keep, self.progress.best_step)
        self.clock = time.perf_counter()

    def end_of_step(self, score: Callable[[nn.Module], dict[str, float]], eval_steps: int, bar: tqdm) -> None:
        """Log, evaluate and save where it is time to."""
        step, args = self.progress.step, self.args
        last = step == self.num_steps
        if self.accelerator.device.type == "cpu" or step % CHECK_STEPS == 0 or last:
            self.check_finite()
        if step % args.log_steps == 0 or last:
            self.log(bar)
        better = (step % eval_steps == 0 or last) and self.evaluate(score, bar)
        if args.patience and self.progress.waited >= args.patience:
            self.progress.finished = True
        self.progress.finished |= last
        if better or step % (args.save_steps or eval_steps) == 0 or self.progress.finished:
            self.save()


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

    In the end the model holds the weights ``args.final_weights`` names.

    Args:
        num_steps: optimizer steps of the whole run; the schedule's length.
        eval_steps: steps between evaluations.
        score: model -> {metric: value}, with ``args.best_metric`` among them.

    Raises:
        FloatingPointError: too many steps in a row had a gradient that is not finite.
        OSError: a checkpoint could not be written.
    """
    run = _Run(accelerator, task, model, args, num_steps)
    progress, stopped = run.progress, False
    run.model.train()
    bar = tqdm(
        total=num_steps,
        initial=progress.step,
        desc="train",
        unit="step",
        disable=not (accelerator.is_main_process and args.progress),
        dynamic_ncols=True,
    )
    with StopRequest() as request, bar:
        while not (progress.finished or stopped):
            for micro_batches in loader.epoch(progress.epoch, progress.step_in_epoch):
                stops = run.step(micro_batches, request.set)
                run.end_of_step(score, eval_steps, bar)
                bar.update()
                if accelerator.num_processes == 1 or progress.step % CHECK_STEPS == 0:
                    stopped = bool(stops.item())
                if progress.finished or stopped:
                    break
            else:
                if progress.step_in_epoch == 0:
                    raise ValueError("the training data gave no step")
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    if stopped and not progress.finished:
        run.save()
    elif not stopped or progress.finished:
        take_final_weights(run)
    rows = run.history.rows if run.history else []
    return TrainingResult(progress, rows, stopped and not progress.finished)


def take_final_weights(run: _Run) -> None:
    """Put the weights that the run ships into its model."""
    args, output_dir = run.args, run.output_dir
    if args.final_weights == "best":
        states.load_weights(
            run.plain, states.checkpoint_path(output_dir, run.progress.best_step) / "model.safetensors"
        )
    elif args.final_weights == "average":
        states.set_weights(run.plain, average_weights(states.checkpoints(output_dir)[-args.average_checkpoints :]))
    elif args.final_weights == "ema":
        states.set_weights(run.plain, states.full_weights(run.ema.module))
