"""Checkpoints that resume a run exactly.

    <output_dir>/checkpoints/step-00001200/      model.safetensors  optimizer.safetensors  ema.safetensors
                                                 task.safetensors   state.json
    of a sharded run                             shard-*.safetensors  task.safetensors  state.json

Writing: a checkpoint is written under a temporary name and renamed once it is complete and synced to disk, and renamed
    again before it is deleted, so an incomplete checkpoint is never loaded. Only the main process writes, while
    training goes on, see `checkpoint_writer`. With sharded weights, each process writes its own shards of all tensors
    ("model.*", "optimizer.*" and "ema.*") by torch.distributed.checkpoint, if all see the folder.
Checksums: state.json holds the size and the CRC-32 of every other file, and a checksum of itself. They are verified
    when the files are read; a checkpoint that does not match is set aside, see `resume`.
Reading: only the main process reads the folder. It chooses the checkpoint and sends its content to the others, so that
    all processes resume from the same state, and the others need no access to the folder. Shards are read by each
    sharded process itself, its own part alone, if it sees them; the number of processes may have changed.
Random states are not stored: those of a micro-batch are derived from (seed, step, its number in the step), see
    `seed_micro_batch`.
"""

import copy
import fnmatch
import json
import logging
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..hub.saved_files import (
    CHECKPOINT_FILES,
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    SHARDS,
    STATE_FILE,
    TASK_FILE,
)
from ..hub.schema import check_keys, check_type
from ..sharding import is_sharded
from ..writing import explain_write_errors, sync, write_text
from .ranks import on_main

log = logging.getLogger(__name__)

# Errors caused by a damaged or wrong file; others, such as running out of memory, do not indicate a bad file.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError)
COUNTS = ("step", "epoch", "step_in_epoch", "items", "skipped", "streak", "waited", "seconds")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
CHECKSUM, FILES = "checksum", "files"  # fields of state.json; missing in those of earlier versions
BLOCK = 2**22  # bytes that are read at once for a checksum


@dataclass
class Progress:
    """State of a run.

    Args:
        step: completed optimizer steps.
        epoch, step_in_epoch: position of the next step.
        stream: position of the next step in a stream, see `data.stream.StreamLoader`; None for other data, at the
            start of an epoch, and in checkpoints of earlier versions.
        items: items of the task's main term trained on, for example target tokens.
        skipped: steps skipped because of a non-finite gradient; streak: consecutive ones up to now.
        best: best value of metric_for_best_model so far, at step best_step; waited: evaluations since then.
        window: sums since the last log line.
        pending: the evaluation of this step is still due: its checkpoint is written before it.
        unplanned: step of the last checkpoint that was saved because of a stop, or before an evaluation that did not
            improve the best value, between two planned ones. The next save deletes it, so the last N checkpoints equal
            those of an uninterrupted run.
        seconds: training time, without evaluation and set-up; logged_seconds: its value at the last log line.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    stream: dict[str, Any] | None = None
    items: int = 0
    skipped: int = 0
    streak: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    window: dict[str, float] = field(default_factory=dict)
    pending: bool = False
    unplanned: int | None = None
    seconds: float = 0.0
    logged_seconds: float = 0.0


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Seed all random generators for a micro-batch, independently of everything drawn before.

    A resumed run thus reproduces dropout exactly, and evaluations have no side effects. Several ranks draw the same
    numbers for a step as one does, if they cut it into the same micro-batches.

    Args:
        step: steps completed before this one.
        number: position of the micro-batch in the whole step, over all ranks.
    """
    value = int(np.random.SeedSequence((seed, step, number)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # the same, without a stack trace for each device that is missing: 0.2 ms
        torch.default_generator.manual_seed(value)


def checkpoints(output_dir: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(p for p in (output_dir / CHECKPOINTS).glob("step-*") if (p / STATE_FILE).is_file())


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return output_dir / CHECKPOINTS / f"step-{step:08d}"


def discard(folder: Path) -> None:
    """Delete a checkpoint if it exists, renaming it first."""
    if not folder.is_dir():
        return
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def clean(output_dir: Path) -> None:
    """Delete leftovers of checkpoints whose writing or deletion was interrupted; other files are kept."""
    for pattern in (".part-step-*", ".old-step-*"):
        for path in (output_dir / CHECKPOINTS).glob(pattern):
            for name in (*CHECKPOINT_FILES, SHARDS):
                for file in path.glob(name):
                    file.unlink()
            with suppress(OSError):  # it contains other files
                path.rmdir()


def rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints except the last ``keep`` and the best."""
    for folder in checkpoints(output_dir)[:-keep]:
        if best_step is None or folder != checkpoint_path(output_dir, best_step):
            discard(folder)


@dataclass
class Snapshot:
    """Content of a checkpoint in host memory, independent of the training that goes on.

    Args:
        files: tensors of each safetensors file that the main process writes; empty on other processes.
        state: content of state.json, without the checksums; empty on other processes.
        shards: tensors of which each process writes its own part, named "model.*", "optimizer.*" and "ema.*".
    """

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    shards: dict[str, Tensor]


def take_snapshot(
    accelerator: Accelerator,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
    task_state: dict[str, Tensor] | None = None,
    shards: bool = False,
) -> Snapshot:
    """Copy the state of a run; every process must call it.

    Args:
        task_state: see `tasks.base.Task.state`.
        shards: sharded tensors are not gathered.
    """
    model, main = accelerator.unwrap_model(model), accelerator.is_main_process
    # Gathering involves every process, but only the main one receives the tensors.
    options = FULL if is_sharded(model) and not shards else None
    optimizer_state = get_optimizer_state_dict(model, inner(optimizer), options=options)
    files = {MODEL_FILE: stored_weights(model, options), OPTIMIZER_FILE: flat_moments(optimizer_state["state"])}
    if ema is not None:
        files[EMA_FILE] = stored_weights(ema.module, options)
    split = {}
    if shards:
        split, files = {stored_name(name, key): value for name in files for key, value in files[name].items()}, {}
    if task_state:
        files[TASK_FILE] = task_state
    state = {
        "progress": asdict(progress),
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
        "optimizer": optimizer_state.get("param_groups"),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    own = {name: host_copies(tensors) for name, tensors in files.items()} if main else {}
    return Snapshot(own, copy.deepcopy(state) if main else {}, host_copies(split))


def stored_name(file: str, name: str) -> str:
    """Return the name that a tensor of a checkpoint's file has in shards, for example "model.embedding.weight"."""
    return f"{Path(file).stem}.{name}"


def host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory, contiguous as safetensors requires."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def part_folder(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written."""
    return folder.with_name(f".part-{folder.name}")


def begin_checkpoint(folder: Path) -> None:
    """Create the empty folder in which a checkpoint will be written.

    Raises:
        WriteError: it cannot be created.
    """
    with explain_write_errors(folder):
        shutil.rmtree(part_folder(folder), ignore_errors=True)
        part_folder(folder).mkdir(parents=True)


def write_checkpoint(folder: Path, snapshot: Snapshot, group: ProcessGroup | None = None) -> None:
    """Write the files of a checkpoint atomically, into the folder that `begin_checkpoint` created.

    Args:
        group: all processes, each of which calls this, to write shards; otherwise, only the main process does.

    Raises:
        WriteError: it could not be written; no partial checkpoint is left.
    """
    part = part_folder(folder)
    with explain_write_errors(folder):
        try:
            described = {} if group is None else write_shards(part, snapshot.shards, group)
            if not snapshot.state:  # not the main process
                return
            with ThreadPoolExecutor() as pool:  # a file is hashed while the disk stores it and the next one is written
                sums = {}
                for name, tensors in snapshot.files.items():
                    save_file(tensors, part / name, metadata={"format": "pt"})
                    sums[name] = pool.submit(describe_file, part / name)
                for name in snapshot.files:
                    sync(part / name)
                described |= {name: found.result() for name, found in sums.items()}
            (part / STATE_FILE).write_text(sealed({**snapshot.state, FILES: described}), encoding="utf-8")
            sync(part / STATE_FILE)
            sync(part)
            discard(folder)
            part.rename(folder)
            sync(folder.parent)
        except BaseException:
            if snapshot.state:
                shutil.rmtree(part, ignore_errors=True)
            raise


def update_progress(folder: Path, progress: Progress) -> None:
    """Replace the progress in the state.json of a checkpoint, atomically.

    Raises:
        ValueError: it is damaged.
        WriteError: it could not be written; the old content is left.
    """
    state, _ = read_state(folder / STATE_FILE)
    write_text(folder / STATE_FILE, sealed({**state, "progress": asdict(progress)}))


def describe_file(path: Path) -> dict[str, int]:
    """Return the size in bytes and the CRC-32 of a file.

    CRC-32 detects every error within 32 bits, and all others but one in 4 billion; it is the fastest hash of the
    standard library, which matters for checkpoints of many gigabytes.
    """
    value = size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            value, size = zlib.crc32(block, value), size + len(block)
    return {"bytes": size, "crc32": value}


def checksum(state: dict[str, Any]) -> int:
    """Return the CRC-32 of the content of state.json, without the field of the checksum."""
    content = {name: value for name, value in state.items() if name != CHECKSUM}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def sealed(state: dict[str, Any]) -> str:
    """Return the text of state.json with its checksum."""
    state = json.loads(json.dumps(state))  # keys and tuples as they are when the text is read
    return json.dumps({**state, CHECKSUM: checksum(state)})


@contextmanager
def sharding_errors() -> Iterator[None]:
    """Raise the error of a process in the place of that of torch.distributed.checkpoint, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def check_files(folder: Path, state: dict[str, Any], names: Collection[str]) -> None:
    """Compare files of a checkpoint with the checksums in its state.json; one of an earlier version has none.

    Raises:
        ValueError: names the file that differs.
        OSError: a file cannot be read.
    """
    expected = state.get(FILES, {})
    for name in expected.keys() & names:
        if describe_file(folder / name) != expected[name]:
            raise ValueError(f"{folder / name} is damaged: its content does not match the checksum in {STATE_FILE}")


def resume(
    accelerator: Accelerator,
    output_dir: Path,
    max_steps: int | None,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
    load_task: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> Progress:
    """Load the newest intact checkpoint on all processes; without any checkpoint, start from step 0.

    The main process chooses and reads it, see the module. Damaged checkpoints are renamed to damaged-step-*, with a
    warning, if an intact one is left. If none is left, nothing is changed: starting over would silently discard the
    training so far.

    Args:
        max_steps: steps of the whole run; a checkpoint of a later step counts as damaged. None if the run may be
            shortened.
        load_task: see `tasks.base.Task.load_state`.

    Raises:
        ValueError: no checkpoint is intact; the message lists them and their problems.
    """
    plain = accelerator.unwrap_model(model)
    wrong: dict[str, str] = {}
    sound: list[Path] = []
    files = [MODEL_FILE, OPTIMIZER_FILE, *([EMA_FILE] if ema is not None else []), TASK_FILE]

    def look() -> bool:
        for folder in step_folders(output_dir):
            if reason := damage(folder, max_steps, plain, ema):
                wrong[folder.name] = reason
            else:
                sound.append(folder)
        return bool(sound or wrong)

    def choose() -> tuple[str, dict[str, Any]]:
        """Return name and state of the newest intact checkpoint."""
        while sound:
            try:
                return sound[-1].name, read_state(sound[-1] / STATE_FILE)[0]
            except UNREADABLE as error:
                wrong[sound.pop().name] = str(error)
        raise ValueError(
            f"output_dir {output_dir} has no intact checkpoint to resume from: {'; '.join(wrong.values())}. Restore "
            f"one, or delete {output_dir / CHECKPOINTS} to start from step 0"
        )

    def read() -> None:
        """Verify the files, shards on one process each, and read those that the main process sends to the others."""
        shards = shard_names(state)
        if split:
            check_files(folder, state, shards[accelerator.process_index :: accelerator.num_processes])
        if accelerator.is_main_process:
            check_files(folder, state, names if split else [*names, *shards])
            present = [name for name in names if name != TASK_FILE or (folder / name).exists()]
            content.update({name: read_tensors(folder, name) for name in present})

    def load() -> Progress:
        shared = {name: share_tensors(accelerator, content.get(name)) for name in names}
        if split:
            load_shards(folder, plain, optimizer, ema, state["optimizer"])
        return load_state(accelerator, state, shared, model, optimizer, schedule, ema, load_task)

    if not on_main(accelerator, look):
        return Progress()
    while True:
        content: dict[str, dict[str, Tensor]] = {}
        name, state = on_main(accelerator, choose)
        folder = output_dir / CHECKPOINTS / name
        split = is_sharded(plain) and all(gather_object([bool(shard_names(state)) and is_same(folder, state)]))
        names = [TASK_FILE] if split else files
        reason = None
        try:
            read()
        except UNREADABLE as error:
            reason = str(error)
        reasons = gather_object([reason])
        if not any(reasons):
            try:
                progress = load()
            except UNREADABLE as error:
                reason = f"{folder} cannot be loaded ({error})"
            reasons = gather_object([reason])
        if not any(reasons):
            break
        if accelerator.is_main_process:
            wrong[sound.pop().name] = next(filter(None, reasons))

    def set_aside() -> None:
        if unknown := sorted(state["progress"].keys() - asdict(progress).keys()):
            file = output_dir / CHECKPOINTS / name / STATE_FILE
            log.warning("%s: fields of a newer version are ignored: %s", file, ", ".join(unknown))
        for damaged, reason in wrong.items():
            aside = output_dir / CHECKPOINTS / f"damaged-{damaged}"
            log.warning(
                "%s; it was renamed to %s, and the run resumes from step %d", reason, aside.name, progress.step
            )
            with explain_write_errors(aside):
                shutil.rmtree(aside, ignore_errors=True)
                (output_dir / CHECKPOINTS / damaged).rename(aside)

    on_main(accelerator, set_aside)
    return progress


def shared_weights(accelerator: Accelerator, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return on all processes the tensors that ``read`` returns on the main process, or raise its error."""
    own: dict[str, Tensor] = {}
    on_main(accelerator, lambda: own.update(read()))
    return share_tensors(accelerator, own)


def share_tensors(accelerator: Accelerator, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Send tensors of the main process to all processes.

    Args:
        tensors: on the CPU, as those returned; not used on other processes.
    """
    if accelerator.num_processes == 1:
        return tensors or {}
    main = accelerator.is_main_process
    given = tensors if main and tensors else {}
    layout = [[(name, value.shape, value.dtype) for name, value in given.items()]]
    broadcast_object_list(layout)
    shared = {}
    for name, shape, dtype in layout[0]:
        value = given[name].contiguous() if main else torch.empty(shape, dtype=dtype)
        data = broadcast(value.reshape(-1).view(torch.uint8).to(accelerator.device))  # bytes, for any dtype
        shared[name] = value if main else data.cpu().view(dtype).reshape(shape)
    return shared


def step_folders(output_dir: Path) -> list[Path]:
    """List checkpoints, intact or damaged, oldest first."""
    found = (output_dir / CHECKPOINTS).glob("step-*")
    return sorted(path for path in found if any((path / name).exists() for name in CHECKPOINT_FILES))


def damage(folder: Path, max_steps: int | None, model: nn.Module, ema: AveragedModel | None) -> str | None:
    """Check state.json and the headers of a checkpoint's files; return the problem, or None if it is intact.

    Args:
        max_steps: see `resume`.
    """
    try:
        state, progress = read_state(folder / STATE_FILE)
        if folder.name != checkpoint_path(folder, progress.step).name:
            raise ValueError(f"{folder / STATE_FILE} is damaged: its step is {progress.step}")
        if max_steps is not None and progress.step > max_steps:
            raise ValueError(f"{folder} is of step {progress.step}, but the run has only {max_steps}")
        if lost := [name for name in shard_names(state) if not (folder / name).exists()]:
            raise ValueError(f"{folder / lost[0]} is missing")
        check_weights(model, folder, MODEL_FILE)
        if ema is not None:
            check_weights(ema.module, folder, EMA_FILE)
        check_moments(model, folder)
        if (folder / TASK_FILE).exists():
            shapes_in(folder / TASK_FILE)
    except UNREADABLE as error:
        return str(error)
    return None


def read_state(file: Path) -> tuple[dict[str, Any], Progress]:
    """Return the content of state.json and its progress.

    Progress fields unknown to this version are dropped.

    Raises:
        ValueError: it is missing, not valid JSON, or a value is missing or has the wrong type; the message names the
            file.
    """
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        check_type(state, dict[str, Any], "the content")
        kinds = {"progress": dict[str, Any], "schedule": dict[str, Any], "optimizer": list[dict[str, Any]]}
        check_keys(state, {*kinds, "scaler"}, {*kinds, "scaler", *state}, "the content")
        for name, kind in {**kinds, "scaler": dict[str, Any] | None}.items():
            check_type(state[name], kind, name)
        check_type(state["schedule"].get("last_epoch"), int, "schedule.last_epoch")
        check_sums(state)
        fields = get_type_hints(Progress)
        check_keys(state["progress"], {"step", "epoch", "step_in_epoch"}, set(state["progress"]), "progress")
        progress = known_progress(state)
        for name, value in vars(progress).items():
            check_type(value, dict if name == "window" else fields[name], f"progress.{name}")
            if name in COUNTS and value < 0:
                raise ValueError(f"progress.{name} must be at least 0, got {value}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return state, progress


def known_progress(state: dict[str, Any]) -> Progress:
    """Return the progress in a state.json, without fields of a newer version."""
    known = get_type_hints(Progress)
    return Progress(**{name: value for name, value in state["progress"].items() if name in known})


def check_sums(state: dict[str, Any]) -> None:
    """Check the checksums in a state.json, which those of earlier versions lack, against its own content.

    Raises:
        ValueError: they are incomplete or wrong.
    """
    if FILES not in state and CHECKSUM not in state:
        return
    check_keys(state, {FILES, CHECKSUM}, set(state), "the content")
    if state[CHECKSUM] != checksum(state):
        raise ValueError("its content does not match its checksum")
    check_type(state[FILES], dict[str, dict[str, int]], FILES)


def load_state(
    accelerator: Accelerator,
    state: dict[str, Any],
    files: dict[str, dict[str, Tensor]],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
    load_task: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> Progress:
    """Load the content of a checkpoint into a prepared model and optimizer, on any number of processes.

    Args:
        state: content of state.json; see `read_state`.
        files: tensors of the other files; full ones, on every process. Without those of the model, `load_shards` has
            loaded model, optimizer and ``ema``.
    """
    model = accelerator.unwrap_model(model)
    progress = known_progress(state)
    if MODEL_FILE in files:
        set_weights(model, files[MODEL_FILE])
        if ema is not None:
            set_weights(ema.module, files[EMA_FILE])
        optimizer_state = {"state": nested_moments(files[OPTIMIZER_FILE]), "param_groups": state["optimizer"]}
        set_optimizer_state_dict(model, inner(optimizer), optimizer_state, options=FULL)
    if ema is not None:
        ema.n_averaged.fill_(progress.step)
    # LambdaLR keeps its own function where the state has None.
    schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(inner(optimizer).param_groups)})
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    load_task(files[TASK_FILE])
    return progress


@sharding_errors()
def write_shards(part: Path, tensors: dict[str, Tensor], group: ProcessGroup) -> dict[str, dict[str, int]]:
    """Write the shards of all processes, each its own, and return what `describe_file` says of all files.

    They are safetensors files, whose headers hold the offsets of the shards.

    Args:
        tensors: see `Snapshot.shards`.
        group: all processes; every one must call this.

    Raises:
        OSError: a process could not write its file; on all processes.
    """
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True), process_group=group)
    own = {path.name: describe_file(path) for path in part.glob(f"shard-{distributed.get_rank() + 1:05d}-*")}
    found: list[dict[str, dict[str, int]]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(found, own, group=group)
    return {name: described for files in found for name, described in files.items()}


def shard_names(state: dict[str, Any]) -> list[str]:
    """Return the names of the shards of a checkpoint with this state.json."""
    return fnmatch.filter(sorted(state.get(FILES, {})), SHARDS)


def is_same(folder: Path, state: dict[str, Any]) -> bool:
    """Return True if this process sees a checkpoint in ``folder`` that has this state.json."""
    try:
        return read_state(folder / STATE_FILE)[0] == state
    except ValueError:
        return False


def stored_in_shards(folder: Path, name: str) -> dict[str, TensorStorageMetadata]:
    """Return the tensors of a file of which shards take the place, by their names in that file."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    prefix = stored_name(name, "")
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


@sharding_errors()
def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors from the shards of a checkpoint; of sharded ones, only the part of this process is read."""
    with warnings.catch_warnings():  # that each process reads for itself
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Return all tensors in a file of a checkpoint, or in the shards that take its place."""
    if name == TASK_FILE or not any(folder.glob(SHARDS)):
        return load_file(folder / name)
    stored = stored_in_shards(folder, name)
    tensors = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in stored.items()}
    read_into(folder, {stored_name(name, key): value for key, value in tensors.items()})
    return tensors


def load_shards(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ema: AveragedModel | None,
    param_groups: list[dict[str, Any]],
) -> None:
    """Load the shards of a checkpoint into a sharded model, its average and its optimizer.

    Args:
        param_groups: of the optimizer, from state.json.
    """
    state = get_optimizer_state_dict(model, inner(optimizer))
    stored = stored_in_shards(folder, OPTIMIZER_FILE)
    moments = {name: value for name, value in flat_moments(state["state"]).items() if name in stored}
    files = {MODEL_FILE: stored_weights(model), OPTIMIZER_FILE: moments}
    if ema is not None:
        files[EMA_FILE] = stored_weights(ema.module)
    read_into(folder, {stored_name(name, key): value for name in files for key, value in files[name].items()})
    set_optimizer_state_dict(model, inner(optimizer), {"state": nested_moments(moments), "param_groups": param_groups})


def flat_moments(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten {weight: {key: tensor}} to {"weight.key": tensor}, as stored in a safetensors file."""
    return {f"{weight}.{key}": value.contiguous() for weight, own in moments.items() for key, value in own.items()}


def nested_moments(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo `flat_moments`."""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        weight, key = name.rsplit(".", 1)
        moments.setdefault(weight, {})[key] = value
    return moments


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a safetensors file; only its header is read.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        missing = "missing" if not file.exists() else f"damaged: {error}"
        raise ValueError(f"{file} is {missing}") from error


def stored_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a file of a checkpoint, or in the shards that take its place.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if not (shards := sorted(folder.glob(SHARDS))):
        return shapes_in(folder / name)
    for file in shards:
        shapes_in(file)
    return {key: tuple(stored.size) for key, stored in stored_in_shards(folder, name).items()}


def check_weights(model: nn.Module, folder: Path, name: str) -> None:
    """Refuse weights in a checkpoint that do not match the model; tied weights are stored once.

    Args:
        name: file of the weights, or of which shards take the place.

    Raises:
        ValueError: the file is damaged, or names or shapes differ.
    """
    file, found = folder / name, stored_shapes(folder, name)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(shapes.keys() - tied_names(model) - found.keys())
    unexpected = sorted(found.keys() - shapes.keys())
    odd = sorted(name for name in found.keys() & shapes.keys() if found[name] != shapes[name])
    if missing or unexpected or odd:
        raise ValueError(
            f"{file} does not match the model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"different shape {odd[:3]}"
        )


def check_moments(model: nn.Module, folder: Path) -> None:
    """Refuse an optimizer state in a checkpoint that does not match the model's parameters.

    Raises:
        ValueError: it is damaged, or belongs to other parameters.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    file = folder / OPTIMIZER_FILE
    for name, shape in stored_shapes(folder, OPTIMIZER_FILE).items():
        weight = name.rpartition(".")[0]
        if weight not in shapes or (shape and shape not in (shapes[weight], (1,))):
            raise ValueError(f"{file} does not match the model: {name} has the shape {list(shape)}")


def read_weights(folder: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read the weights in a checkpoint; tied ones are stored once.

    Args:
        model: refuse weights with other names or shapes.

    Raises:
        ValueError: a file is missing or damaged, or the weights do not match the model.
    """
    state, _ = read_state(folder / STATE_FILE)
    if model is not None:
        check_weights(model, folder, MODEL_FILE)
    check_files(folder, state, [MODEL_FILE, *shard_names(state)])
    return read_tensors(folder, MODEL_FILE)


@torch.no_grad()
def share_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Average the running statistics of batch norms over all ranks, because each rank saw only its own images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    running = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    if running and accelerator.num_processes > 1:
        for own, mean in zip(running, accelerator.reduce([own.clone() for own in running], "mean"), strict=True):
            own.copy_(mean)


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load full weights, with tied ones stored once, into a model on any number of processes."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def tied_names(model: nn.Module) -> set[str]:
    """Return the names of parameters tied to one with an earlier name."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def stored_weights(model: nn.Module, options: StateDictOptions | None = None) -> dict[str, Tensor]:
    """Return all weights and buffers of a model, tied ones once."""
    ties = tied_names(model)
    return {name: value for name, value in get_model_state_dict(model, options=options).items() if name not in ties}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the main process, tied ones once, contiguous as safetensors requires."""
    return {name: value.contiguous() for name, value in stored_weights(model, FULL).items()}


def inner(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
