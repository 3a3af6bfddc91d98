"""Checkpoints: what a run needs to go on exactly where it stopped.

    <output_dir>/checkpoints/step-00001200/      model.safetensors  optimizer.safetensors  ema.safetensors  state.json

A checkpoint is written under another name and renamed when it is whole and on disk, and renamed again before it is
deleted, so a half of one is never found. One that is damaged all the same is set aside, see `resume`. Random states
are not stored: those of a step are set from (seed, step, rank), see `seed_step`.
"""

import json
import logging
import random
import shutil
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

from ..hub.saved_files import CHECKPOINT_FILES, CHECKPOINTS, EMA_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE
from ..hub.schema import check_keys, check_type
from .folder import explain_write_errors, sync

log = logging.getLogger(__name__)

# Errors of files that are damaged or of something else; others, such as too little memory, say nothing about a file.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError)
COUNTS = ("step", "epoch", "step_in_epoch", "items", "skipped", "streak", "waited", "seconds")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        epoch: epoch of the next step; step_in_epoch: its place there.
        items: items of the task's main term learned from, say target tokens.
        skipped: steps left out because a gradient was not finite; streak: how many of them in a row by now.
        best: the best value of metric_for_best_model so far, at step best_step; waited: evaluations since.
        window: sums since the last log line.
        pending: the step is to be evaluated yet: a stop came before, or in between.
        unplanned: step of the last checkpoint that a stop made; it goes with the next, so that the last N are the same
            as of a run that was not stopped.
        seconds: training time, without evaluation and set-up; logged_seconds: the same at the last log line.
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
    """Set every random generator for a step, so that it draws the same whatever came before.

    A resumed run thus repeats dropout and masks exactly, evaluation in between changes nothing, and ranks differ.
    """
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in (output_dir / CHECKPOINTS).glob("step-*") if (p / STATE_FILE).is_file())


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return output_dir / CHECKPOINTS / f"step-{step:08d}"


def discard(folder: Path) -> None:
    """Delete a checkpoint."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def clean(output_dir: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted; other files there stay."""
    for pattern in (".part-step-*", ".old-step-*"):
        for path in (output_dir / CHECKPOINTS).glob(pattern):
            for name in CHECKPOINT_FILES:
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                path.rmdir()


def rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints, all but the last ``keep`` and the best."""
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
) -> None:
    """Write everything about this step; every process calls it.

    Raises:
        WriteError: nothing of it was written.
    """
    model = accelerator.unwrap_model(model)
    # Every process takes part in gathering, and only the main one gets the tensors.
    weights = full_weights(model)
    averaged = None if ema is None else full_weights(ema.module)
    optimizer_state = get_optimizer_state_dict(model, inner(optimizer), options=FULL)
    if accelerator.is_main_process:
        files = {MODEL_FILE: weights, OPTIMIZER_FILE: flat_moments(optimizer_state["state"])}
        if averaged is not None:
            files[EMA_FILE] = averaged
        state = {
            "progress": asdict(progress),
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
            "optimizer": optimizer_state["param_groups"],
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        write_checkpoint(checkpoint_path(output_dir, progress.step), files, json.dumps(state))
    accelerator.wait_for_everyone()


def write_checkpoint(folder: Path, files: dict[str, dict[str, Tensor]], state: str) -> None:
    """Write a checkpoint's files, whole or not at all."""
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
) -> Progress:
    """Go on from the newest sound checkpoint, the same on all processes; without any, from the start.

    Damaged ones are renamed to damaged-step-*, with a warning, if a sound one is left. If none is, nothing is changed:
    starting over would silently lose the training so far.

    Args:
        max_steps: of the whole run; a checkpoint of a later step is damaged. None where a run may be shortened.

    Raises:
        ValueError: no checkpoint is sound; the message names them, and what is wrong.
    """
    plain = accelerator.unwrap_model(model)
    names = [[path.name for path in step_folders(output_dir)]]
    broadcast_object_list(names)
    wrong: dict[str, str] = {}

    def note(name: str, reason: str | None) -> bool:
        """Whether a checkpoint is wrong on any process."""
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
            progress = load_checkpoint(accelerator, sound[-1], model, optimizer, schedule, ema)
        except UNREADABLE as error:
            reason = f"{sound[-1]} cannot be loaded ({error})"
        if not note(sound[-1].name, reason):
            break
        sound.pop()
    if folders and not sound:
        raise ValueError(
            f"output_dir {output_dir} has no sound checkpoint to go on from: {'; '.join(wrong.values())}. Restore one,"
            f" or delete {output_dir / CHECKPOINTS} to start from step 0"
        )
    for name, reason in wrong.items():
        aside = output_dir / CHECKPOINTS / f"damaged-{name}"
        if accelerator.is_main_process:
            log.warning("%s; it is now %s, and the run goes on from step %d", reason, aside.name, progress.step)
            with explain_write_errors(aside):
                shutil.rmtree(aside, ignore_errors=True)
                (output_dir / CHECKPOINTS / name).rename(aside)
    accelerator.wait_for_everyone()
    return progress


def step_folders(output_dir: Path) -> list[Path]:
    """Checkpoints, oldest first, damaged or not."""
    found = (output_dir / CHECKPOINTS).glob("step-*")
    return sorted(path for path in found if any((path / name).exists() for name in CHECKPOINT_FILES))


def damage(folder: Path, max_steps: int | None, model: nn.Module, ema: AveragedModel | None) -> str | None:
    """A reason not to load a checkpoint, found in state.json and the headers of its files; None if it is sound.

    Args:
        max_steps: see `resume`.
    """
    try:
        progress = read_state(folder / STATE_FILE)[1]
        if folder.name != checkpoint_path(folder, progress.step).name:
            raise ValueError(f"{folder / STATE_FILE} is damaged: its step is {progress.step}")
        if max_steps is not None and progress.step > max_steps:
            raise ValueError(f"{folder} is of step {progress.step}, and the run has {max_steps}")
        check_weights(model, folder / MODEL_FILE)
        if ema is not None:
            check_weights(ema.module, folder / EMA_FILE)
        check_moments(model, folder / OPTIMIZER_FILE)
    except UNREADABLE as error:
        return str(error)
    return None


def read_state(file: Path) -> tuple[dict[str, Any], Progress]:
    """The content of state.json, and the progress in it.

    Fields of progress that a newer version wrote are left out.

    Raises:
        ValueError: it is missing, no JSON, or a value is missing or of the wrong type; the message names the file.
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
) -> Progress:
    """Put a checkpoint back into a prepared model and optimizer, on any number of processes.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    state, progress = read_state(folder / STATE_FILE)
    if accelerator.is_main_process and (unknown := sorted(state["progress"].keys() - asdict(progress).keys())):
        log.warning("%s: fields of a newer version are left out: %s", folder / STATE_FILE, ", ".join(unknown))
    model = accelerator.unwrap_model(model)
    load_weights(model, folder / MODEL_FILE)
    if ema is not None:
        load_weights(ema.module, folder / EMA_FILE)
        ema.n_averaged.fill_(progress.step)
    moments = nested_moments(load_file(folder / OPTIMIZER_FILE))
    optimizer_state = {"state": moments, "param_groups": state["optimizer"]}
    set_optimizer_state_dict(model, inner(optimizer), optimizer_state, options=FULL)
    # LambdaLR keeps its functions where the state says None.
    schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(inner(optimizer).param_groups)})
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress


def flat_moments(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """{weight: {key: tensor}} -> {"weight.key": tensor}, as a safetensors file has it."""
    return {f"{weight}.{key}": value.contiguous() for weight, own in moments.items() for key, value in own.items()}


def nested_moments(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat_moments`."""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        weight, key = name.rsplit(".", 1)
        moments.setdefault(weight, {})[key] = value
    return moments


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; its header alone is read.

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
    """Refuse a weights file that is not the model's; tied weights stand in it once.

    Raises:
        ValueError: it is damaged, or the names or shapes are others.
    """
    found = shapes_in(file)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(shapes.keys() - tied_names(model) - found.keys())
    unexpected = sorted(found.keys() - shapes.keys())
    odd = sorted(name for name in found.keys() & shapes.keys() if found[name] != shapes[name])
    if missing or unexpected or odd:
        raise ValueError(
            f"{file} is of another model: missing {missing[:3]}, unexpected {unexpected[:3]}, other shape {odd[:3]}"
        )


def check_moments(model: nn.Module, file: Path) -> None:
    """Refuse an optimizer's state that is not of the model's weights.

    Raises:
        ValueError: it is damaged, or of other weights.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, shape in shapes_in(file).items():
        weight = name.rpartition(".")[0]
        if weight not in shapes or (shape and shape not in (shapes[weight], (1,))):
            raise ValueError(f"{file} is of another model: {name} has the shape {list(shape)}")


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a weights file; tied weights stand in it once.

    Raises:
        ValueError: it is damaged, or the names or shapes are not the model's.
    """
    check_weights(model, file)
    set_weights(model, load_file(file))


@torch.no_grad()
def share_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics of batch norms: each has seen its own images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    running = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    if running and accelerator.num_processes > 1:
        for own, mean in zip(running, accelerator.reduce([own.clone() for own in running], "mean"), strict=True):
            own.copy_(mean)


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put full weights, tied ones once, into a model on any number of processes."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def tied_names(model: nn.Module) -> set[str]:
    """Names of weights that are the same tensor as one named before them."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered on the main process, every tied one once, contiguous, as safetensors wants them."""
    ties = tied_names(model)
    weights = get_model_state_dict(model, options=FULL)
    return {name: value.contiguous() for name, value in weights.items() if name not in ties}


def inner(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
