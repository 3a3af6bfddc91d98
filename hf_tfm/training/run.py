"""Life cycle of a run around `train`: accelerator, exclusive output folder, saved model and model card."""

import dataclasses
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from datasets.config import HF_DATASETS_CACHE
from evaluate.config import HF_METRICS_CACHE
from torch import nn
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from ..arguments import ModelArguments, TrainingArguments
from ..data.source import STREAM
from ..finite import check_finite, first_not_finite
from ..hub.card import metadata, write_card
from ..hub.cost import Cost
from ..hub.loading import require_model
from ..hub.pretrained import check_kind
from ..hub.results import (
    Compression,
    Distillation,
    RunRecord,
    collect_versions,
    describe_hardware,
    evaluations_of,
    read_history,
)
from ..launcher import create_accelerator
from ..sharding import check_sharding
from ..tasks.base import Loader
from ..writing import explain_write_errors
from .checkpoint import checkpoints
from .folder import require_room
from .loop import StatefulTask
from .ranks import on_main
from .run_folder import Lock, RunFolder, check_inputs, check_location, place_new
from .session import TrainingResult, checkpoints_to_come, train
from .sigterm import Watchdog, install_sigterm_handler
from .threads import limit_threads, threads_restored

# Arguments that affect neither the weights of a given step nor the choice of the best: a resumed run may change them.
FREE = {
    *("output_dir", "overwrite_output_dir", "run_name", "report_to", "progress", "logging_steps", "license"),
    *(
        "dataloader_num_workers",
        "micro_batch_tokens",
        "micro_batch_size",
        "generation_micro_batch_size",
        "gradient_checkpointing",
        "fsdp",
        "max_nonfinite_steps",
    ),
    *("max_bad_images", "trust_remote_code", "max_minutes", "ddp_timeout"),
    *("eval_steps", "save_steps", "early_stopping_patience", "save_total_limit", "average_checkpoints"),
    *(
        "final_weights",
        "num_pictures",
        "test_splits",
        "metrics",
        "num_beams",
        "length_penalty",
        "iterations",
        "length_bins",
    ),
    *("costs", "teacher_device", "expected_score"),
}

CPU_FLAGS = Path("/proc/cpuinfo")


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """Create the accelerator: mixed precision and trackers from the arguments, the rest from the launcher.

    From here on SIGTERM ends the process with exit status 0, see `sigterm.install_sigterm_handler`.

    Raises:
        ValueError: the device does not support the precision, a model to start from is missing or of another kind, or
            the processes that the launcher started are not connected.
    """
    for argument in ("model_name_or_path", "teacher", "reward_model", "reference_model"):
        if source := getattr(args, argument, None):
            require_model(argument, source)
            suitable = getattr(args, "accepted_models", {}).get(argument)
            config = check_kind(argument, source, suitable, args.trust_remote_code)
            if argument == "model_name_or_path" and getattr(config, "int8", None) is not None:
                raise ValueError(f'{argument} "{source}" has int8 weights, which cannot be trained: give the original')
            if argument == "model_name_or_path" and isinstance(args, ModelArguments):
                args.check_saved(config)
    if isinstance(args, ModelArguments):
        args.check_files()
    if source := getattr(args, "tokenizer", None):
        require_model("tokenizer", source, files=(TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, CONFIG_NAME))
    install_sigterm_handler()
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))
    accelerator = create_accelerator(
        mixed_precision=args.mixed_precision,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        # Buffers are constant tables here; broadcasting them in every forward pass would be wasteful.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            timeout,
        ],
        step_scheduler_with_optimizer=False,
    )
    check_sharding(accelerator, args.fsdp)
    if accelerator.num_processes > 1:
        Watchdog.install(on_cpu=accelerator.device.type == "cpu")
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would silently use float32
        raise ValueError('mixed_precision="fp16" needs an accelerator; on a CPU use "bf16" or "no"')
    if args.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not has_fast_bf16():
        accelerator.print(
            'mixed_precision="bf16" is emulated on this CPU, which has no bf16 instructions: "no" is many times faster'
        )
    return accelerator


def has_fast_bf16() -> bool:
    """Return True if the CPU computes matrix products in bf16 at least as fast as in float32."""
    if not CPU_FLAGS.is_file():  # not Linux
        return True
    words = set(CPU_FLAGS.read_text(encoding="utf-8").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "avx_ne_convert"})


class Run:
    """A run of a recipe and its folder, from the first check to the model card; see `begin_run`.

    Args:
        args: arguments of the recipe.
        recipe, argv: name of the recipe and its command-line arguments.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, recipe: str, argv: Sequence[str]):
        self.accelerator, self.args = accelerator, args
        self.command, self.started = repeat_command(accelerator.num_processes, recipe, argv), now()
        self.lock = Lock(Path(getattr(args, args.folder_argument)), args.folder_argument)
        self.folder: RunFolder | None = None  # only on the main process
        self.task, self.data, self.holds_run = "", {}, False

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def open(
        self, args: TrainingArguments, task: str, data: dict[str, Any], selection_split: str | None = None
    ) -> None:
        """Check that ``args.output_dir`` is free for this run or already holds it; nothing is written.

        A run that only writes a cache has no output folder to check.

        Args:
            args: arguments of the recipe, completed with values that depend on the data.
            task: pipeline tag of the Hub, for example "translation".
            data: see `hub.results.Data`; its ``fingerprint`` is part of the run's identity.
            selection_split: split whose scores select the best weights; part of the identity even if it is a test
                split.

        Raises:
            ValueError: the folder holds another run or other files; or a field of ``data`` is not one of `Data`.
        """
        self.args, self.task, self.data = args, task, data
        if self.lock.argument == "cache":
            return
        identity = identify(args, task, data, selection_split)

        def look() -> bool:
            self.folder = RunFolder(self.output_dir, identity, args.overwrite_output_dir, FREE, default_values(args))
            return self.folder.holds_run

        # Checks that the results file and the card make are done before training.
        record = self.record("model", 0, {"steps": 0, "epochs": 0.0, "seconds": 0.0}, [])
        metadata(record, self.output_dir.name)
        self.holds_run = on_main(self.accelerator, look)
        if self.holds_run and (saved := checkpoints(self.output_dir)):
            self.accelerator.print(f"resuming from {saved[-1]}")

    def load_or_create(self, name: str, make: Callable[[], Any], load: Callable[..., Any]) -> Any:
        """Return an object with ``save_pretrained`` that one process creates; other processes and resumed runs load
        it.

        A run that only writes a cache has no folder, and every process creates the object.

        Raises:
            ValueError: the object saved earlier by this run cannot be loaded.
        """
        if self.lock.argument == "cache":  # on every process; only the main process has a folder in any run
            return make()

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
            with same_on_all(self.accelerator, folder) as copy:
                return load(copy, trust_remote_code=self.args.trust_remote_code)
        except (ValueError, OSError, KeyError, TypeError) as error:
            if not self.holds_run:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{folder} is damaged ({reason}): delete it and run the same command again to recreate it"
            ) from error

    def claim(self, model: nn.Module) -> None:
        """Claim the folder for this run and start the trackers; the last step before training.

        Args:
            model: model to train.

        Raises:
            ValueError: its weights are not finite.
            WriteError: the folder cannot be written.
        """
        source = getattr(self.args, "model_name_or_path", None)
        check_finite(model, f'model_name_or_path "{source}"' if source else "the new model")
        left = on_main(self.accelerator, lambda: self.folder.claim())
        if left:
            self.accelerator.print(
                f"the earlier run in {self.output_dir} is deleted; files that no run wrote are kept: "
                f"{', '.join(left[:10])}{', ...' * (len(left) > 10)}"
            )
        if self.args.report_to:
            name = self.args.run_name or self.output_dir.name
            options = {kind: {"name": name} for kind in self.args.report_to if kind in ("wandb", "trackio")}
            config = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in identifying(self.args).items()
            }
            self.accelerator.init_trackers("hf-tfm", config=config, init_kwargs=options)

    def train(
        self,
        task: StatefulTask,
        model: nn.Module,
        loader: Loader,
        resolved: TrainingArguments,
        max_steps: int,
        eval_steps: int,
        *args: Any,
        **options: Any,
    ) -> TrainingResult:
        """`claim` the folder, then `train`; arguments as in `session.train`.

        Raises:
            OSError: the checkpoints do not fit on the disk; see also `claim` and `session.train`.
        """

        def check() -> None:
            if self.holds_run or not self.folder.run_file.is_file():  # `claim` deletes no other run to free space
                to_come = checkpoints_to_come(resolved, max_steps, eval_steps)
                require_room(self.output_dir, model, to_come, bool(resolved.ema_decay))

        on_main(self.accelerator, check)
        self.claim(model)
        if limit_threads(model, self.accelerator.device):
            self.accelerator.print("one CPU thread, for a small model; OMP_NUM_THREADS sets another number")
        return train(self.accelerator, task, model, loader, resolved, max_steps, eval_steps, *args, **options)

    def save(self, model: nn.Module, processor: Any) -> None:
        """Save the trained model and its processor in the run's folder, before anything else can fail.

        Files are written elsewhere and moved into place one by one, so an interrupted save leaves no partial file.

        Raises:
            FloatingPointError: a weight is not finite; nothing is saved.
            WriteError: a file could not be written.
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
        compression: Compression | None = None,
    ) -> RunRecord:
        """Create the record of this run, finished now; see `RunRecord`."""
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
            compression=compression,
            started=self.started,
            finished=now(),
        )

    def stopped(self, result: TrainingResult) -> int:
        """Print how to resume; return the exit status."""
        self.accelerator.print(
            f"asked to stop: state saved at step {result.progress.step} in {self.output_dir}; "
            "run the same command to resume"
        )
        self.accelerator.end_training()
        return 0

    def close(self) -> None:
        """Release the folder, and remove what was created for a run that never started training."""
        if self.folder is not None:
            self.folder.give_up()
        self.lock.release()


@contextmanager
def same_on_all(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """Yield a folder with the files that ``folder`` has on the main process.

    It is ``folder`` itself where a process sees these files there; otherwise, if the output folder is on a disk that
    the machines do not share, a temporary copy.
    """
    if accelerator.num_processes == 1:
        yield folder
        return
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
    content = [files]
    broadcast_object_list(content)
    if content[0] == files:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name, data in content[0].items():
            (Path(copy) / name).write_bytes(data)
        yield Path(copy)


@contextmanager
def begin_run(args: TrainingArguments, recipe: str, argv: Sequence[str]) -> Iterator[Run]:
    """Create a run with exclusive access to its folder while the context lasts.

    Args:
        recipe, argv: name of the recipe and its command-line arguments.

    Raises:
        ValueError: the folder is not usable, holds something the run reads, or is in use by another process; see
            `run_folder`.
        WriteError: the folder cannot be written.
    """
    check_folder(args, argv)
    check_caches()
    run = Run(start_accelerator(args), args, recipe, argv)
    try:
        on_main(run.accelerator, lambda: run.lock.take(run.command))
        with threads_restored():
            yield run
    finally:
        run.close()


def check_caches() -> None:
    """Refuse cache folders that cannot be written, before anything is stored in them.

    Raises:
        ValueError: names the folder and the environment variable that sets it.
    """
    for variable, folder in (("HF_DATASETS_CACHE", HF_DATASETS_CACHE), ("HF_METRICS_CACHE", HF_METRICS_CACHE)):
        path = Path(folder).expanduser().absolute()
        place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            named = variable if os.environ.get(variable) else "HF_HOME"
            raise ValueError(
                f"the cache folder {path} cannot be written ({place}: {error.strerror}): set the environment variable "
                f"{named} to a writable folder"
            ) from error


def check_folder(args: TrainingArguments, argv: Sequence[str]) -> None:
    """Refuse an output folder, or a cache to be written, that the run cannot own; see `run_folder`.

    Raises:
        ValueError: gives the reason.
    """
    check_location(getattr(args, args.folder_argument), args.folder_argument)
    check_inputs(args, argv, args.folder_argument)


def identifying(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that determine the weights of a run."""
    # With these schedules a longer run starts like a shorter one, unless its length determines the warm-up.
    extends = args.lr_scheduler_type in ("inverse_sqrt", "constant") and args.warmup_steps is not None
    free = FREE | ({"max_steps", "num_train_epochs"} if extends else set())
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in free}


def default_values(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments with a default value, and those values, as JSON takes them."""
    found = {}
    for one in dataclasses.fields(args):
        value = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if value is not dataclasses.MISSING:
            found[one.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return found


def identify(
    args: TrainingArguments, task: str, data: dict[str, Any], selection_split: str | None = None
) -> dict[str, Any]:
    """Return what determines the weights of a run: task, arguments, and the data for training and model selection.

    Args:
        data, selection_split: see `Run.open`.
    """
    options, fingerprint = identifying(args), data["fingerprint"]
    scored = set(getattr(args, "test_splits", ())) - {getattr(args, "train_split", None), selection_split}
    if isinstance(fingerprint, dict):
        fingerprint = {split: value for split, value in fingerprint.items() if split not in scored}
    if isinstance(options.get("data_files"), dict):
        options["data_files"] = {split: files for split, files in options["data_files"].items() if split not in scored}
    identity = {"task": task, **options, "data": fingerprint}
    if f"'{STREAM}'" in str(fingerprint):  # streamed data is identified by its commit only
        identity["revision"] = data.get("revision")
    return identity


def repeat_command(processes: int, recipe: str, argv: Sequence[str]) -> str:
    """Return the command that repeats a recipe on the same number of processes."""
    words = ["run", recipe, *argv]
    if processes == 1:
        return shlex.join(["hf-tfm", *words])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    size = ["--nnodes", str(processes // local)] * (local < processes) + ["--nproc_per_node", str(local)]
    return shlex.join(["python", "-m", "torch.distributed.run", *size, "-m", "hf_tfm.cli", *words])


def now() -> str:
    """Return the current date and time in ISO 8601 format with time zone."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def finish(
    run: Run,
    model: nn.Module,
    task: StatefulTask,
    result: TrainingResult,
    metrics: list[dict[str, Any]],
    costs: list[Cost] | None = None,
    distillation: Distillation | None = None,
    compression: Compression | None = None,
) -> RunRecord:
    """Write results.json and the model card next to the model that `Run.save` saved; print the results.

    Args:
        metrics: rows of name, value, split and signature.
        costs: costs of the model and of the models it is compared with.
        distillation: what it was distilled from.
        compression: how it was compressed.

    Raises:
        FloatingPointError: a loss among the final scores is not finite.
        WriteError: a file could not be written.
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
    record = run.record(model.config.model_type, parameters, training, metrics, costs, distillation, compression)

    def write() -> None:
        record.evaluations = evaluations_of(read_history(run.output_dir)) or None
        with explain_write_errors(run.output_dir):
            record.save(run.output_dir)
            write_card(run.output_dir, record)

    on_main(accelerator, write)
    print_table(accelerator, record)
    accelerator.end_training()
    return record


def finite_metrics(accelerator: Accelerator, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the finite scores; report others, for example the correlation with constant predictions.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    for row in metrics:
        if math.isfinite(row["value"]):
            continue
        if "loss" in row["name"]:
            raise FloatingPointError(
                f"{row['name']} of split {row['split']} is {row['value']}, so no card is written; the model is saved, "
                "and the same command, run again, only scores it"
            )
        accelerator.print(f"{row['name']} of split {row['split']} is {row['value']}: left out of the results")
    return [row for row in metrics if math.isfinite(row["value"])]


def print_table(accelerator: Accelerator, record: RunRecord) -> None:
    """Print the results as a table, on the main process."""
    rows = [(m["split"], m["name"], f"{m['value']:.4g}") for m in record.metrics]
    minutes = record.training["seconds"] / 60
    rows += [
        ("train", "minutes", f"{minutes:.1f}"),
        ("train", f"{record.training['item']}/s", f"{record.training['items_per_second']:.0f}"),
    ]
    width = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        accelerator.print(f"  {row[0]:<{width[0]}}  {row[1]:<{width[1]}}  {row[2]:>{width[2]}}")
