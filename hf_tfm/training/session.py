"""Training loop, with logging, evaluation and checkpointing.

latest checkpoint, if any -> step -> log? -> save? -> evaluate? -> step -> ... -> final weights
"""

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import TrainingArguments
from ..data.batching import MicroBatches
from ..hub.results import read_history
from ..sharding import prepare_sharded, shard, sharding_options, unshard, unsharded
from ..tasks.base import Loader
from . import checkpoint as states
from . import folder as folders
from .checkpoint_writer import CheckpointWriter, is_shared
from .loop import StatefulTask, global_counts, train_step
from .monitor import Monitor
from .optim import average_weights, build_ema, build_optimizer, build_schedule
from .ranks import on_main
from .sigterm import Interrupted, StopRequest

# Reading a value back synchronises host and device. On an accelerator the loop therefore checks only once in this many
# micro-batches whether gradients were finite and whether a rank was asked to stop.
LOOK_MICRO_BATCHES = 10

# The fp16 loss scale starts at 2^16 and halves at every overflow: this many non-finite steps are its warm-up.
SCALE_SEARCH_STEPS = 16

Score = Callable[[nn.Module], dict[str, float]]
Show = Callable[[nn.Module, int], object]


class StepCallback(Protocol):
    """Work before training steps that is part of the training itself, such as gradual pruning.

    ``before_step(step)`` is called before every optimizer step with the number of completed ones; its effects must be
    part of the model's state, so that a resumed run is the same. ``may_select(step)`` is True if the weights after
    ``step`` steps may be selected as the best ones.
    """

    def before_step(self, step: int) -> None: ...

    def may_select(self, step: int) -> bool: ...


@dataclass
class TrainingResult:
    """Outcome of a run.

    Args:
        progress: state of the run.
        epochs: passes over the training data; whole passes only for a stream.
        stopped: the run received SIGTERM and saved its state; the same command resumes it.
    """

    progress: states.Progress
    epochs: float
    stopped: bool


class Session:
    """State of one call of `train`: its objects, and the work in and after each step."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: StatefulTask,
        model: nn.Module,
        args: TrainingArguments,
        max_steps: int,
        score: Score,
        eval_steps: int,
        show: Show | None = None,
        callback: StepCallback | None = None,
    ):
        self.callback = callback
        self.accelerator, self.task, self.args, self.max_steps = accelerator, task, args, max_steps
        self.score, self.eval_steps, self.show = score, eval_steps, show
        self.output_dir = Path(args.output_dir)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        if args.torch_compile:
            model.compile(dynamic=True)
        self.plain = model
        options = sharding_options(accelerator, args.fsdp)
        self.ema = None
        if args.ema_decay and options is not None:  # a sharded model cannot be copied
            self.ema = build_ema(model, args.ema_decay)
            shard(self.ema.module, **options)
        self.model, self.optimizer = prepare(accelerator, model, args, options)
        if args.ema_decay and options is None:  # on the device
            self.ema = build_ema(model, args.ema_decay)
        self.schedule = build_schedule(states.inner(self.optimizer), args, max_steps)
        self.keep = max(args.save_total_limit, args.average_checkpoints)

        def prepare_folder() -> None:
            states.clean(self.output_dir)
            to_come = checkpoints_to_come(args, max_steps, eval_steps)
            folders.require_room(self.output_dir, model, to_come, self.ema is not None)

        on_main(accelerator, prepare_folder)
        shortened = args.lr_scheduler_type in (
            "inverse_sqrt",
            "constant",
        )  # schedules that do not depend on max_steps
        self.progress = states.resume(
            accelerator,
            self.output_dir,
            None if shortened else max_steps,
            self.model,
            self.optimizer,
            self.schedule,
            self.ema,
            task.load_state,
        )
        best = self.progress.best_step
        if best is not None and not on_main(
            accelerator, lambda: states.checkpoint_path(self.output_dir, best).is_dir()
        ):
            accelerator.print(f"the best weights, of step {best}, are lost: the best weights are chosen from here on")
            self.progress.best = self.progress.best_step = None
        self.saved_step = self.progress.step
        shards = options is not None and is_shared(accelerator, self.output_dir)
        self.writer = CheckpointWriter(accelerator, self.output_dir, shards, args.ddp_timeout)
        self.monitor = Monitor(accelerator, args, max_steps, self.progress, task.item, task.statistics)
        self.unseen = 0  # micro-batches since the last check
        self.stopped = self.interrupted = False
        self.expired = self.progress.seconds >= self.monitor.limit or task.out_of_budget

    @property
    def out_of_budget(self) -> bool:
        """True if the training time, or the task's own budget, is used up."""
        return self.monitor.seconds >= self.monitor.limit or self.task.out_of_budget

    @property
    def finished(self) -> bool:
        """True if all steps are done, or the budget is used up, and the last one is evaluated, or early stopping
        applies."""
        done = (self.progress.step >= self.max_steps or self.expired) and not self.progress.pending
        return done or 0 < self.args.early_stopping_patience <= self.progress.waited

    def step(self, micro_batches: list[Any], stop: bool) -> None:
        """Run one training step; ``stop`` is True if this rank was asked to stop."""
        if self.callback is not None:
            self.callback.before_step(self.progress.step)
        first, position = self.accelerator.process_index * len(micro_batches), None
        numbers: Sequence[int] = range(first, first + len(micro_batches))
        if isinstance(micro_batches, MicroBatches):
            numbers, position = micro_batches.numbers, micro_batches.position
        flags = (stop, self.out_of_budget, self.writer.error is not None)
        counts, ranks = global_counts(self.accelerator, self.task, micro_batches, flags)
        result = train_step(
            self.accelerator,
            self.task,
            self.model,
            self.optimizer,
            micro_batches,
            self.args.max_grad_norm,
            counts,
            seed=lambda i: states.seed_micro_batch(self.args.seed, self.progress.step, numbers[i]),
        )
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        self.monitor.add(result.losses, result.gradient_norm, result.counts[self.task.term])
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self.progress.stream = position
        self.unseen += len(micro_batches)
        on_host, failed = self.accelerator.device.type == "cpu", False
        if on_host or self.unseen >= LOOK_MICRO_BATCHES or self.progress.step == self.max_steps:
            self.unseen = 0
            self.check_finite()
            self.stopped, self.expired, failed = (count > 0 for count in ranks.tolist())
        if self.accelerator.num_processes == 1:
            self.stopped, self.expired, failed = flags
        if failed:
            self.writer.wait()  # raises the error on all processes

    def check_finite(self) -> None:
        """Raise FloatingPointError after too many consecutive non-finite gradients."""
        limit = self.args.max_nonfinite_steps + (SCALE_SEARCH_STEPS if self.accelerator.scaler else 0)
        streak = int(self.monitor.streak.item())
        if streak >= limit:
            raise FloatingPointError(
                f"the gradient was not finite in {streak} steps in a row, up to step {self.progress.step} "
                f"(max_nonfinite_steps={self.args.max_nonfinite_steps}): lower learning_rate, raise warmup_steps, set "
                "max_grad_norm, or use another precision. The weights are those before the first of these steps"
            )

    def end_of_step(self, request: StopRequest) -> None:
        """Log, evaluate and save if they are due."""
        step = self.progress.step
        last = step == self.max_steps or self.expired
        if step % self.args.logging_steps == 0 or last:
            self.monitor.log(float(max(self.schedule.get_last_lr())))
        self.progress.pending = step % self.eval_steps == 0 or last
        self.evaluate_and_save(request)

    def evaluate_and_save(self, request: StopRequest) -> None:
        """Run a pending evaluation, and save if due.

        The checkpoint is written during the evaluation, and gets its result afterwards: SIGTERM during an evaluation
        loses no step, a kill only while the checkpoint is being written, and the next run repeats the evaluation.
        """
        better = False
        if self.progress.pending:
            if self.saved_step != self.progress.step:
                self.write()
            if self.stopped:
                return
            try:
                better = self.evaluate(request)
            except Interrupted:
                self.stopped = self.interrupted = True
                return
            self.progress.pending = False
            planned = better or self.progress.step % (self.args.save_steps or self.eval_steps) == 0 or self.finished
            self.save(planned)
        elif self.args.save_steps and self.progress.step % self.args.save_steps == 0:
            self.save()

    def evaluate(self, request: StopRequest) -> bool:
        """Evaluate; return True if metric_for_best_model improved.

        Raises:
            Interrupted: SIGTERM arrived.
        """
        average = self.ema if self.args.final_weights == "ema" else None
        source = self.plain if average is None else average.module
        states.share_statistics(self.accelerator, source)
        with self.monitor.paused(), unsharded(self.plain, source) as model, request.at_once():
            scores = self.score(model)
            if self.show is not None:
                self.show(model, self.progress.step)
        name, progress = self.args.metric_for_best_model, self.progress
        self.monitor.write({"step": progress.step, "epoch": progress.epoch, "evaluation": scores})
        if name not in scores:
            raise ValueError(f'metric_for_best_model "{name}" is not evaluated; available: {", ".join(scores)}')
        value = scores[name]
        eligible = self.callback is None or self.callback.may_select(progress.step)
        better = (
            eligible
            and math.isfinite(value)
            and (progress.best is None or (value < progress.best if name == "loss" else value > progress.best))
        )
        if better:
            progress.best, progress.best_step, progress.waited = value, progress.step, 0
        else:
            progress.waited += 1
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
        self.monitor.say(f"step {progress.step}: {shown}" + (" (best)" if better else ""))
        return better

    def save(self, planned: bool = True) -> None:
        """Write a checkpoint of this step, and then delete those that are no longer needed.

        Args:
            planned: False for one that the next save deletes, see `Progress.unplanned`.
        """
        progress = self.progress
        before, progress.unplanned = progress.unplanned, progress.unplanned if planned else progress.step
        self.write()
        keep, best_step, step = self.keep, progress.best_step, progress.step

        def delete_old() -> None:
            if before is not None and before != step:
                states.discard(states.checkpoint_path(self.output_dir, before))
            if planned:
                states.rotate(self.output_dir, keep, best_step)

        self.writer.submit(delete_old)

    def write(self) -> None:
        """Begin to write a checkpoint of this step; only its progress if the rest is saved already."""
        progress = self.progress
        if self.saved_step == progress.step:
            self.writer.update(progress)
            return
        self.monitor.record()
        states.share_statistics(self.accelerator, self.plain)
        with self.monitor.paused():
            self.writer.save(progress, self.model, self.optimizer, self.schedule, self.ema, self.task.state())
        self.saved_step = progress.step


def prepare(
    accelerator: Accelerator, model: nn.Module, args: TrainingArguments, options: dict[str, Any] | None
) -> tuple[nn.Module, Optimizer]:
    """Return a model, in data parallel or sharded in place, and its optimizer, both prepared for `train_step`.

    Args:
        options: see `sharding.sharding_options`.
    """
    if options is None:
        return accelerator.prepare(model, build_optimizer(model, args))
    sharded = prepare_sharded(accelerator, model, options)
    return sharded, accelerator.prepare_optimizer(build_optimizer(model, args))


def checkpoints_to_come(args: TrainingArguments, max_steps: int, eval_steps: int) -> int:
    """Count the checkpoints that a run writes before it deletes one: at most those kept, the best and the next, and
    with ``save_steps`` one between planned ones.

    Args:
        max_steps, eval_steps: see `train`.
    """
    keep = max(args.save_total_limit, args.average_checkpoints)
    made = math.ceil(max_steps / eval_steps) + (math.ceil(max_steps / args.save_steps) if args.save_steps else 0)
    return max(1, min(keep + 2 + bool(args.save_steps), made) - len(states.checkpoints(Path(args.output_dir))))


def train(
    accelerator: Accelerator,
    task: StatefulTask,
    model: nn.Module,
    loader: Loader,
    args: TrainingArguments,
    max_steps: int,
    eval_steps: int,
    score: Score,
    show: Show | None = None,
    callback: StepCallback | None = None,
) -> TrainingResult:
    """Train until ``max_steps``, ``args.max_minutes``, early stopping or SIGTERM; resume from the last checkpoint in
    ``args.output_dir``.

    SIGTERM ends the run after the current step. It also aborts an evaluation, which the resumed run repeats. At the
    end the model holds the weights selected by ``args.final_weights`` and no longer runs under autocast.

    Args:
        max_steps: optimizer steps of the whole run, which is also the length of the schedule.
        eval_steps: steps between evaluations.
        score: model -> {metric: value}; must include ``args.metric_for_best_model``.
        show: called with the model and the step at every evaluation, on all processes, for example to plot images.
        callback: see `StepCallback`.

    Raises:
        FloatingPointError: too many consecutive steps had a non-finite gradient, or nothing was learned.
        OSError: a checkpoint could not be written.
        ValueError: the checkpoint belongs to another model, or the loader yields no step.
    """
    session = Session(accelerator, task, model, args, max_steps, score, eval_steps, show, callback)
    progress = session.progress
    session.model.train()
    with session.writer:
        with StopRequest(on_main(accelerator, lambda: uuid.uuid4().hex)) as request, session.monitor.bar as bar:
            if progress.pending:
                session.evaluate_and_save(request)
            while not (session.finished or session.stopped):
                for micro_batches in loader.epoch(progress.epoch, progress.stream or progress.step_in_epoch):
                    session.step(micro_batches, request.set)
                    session.end_of_step(request)
                    bar.update()
                    if session.finished or session.stopped:
                        break
                else:
                    if progress.step_in_epoch == 0:
                        raise ValueError("the training data gave no step")
                    progress.epoch, progress.step_in_epoch, progress.stream = progress.epoch + 1, 0, None
        stopped = not session.finished
        if stopped and session.saved_step != progress.step:
            session.save(planned=False)
        session.writer.wait(shared=not session.interrupted)  # ranks that left a collective cannot communicate
    if not stopped:
        accelerator.unwrap_model(session.model, keep_fp32_wrapper=False)  # removes autocast from the model's forward
        on_main(accelerator, lambda: check_learned(session))
        take_final_weights(session)
        unshard(session.plain)
    steps = loader.steps_per_epoch(progress.epoch)
    return TrainingResult(progress, progress.epoch + (progress.step_in_epoch / steps if steps else 0.0), stopped)


def check_learned(session: Session) -> None:
    """Refuse a run in which nothing was learned; its checkpoints are kept.

    Raises:
        FloatingPointError: no step changed the weights, or the last validation loss is not finite.
    """
    progress, folder = session.progress, session.output_dir
    if progress.skipped >= progress.step:
        raise FloatingPointError(
            f"nothing was learned: the gradient was not finite in any of the {progress.step} steps, so the weights "
            "never changed. Look for values that are not finite in the data, mean or std, lower learning_rate, or use "
            "another precision"
        )
    losses = [row["evaluation"]["loss"] for row in read_history(folder) if "loss" in row.get("evaluation", {})]
    if losses and not math.isfinite(losses[-1]):
        raise FloatingPointError(
            f"the validation loss is {losses[-1]} after the last of {progress.step} steps, so no model is saved; "
            f"checkpoints are in {folder}: lower learning_rate, or look for such values in the validation data"
        )


def take_final_weights(session: Session) -> None:
    """Load the weights selected by ``final_weights`` into the model.

    Raises:
        ValueError: a checkpoint with them is damaged.
    """
    args, output_dir, best_step = session.args, session.output_dir, session.progress.best_step
    if args.final_weights == "best" and best_step is None:
        session.monitor.say(
            f"no evaluation gave a {args.metric_for_best_model} that is a number: the last weights are taken"
        )
    elif args.final_weights == "best" and best_step is not None:
        best = states.checkpoint_path(output_dir, best_step)
        read = partial(states.read_weights, best, session.plain)
        states.set_weights(session.plain, states.shared_weights(session.accelerator, read))
    elif args.final_weights == "average":

        def average() -> dict[str, Tensor]:
            return average_weights(states.checkpoints(output_dir)[-args.average_checkpoints :])

        states.set_weights(session.plain, states.shared_weights(session.accelerator, average))
    elif args.final_weights == "ema" and session.ema is not None:
        session.plain.load_state_dict(session.ema.module.state_dict())  # on every rank, sharded alike
