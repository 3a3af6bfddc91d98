"""The frame around `train`: an accelerator, a folder that belongs to the run, and in the end a model with its card."""

import dataclasses
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, cached_file

from ..arguments import TrainingArguments
from ..data.source import STREAM
from ..finite import check_finite, first_not_finite
from ..hub.card import metadata, write_card
from ..hub.cost import Cost
from ..hub.pretrained import check_kind
from ..hub.results import Distillation, RunRecord, collect_versions, describe_hardware
from ..options import parse_arguments
from .checkpoint import checkpoints
from .folder import explain_write_errors
from .loop import Task
from .ranks import on_main
from .run_folder import Lock, RunFolder, check_inputs, check_place, place_new
from .session import TrainingResult, train
from .sigterm import install_sigterm_handler
from .threads import limit_threads, threads_restored

# Knobs that change nothing about the weights of a given step, nor which is best: a run may go on with others.
FREE = {
    *("output_dir", "overwrite_output_dir", "run_name", "report_to", "progress", "logging_steps", "license"),
    *(
        "dataloader_num_workers",
        "micro_batch_tokens",
        "micro_batch_size",
        "gradient_checkpointing",
        "max_nonfinite_steps",
    ),
    *("max_bad_images", "trust_remote_code"),
    *("eval_steps", "save_steps", "early_stopping_patience", "save_total_limit", "average_checkpoints"),
    *("final_weights", "num_pictures", "test_splits", "metrics", "num_beams", "length_penalty", "iterations"),
    *("costs", "teacher_device", "expected_score"),
}


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of a run: precision and trackers from the knobs, the rest from the launcher.

    From here on SIGTERM ends the process with exit status 0, see `stop.install_sigterm_handler`.

    Raises:
        ValueError: the device does not know the precision, or a model to start from is missing or of another kind.
    """
    for knob in ("model_name_or_path", "teacher"):
        if source := getattr(args, knob, None):
            require_model(knob, source)
            check_kind(knob, source, getattr(args, "fitting", {}).get(knob), args.trust_remote_code)
    if source := getattr(args, "tokenizer", None):
        require_model("tokenizer", source, files=(TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, CONFIG_NAME))
    install_sigterm_handler()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        # Buffers are fixed tables here; sending them round at every forward would be waste.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        step_scheduler_with_optimizer=False,
    )
    if (
        args.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate would take float32 without a word
        raise ValueError('mixed_precision="fp16" needs an accelerator; on a CPU use "bf16" or "no"')
    return accelerator


def require_model(
    argument: str, source: str, revision: str | None = None, files: Sequence[str] = (CONFIG_NAME,)
) -> None:
    """Check that a model or tokenizer, a local folder or Hub id, exists.

    Args:
        argument: its name, for the error.
        files: of which it has one on the Hub.

    Raises:
        ValueError: it does not exist.
    """
    if Path(source).is_dir():
        return
    for file in files:
        try:
            cached_file(source, file, revision=revision)
            return
        except OSError as error:
            missing = error
    reason = str(missing).splitlines()[0]
    raise ValueError(
        f'{argument} "{source}" is neither a local folder nor to be found on the Hub: {reason}'
    ) from missing


class Run:
    """A run of a recipe and its folder, from the first check to the card; see `begin_run`.

    Args:
        args: of the recipe.
        recipe, argv: the recipe's name and the words of its command line.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, recipe: str, argv: Sequence[str]):
        self.accelerator, self.args = accelerator, args
        self.command, self.started = repeat_command(accelerator.num_processes, recipe, argv), now()
        argument = "cache" if getattr(args, "write_cache", False) else "output_dir"
        self.lock = Lock(Path(getattr(args, argument)), argument)
        self.folder: RunFolder | None = None  # of the main process
        self.task, self.data, self.again = "", {}, False

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def open(self, args: TrainingArguments, task: str, data: dict[str, Any], decisive: str | None = None) -> None:
        """Look whether ``args.output_dir`` is free for this run, or holds it already; nothing is changed there.

        A run that writes a cache has no output folder to look at.

        Args:
            args: of the recipe, completed by what the data decides.
            task: what the model is trained for, as the Hub calls it, say "translation".
            data: see `hub.results.Data`; its ``fingerprint`` is part of what makes this run itself.
            decisive: the split whose scores decide which weights are best; it counts even if it is a test split too.

        Raises:
            ValueError: the folder holds another run or other files; or a field of ``data`` is not one of `Data`.
        """
        self.args, self.task, self.data = args, task, data
        if self.lock.argument == "cache":
            return
        identity = identify(args, task, data, decisive)

        def look() -> bool:
            self.folder = RunFolder(self.output_dir, identity, args.overwrite_output_dir, FREE)
            return self.folder.again

        # What the results file and the card would refuse is refused before training.
        record = self.record("model", 0, {"steps": 0, "epochs": 0.0, "seconds": 0.0}, [])
        metadata(record, self.output_dir.name)
        self.again = on_main(self.accelerator, look)
        if self.again and (saved := checkpoints(self.output_dir)):
            self.accelerator.print(f"going on from {saved[-1]}")

    def load_or_create(self, name: str, make: Callable[[], Any], load: Callable[..., Any]) -> Any:
        """An object with ``save_pretrained`` that is made once a run, and loaded by other processes and on resume.

        Raises:
            ValueError: what an earlier start of this run saved cannot be loaded.
        """

        def place() -> Path:
            folder = self.folder.part(name)
            if not folder.is_dir():
                made = make()
                part = folder.with_name(f".part-{name}")
                with explain_write_errors(folder):
                    shutil.rmtree(part, ignore_errors=True)
                    made.save_pretrained(part)
                    part.rename(folder)
            return folder

        folder = on_main(self.accelerator, place)
        try:
            return load(folder, trust_remote_code=self.args.trust_remote_code)
        except (ValueError, OSError, KeyError, TypeError) as error:
            if not self.again:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{folder} is damaged ({reason}): delete it, and the same command makes it anew"
            ) from error

    def claim(self, model: nn.Module) -> None:
        """Make the folder this run's own and start the trackers; the last thing before training.

        Args:
            model: to be trained.

        Raises:
            ValueError: its weights are not finite.
            WriteError: the folder cannot be written.
        """
        source = getattr(self.args, "model_name_or_path", None)
        check_finite(model, f'model_name_or_path "{source}"' if source else "the new model")
        left = on_main(self.accelerator, lambda: self.folder.claim())
        if left:
            self.accelerator.print(
                f"the earlier run in {self.output_dir} is deleted; files that no run wrote stay: "
                f"{', '.join(left[:10])}{', ...' * (len(left) > 10)}"
            )
        if self.args.report_to:
            name = self.args.run_name or self.output_dir.name
            options = {kind: {"name": name} for kind in self.args.report_to if kind in ("wandb", "trackio")}
            knobs = identifying(self.args)
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in knobs.items()}
            self.accelerator.init_trackers("hf-tfm", config=flat, init_kwargs=options)

    def train(self, task: Task, model: nn.Module, *args: Any, **options: Any) -> TrainingResult:
        """`claim` the folder, then `train`."""
        self.claim(model)
        if limit_threads(model, self.accelerator.device):
            self.accelerator.print("one CPU thread, for a small model; OMP_NUM_THREADS sets another number")
        return train(self.accelerator, task, model, *args, **options)

    def save(self, model: nn.Module, processor: Any) -> None:
        """Save the trained model and its processor in the run's folder, before anything else can fail.

        Files are written elsewhere and moved into place, so an interrupted save leaves the old model or the new one's
        whole files.

        Raises:
            FloatingPointError: a weight is not finite; nothing is saved.
            WriteError: something could not be written.
        """
        if name := first_not_finite(model):
            raise FloatingPointError(
                f"training ended with weights that are not finite (the first is {name}), so no model is saved; "
                f"checkpoints are in {self.output_dir}: lower learning_rate or weight_decay, or set max_grad_norm"
            )

        def write() -> None:
            part = self.output_dir / ".part-model"
            with explain_write_errors(self.output_dir):
                shutil.rmtree(part, ignore_errors=True)
                model.save_pretrained(part)
                processor.save_pretrained(part)
                place_new(part, self.output_dir)

        on_main(self.accelerator, write)

    def record(
        self,
        model_type: str,
        parameters: int,
        training: dict[str, Any],
        metrics: list[dict[str, Any]],
        costs: list[Cost] | None = None,
        distillation: Distillation | None = None,
    ) -> RunRecord:
        """The record of this run, as it ends now; see `RunRecord`."""
        return RunRecord(
            task=self.task,
            model_type=model_type,
            parameters=parameters,
            base_model=getattr(self.args, "model_name_or_path", None),
            data=self.data,
            arguments=dataclasses.asdict(self.args),
            command=self.command,
            metrics=metrics,
            training=training,
            versions=collect_versions(),
            hardware=describe_hardware(self.accelerator.device, self.accelerator.num_processes),
            costs=costs,
            distillation=distillation,
            started=self.started,
            finished=now(),
        )

    def stopped(self, result: TrainingResult) -> int:
        """Print how to resume; the exit status."""
        self.accelerator.print(
            f"asked to stop: state saved at step {result.progress.step} in {self.output_dir}; the same command goes on"
        )
        self.accelerator.end_training()
        return 0

    def close(self) -> None:
        """Free the folder; what was made for a run that did not come to train is removed."""
        if self.folder is not None:
            self.folder.give_up()
        self.lock.release()


@contextmanager
def begin_run(args: TrainingArguments, recipe: str, argv: Sequence[str]) -> Iterator[Run]:
    """A run that has its folder to itself, until the context ends.

    Args:
        recipe, argv: the recipe's name and the words of its command line.

    Raises:
        ValueError: the folder cannot be one of the run's own, holds something the run reads, or is in use by another
            process; see `run_folder`.
        WriteError: the folder cannot be written.
    """
    check_folder(args, argv)
    run = Run(start_accelerator(args), args, recipe, argv)
    try:
        on_main(run.accelerator, lambda: run.lock.take(run.command))
        with threads_restored():
            yield run
    finally:
        run.close()


def check_folder(args: TrainingArguments, argv: Sequence[str]) -> None:
    """Refuse an output folder, or a cache to be written, that cannot be one of the run's own; see `run_folder`.

    Raises:
        ValueError: it says why.
    """
    argument = "cache" if getattr(args, "write_cache", False) else "output_dir"
    check_place(getattr(args, argument), argument)
    check_inputs(args, argv, argument)


def recipe_main(
    kind: type, recipe: Path, argv: Sequence[str] | None, work: Callable[[TrainingArguments, Run], int]
) -> int:
    """Command line -> arguments -> a run; the exit status.

    Args:
        kind: the recipe's dataclass of arguments.
        recipe: the recipe's file.
        argv: the command line without the program; default, this process's.
        work: the run itself.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(kind, recipe, argv)
    with begin_run(args, recipe.stem, argv) as run:
        return work(args, run)


def identifying(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide the weights of a run."""
    # With these schedules a longer run begins as a shorter one, unless its length decides the warm-up.
    extends = args.lr_scheduler_type in ("inverse_sqrt", "constant") and args.warmup_steps is not None
    free = FREE | ({"max_steps", "num_train_epochs"} if extends else set())
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in free}


def identify(args: TrainingArguments, task: str, data: dict[str, Any], decisive: str | None = None) -> dict[str, Any]:
    """What decides the weights of a run: the task, arguments, and data that is learned from or decides what is best.

    Args:
        data, decisive: see `Run.open`.
    """
    knobs, fingerprint = identifying(args), data["fingerprint"]
    scored = set(getattr(args, "test_splits", ())) - {getattr(args, "train_split", None), decisive}
    if isinstance(fingerprint, dict):
        fingerprint = {split: value for split, value in fingerprint.items() if split not in scored}
    if isinstance(knobs.get("data_files"), dict):
        knobs["data_files"] = {split: files for split, files in knobs["data_files"].items() if split not in scored}
    identity = {"task": task, **knobs, "data": fingerprint}
    if f"'{STREAM}'" in str(fingerprint):  # what is not read beforehand is known by its commit alone
        identity["revision"] = data.get("revision")
    return identity


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
    task: Task,
    result: TrainingResult,
    metrics: list[dict[str, Any]],
    costs: list[Cost] | None = None,
    distillation: Distillation | None = None,
) -> RunRecord:
    """Write results.json and the card beside the model that `Run.save` saved; print the results.

    Args:
        metrics: rows of name, value, split and signature.
        costs: of the model and those it is compared with.
        distillation: what it learned from.

    Raises:
        FloatingPointError: a loss of the final scores is not finite.
        WriteError: something could not be written.
    """
    accelerator, args, progress = run.accelerator, run.args, result.progress
    training = {
        "steps": progress.step,
        "epochs": round(result.epochs, 3),
        "seconds": round(progress.seconds, 1),
        "items_per_second": round(progress.items / max(progress.seconds, 1e-9), 1),
        "item": task.item,
        "skipped_steps": progress.skipped,
        "best": {"metric": args.metric_for_best_model, "value": progress.best, "step": progress.best_step},
        "weights": args.final_weights,
    }
    metrics = finite_metrics(accelerator, metrics)
    parameters = sum(p.numel() for p in model.parameters())
    record = run.record(model.config.model_type, parameters, training, metrics, costs, distillation)

    def write() -> None:
        with explain_write_errors(run.output_dir):
            record.save(run.output_dir)
            write_card(run.output_dir, record)

    on_main(accelerator, write)
    print_table(accelerator, record)
    accelerator.end_training()
    return record


def finite_metrics(accelerator: Accelerator, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores that are numbers; others, say the correlation with predictions that are all the same, are named.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    for row in metrics:
        if math.isfinite(row["value"]):
            continue
        if "loss" in row["name"]:
            raise FloatingPointError(
                f"{row['name']} of split {row['split']} is {row['value']}, so no card is written; the model is saved, "
                "and the same command only scores it"
            )
        accelerator.print(f"{row['name']} of split {row['split']} is {row['value']}: left out of the results")
    return [row for row in metrics if math.isfinite(row["value"])]


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
