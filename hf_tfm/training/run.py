"""The frame around `train`: an accelerator, a folder that belongs to the run, and in the end a model with its card."""

import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers.utils import CONFIG_NAME, cached_file

from ..data.source import STREAM
from ..hub.card import write_card
from ..hub.cost import Cost
from ..hub.results import Distillation, RunRecord, collect_versions, describe_hardware
from .arguments import TrainingArguments
from .folder import claim, explain_write_errors
from .loop import Task
from .session import TrainingResult
from .state import checkpoints
from .stop import end_politely

# Knobs that change nothing about the weights of a given step, nor which is best: a run may go on with others.
FREE = {
    *("output_dir", "overwrite_output_dir", "run_name", "trackers", "progress", "log_steps", "license"),
    *("num_workers", "micro_batch_tokens", "micro_batch_size", "gradient_checkpointing", "max_nonfinite_steps"),
    *("eval_steps", "save_steps", "patience", "keep_checkpoints", "average_checkpoints"),
    *("final_weights", "num_pictures", "test_splits", "metrics", "num_beams", "length_penalty", "iterations"),
    *("costs", "teacher_device", "expected_score"),
}


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of a run: precision and trackers from the knobs, the rest from the launcher.

    From here on SIGTERM ends the process with exit status 0, see `stop.end_politely`.

    Raises:
        ValueError: the device does not know the precision, or a model to start from is not there.
    """
    for knob in ("init_from", "teacher"):
        if source := getattr(args, knob, None):
            require_model(knob, source)
    end_politely()
    accelerator = Accelerator(
        mixed_precision=args.precision,
        log_with=list(args.trackers) or None,
        project_dir=args.output_dir,
        # Buffers are fixed tables here; sending them round at every forward would be waste.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        step_scheduler_with_optimizer=False,
    )
    if args.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would take float32 without a word
        raise ValueError('precision="fp16" needs an accelerator; on a CPU use "bf16" or "no"')
    return accelerator


def require_model(knob: str, source: str, revision: str | None = None) -> None:
    """Look whether a model, a folder or Hub id, is there.

    Raises:
        ValueError: it is not; the message names the knob.
    """
    if not Path(source).is_dir():
        try:
            cached_file(source, CONFIG_NAME, revision=revision)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f'{knob} "{source}" is no folder, and not to be had from the Hub: {reason}') from error


@dataclass
class Run:
    """A run and its folder; see `open_run`."""

    accelerator: Accelerator
    args: TrainingArguments
    task: str
    data: dict[str, Any]
    command: str
    started: str

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def once(self, name: str, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
        """An object with ``save_pretrained`` that is made once a run, and loaded by other processes and on resume."""
        folder = self.output_dir / name
        if self.accelerator.is_main_process and not folder.is_dir():
            made = make()
            part = folder.with_name(f".part-{name}")
            with explain_write_errors(folder):
                made.save_pretrained(part)
                part.rename(folder)
        self.accelerator.wait_for_everyone()
        return load(folder)

    def stopped(self, result: TrainingResult) -> int:
        """Say how to go on; the exit status."""
        self.accelerator.print(
            f"asked to stop: state saved at step {result.progress.step} in {self.output_dir}; the same command goes on"
        )
        self.accelerator.end_training()
        return 0


def open_run(
    accelerator: Accelerator,
    args: TrainingArguments,
    task: str,
    data: dict[str, Any],
    recipe: str,
    argv: Sequence[str],
) -> Run:
    """Claim ``args.output_dir``, for a new run or to go on with the same one, and start the trackers.

    Args:
        task: what the model is trained for, as the Hub calls it, say "translation".
        data: see `hub.results.Data`; its ``fingerprint`` is part of what makes this run itself.
        recipe, argv: the recipe's name and the words of its command line.

    Raises:
        ValueError: the folder holds another run or other files.
        WriteError: the folder cannot be written.
    """
    free = FREE | ({"num_steps", "num_epochs"} if args.schedule in ("inverse_sqrt", "constant") else set())
    knobs = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    if accelerator.is_main_process:
        identity = {"task": task, **knobs, "data": data["fingerprint"]}
        if f"'{STREAM}'" in str(data["fingerprint"]):  # what is not read beforehand is known by its commit alone
            identity["revision"] = data.get("revision")
        again = claim(Path(args.output_dir), identity, args.overwrite_output_dir)
        if again and (saved := checkpoints(Path(args.output_dir))):
            accelerator.print(f"going on from {saved[-1]}")
    accelerator.wait_for_everyone()
    if args.trackers:
        name = args.run_name or Path(args.output_dir).name
        options = {kind: {"name": name} for kind in args.trackers if kind in ("wandb", "trackio")}
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in knobs.items()}
        accelerator.init_trackers("hf-tfm", config=flat, init_kwargs=options)
    return Run(accelerator, args, task, data, repeat_command(accelerator.num_processes, recipe, argv), now())


def repeat_command(processes: int, recipe: str, argv: Sequence[str]) -> str:
    """The line that runs a recipe again, on as many processes."""
    words = ["run", recipe, *argv]
    if processes == 1:
        return shlex.join(["hf-tfm", *words])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    size = ["--nnodes", str(processes // local)] * (local < processes) + ["--nproc_per_node", str(local)]
    return shlex.join(["python", "-m", "torch.distributed.run", *size, "-m", "hf_tfm.cli", *words])


def now() -> str:
    """Date and time, ISO 8601 with time zone."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def finish(
    run: Run,
    model: nn.Module,
    processor: Any,
    task: Task,
    result: TrainingResult,
    metrics: list[dict[str, Any]],
    costs: list[Cost] | None = None,
    distillation: Distillation | None = None,
) -> RunRecord:
    """Save model, processor, results.json and card in the run's folder; print the results.

    Args:
        processor: the tokenizer or image processor that belongs to the model.
        metrics: rows of name, value, split and signature.
        costs: of the model and those it is compared with.
        distillation: what it learned from.

    Raises:
        WriteError: something could not be written.
    """
    accelerator, args, progress = run.accelerator, run.args, result.progress
    record = RunRecord(
        task=run.task,
        model_type=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        base_model=getattr(args, "init_from", None),
        data=run.data,
        arguments=dataclasses.asdict(args),
        command=run.command,
        metrics=metrics,
        training={
            "steps": progress.step,
            "epochs": round(result.epochs, 3),
            "seconds": round(progress.seconds, 1),
            "items_per_second": round(progress.items / max(progress.seconds, 1e-9), 1),
            "item": task.item,
            "skipped_steps": progress.skipped,
            "best": {"metric": args.best_metric, "value": progress.best, "step": progress.best_step},
            "weights": args.final_weights,
        },
        versions=collect_versions(),
        hardware=describe_hardware(accelerator.device, accelerator.num_processes),
        costs=costs,
        distillation=distillation,
        started=run.started,
        finished=now(),
    )
    if accelerator.is_main_process:
        with explain_write_errors(run.output_dir):
            model.save_pretrained(run.output_dir)
            processor.save_pretrained(run.output_dir)
            record.save(run.output_dir)
            write_card(run.output_dir, record)
    accelerator.wait_for_everyone()
    print_table(accelerator, record)
    accelerator.end_training()
    return record


def print_table(accelerator: Accelerator, record: RunRecord) -> None:
    """The results as a table on the main process."""
    rows = [(m["split"], m["name"], f"{m['value']:.4g}") for m in record.metrics]
    minutes = record.training["seconds"] / 60
    rows += [
        ("train", "minutes", f"{minutes:.1f}"),
        ("train", f"{record.training['item']}/s", f"{record.training['items_per_second']:.0f}"),
    ]
    width = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        accelerator.print(f"  {row[0]:<{width[0]}}  {row[1]:<{width[1]}}  {row[2]:>{width[2]}}")
