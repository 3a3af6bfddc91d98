"""Checkpoints that resume a run exactly.

    <output_dir>/checkpoints/step-00001200/      model.safetensors  optimizer.safetensors  ema.safetensors
                                                 task.safetensors   state.json

A checkpoint is written under a temporary name and renamed once it is complete and synced to disk, and renamed again
before it is deleted, so an incomplete checkpoint is never loaded. A checkpoint that is damaged nevertheless is set
aside, see `resume`. Random states are not stored: those of a step are derived from (seed, step, rank), see
`seed_step`.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
    STATE_FILE,
    TASK_FILE,
)
from ..hub.schema import check_keys, check_type
from ..writing import explain_write_errors, sync

log = logging.getLogger(__name__)

# Errors caused by a damaged or wrong file; others, such as running out of memory, do not indicate a bad file.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError)
COUNTS = ("step", "epoch", "step_in_epoch", "items", "skipped", "streak", "waited", "seconds")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """State of a run.

    Args:
        step: completed optimizer steps.
        epoch, step_in_epoch: position of the next step.
        items: items of the task's main term trained on, for example target tokens.
        skipped: steps skipped because of a non-finite gradient; streak: consecutive ones up to now.
        best: best value of metric_for_best_model so far, at step best_step; waited: evaluations since then.
        window: sums since the last log line.
        pending: the evaluation of this step is still due, because the run was stopped before or during it.
        unplanned: step of the last checkpoint saved because of a stop. The next save deletes it, so the last N
            checkpoints equal those of an uninterrupted run.
        seconds: training time, without evaluation and set-up; logged_seconds: its value at the last log line.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all random generators for a step, independently of earlier steps.

    A resumed run thus reproduces dropout and masks exactly, evaluations have no side effects, and ranks differ.
    """
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def checkpoints(output_dir: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(p for p in (output_dir / CHECKPOINTS).glob("step-*") if (p / STATE_FILE).is_file())


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return output_dir / CHECKPOINTS / f"step-{step:08d}"


def discard(folder: Path) -> None:
    """Delete a checkpoint, renaming it first."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def clean(output_dir: Path) -> None:
    """Delete leftovers of checkpoints whose writing or deletion was interrupted; other files are kept."""
    for pattern in (".part-step-*", ".old-step-*"):
        for path in (output_dir / CHECKPOINTS).glob(pattern):
            for name in CHECKPOINT_FILES:
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):  # it contains other files
                path.rmdir()


def rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints except the last ``keep`` and the best."""
    for folder in checkpoints(output_dir)[:-keep]:
        if best_step is None or folder != checkpoint_path(output_dir, best_step):
            discard(folder)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
    task_state: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint of this step; every process must call it.

    Args:
        task_state: see `tasks.base.Task.state`.

    Raises:
        WriteError: it could not be written; no partial checkpoint is left.
    """
    model = accelerator.unwrap_model(model)
    # Gathering involves every process, but only the main one receives the tensors.
    weights = full_weights(model)
    averaged = None if ema is None else full_weights(ema.module)
    optimizer_state = get_optimizer_state_dict(model, inner(optimizer), options=FULL)
    if accelerator.is_main_process:
        files = {MODEL_FILE: weights, OPTIMIZER_FILE: flat_moments(optimizer_state["state"])}
        if averaged is not None:
            files[EMA_FILE] = averaged
        if task_state:
            files[TASK_FILE] = task_state
        state = {
            "progress": asdict(progress),
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
            "optimizer": optimizer_state["param_groups"],
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        write_checkpoint(checkpoint_path(output_dir, progress.step), files, json.dumps(state))
    accelerator.wait_for_everyone()


def write_checkpoint(folder: Path, files: dict[str, dict[str, Tensor]], state: str) -> None:
    """Write a checkpoint's files atomically."""
    part = folder.with_name(f".part-{folder.name}")
    with explain_write_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for name, tensors in files.items():
                save_file(tensors, part / name, metadata={"format": "pt"})
            (part / STATE_FILE).write_text(state, encoding="utf-8")
            for path in (*part.iterdir(), part):
                sync(path)
            if folder.exists():
                discard(folder)
            part.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


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
    """Load the newest intact checkpoint, the same on all processes; without any checkpoint, start from step 0.

    Damaged checkpoints are renamed to damaged-step-*, with a warning, if an intact one is left. If none is left,
    nothing is changed: starting over would silently discard the training so far.

    Args:
        max_steps: steps of the whole run; a checkpoint of a later step counts as damaged. None if the run may be
            shortened.
        load_task: see `tasks.base.Task.load_state`.

    Raises:
        ValueError: no checkpoint is intact; the message lists them and their problems.
    """
    plain = accelerator.unwrap_model(model)
    names = [[path.name for path in step_folders(output_dir)]]
    broadcast_object_list(names)
    wrong: dict[str, str] = {}

    def note(name: str, reason: str | None) -> bool:
        """Record a problem of a checkpoint on any process; return True if there is one."""
        reasons = [reason for reason in gather_object([reason]) if reason is not None]
        if reasons:
            wrong[name] = reasons[0]
        return bool(reasons)

    folders = [output_dir / CHECKPOINTS / name for name in names[0]]
    sound = [folder for folder in folders if not note(folder.name, damage(folder, max_steps, plain, ema))]
    progress = Progress()
    while sound:
        reason = None
        try:
            progress = load_checkpoint(accelerator, sound[-1], model, optimizer, schedule, ema, load_task)
        except UNREADABLE as error:
            reason = f"{sound[-1]} cannot be loaded ({error})"
        if not note(sound[-1].name, reason):
            break
        sound.pop()
    if folders and not sound:
        raise ValueError(
            f"output_dir {output_dir} has no intact checkpoint to resume from: {'; '.join(wrong.values())}. Restore "
            f"one, or delete {output_dir / CHECKPOINTS} to start from step 0"
        )
    for name, reason in wrong.items():
        aside = output_dir / CHECKPOINTS / f"damaged-{name}"
        if accelerator.is_main_process:
            log.warning(
                "%s; it was renamed to %s, and the run resumes from step %d", reason, aside.name, progress.step
            )
            with explain_write_errors(aside):
                shutil.rmtree(aside, ignore_errors=True)
                (output_dir / CHECKPOINTS / name).rename(aside)
    accelerator.wait_for_everyone()
    return progress


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
        progress = read_state(folder / STATE_FILE)[1]
        if folder.name != checkpoint_path(folder, progress.step).name:
            raise ValueError(f"{folder / STATE_FILE} is damaged: its step is {progress.step}")
        if max_steps is not None and progress.step > max_steps:
            raise ValueError(f"{folder} is of step {progress.step}, but the run has only {max_steps}")
        check_weights(model, folder / MODEL_FILE)
        if ema is not None:
            check_weights(ema.module, folder / EMA_FILE)
        check_moments(model, folder / OPTIMIZER_FILE)
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
        fields = get_type_hints(Progress)
        check_keys(state["progress"], {"step", "epoch", "step_in_epoch"}, set(state["progress"]), "progress")
        known = {name: value for name, value in state["progress"].items() if name in fields}
        for name, value in known.items():
            check_type(value, dict if name == "window" else fields[name], f"progress.{name}")
            if name in COUNTS and value < 0:
                raise ValueError(f"progress.{name} must be at least 0, got {value}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return state, Progress(**known)


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
    load_task: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> Progress:
    """Load a checkpoint into a prepared model and optimizer, on any number of processes.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another model.
    """
    state, progress = read_state(folder / STATE_FILE)
    if accelerator.is_main_process and (unknown := sorted(state["progress"].keys() - asdict(progress).keys())):
        log.warning("%s: fields of a newer version are ignored: %s", folder / STATE_FILE, ", ".join(unknown))
    model = accelerator.unwrap_model(model)
    load_weights(model, folder / MODEL_FILE)
    if ema is not None:
        load_weights(ema.module, folder / EMA_FILE)
        ema.n_averaged.fill_(progress.step)
    moments = nested_moments(load_file(folder / OPTIMIZER_FILE))
    optimizer_state = {"state": moments, "param_groups": state["optimizer"]}
    set_optimizer_state_dict(model, inner(optimizer), optimizer_state, options=FULL)
    # LambdaLR keeps its own function where the state has None.
    schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(inner(optimizer).param_groups)})
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    load_task(load_file(folder / TASK_FILE) if (folder / TASK_FILE).exists() else {})
    return progress


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


def check_weights(model: nn.Module, file: Path) -> None:
    """Refuse a weights file that does not match the model; tied weights are stored once.

    Raises:
        ValueError: it is damaged, or names or shapes differ.
    """
    found = shapes_in(file)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(shapes.keys() - tied_names(model) - found.keys())
    unexpected = sorted(found.keys() - shapes.keys())
    odd = sorted(name for name in found.keys() & shapes.keys() if found[name] != shapes[name])
    if missing or unexpected or odd:
        raise ValueError(
            f"{file} does not match the model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"different shape {odd[:3]}"
        )


def check_moments(model: nn.Module, file: Path) -> None:
    """Refuse an optimizer state that does not match the model's parameters.

    Raises:
        ValueError: it is damaged, or belongs to other parameters.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, shape in shapes_in(file).items():
        weight = name.rpartition(".")[0]
        if weight not in shapes or (shape and shape not in (shapes[weight], (1,))):
            raise ValueError(f"{file} does not match the model: {name} has the shape {list(shape)}")


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a weights file; tied weights are stored once.

    Raises:
        ValueError: it is damaged, or names or shapes differ from the model's.
    """
    check_weights(model, file)
    set_weights(model, load_file(file))


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


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the main process, tied ones once, contiguous as safetensors requires."""
    ties = tied_names(model)
    weights = get_model_state_dict(model, options=FULL)
    return {name: value.contiguous() for name, value in weights.items() if name not in ties}


def inner(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
