"""Checkpoints: what a run needs to go on exactly where it stopped.

    <output_dir>/run.json                        what the run is; another run is refused this folder
    <output_dir>/history.jsonl                   one line a log or evaluation
    <output_dir>/checkpoints/step-00001200/      model.safetensors  optimizer.safetensors  ema.safetensors  state.json

A checkpoint is written under another name and renamed when it is whole and on disk, so a half-written one is never
found. Random states are not stored: those of a step are set from (seed, step, rank), see `seed_step`.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
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

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
HISTORY_FILE = "history.jsonl"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        epoch: epoch of the next step; step_in_epoch: its place there.
        items: items of the task's main term learned from, say target tokens.
        skipped: steps left out because a gradient was not finite.
        best: the best value of best_metric so far, at step best_step; waited: evaluations since.
        window: sums since the last log line, and the number of steps in them.
        seconds: training time, without evaluation and set-up.
        finished: the run reached its end, or stopped early.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    items: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    window: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    finished: bool = False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set every random generator for a step, so that it draws the same whatever came before.

    A resumed run thus repeats dropout and masks exactly, evaluation in between changes nothing, and ranks differ.
    """
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into an error that says where, how much room there is, and that nothing was overwritten."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e6
        raise OSError(
            f"could not write {path} ({error}); {free:.0f} MB are free there. Earlier checkpoints are untouched: make "
            "room or mend the permissions, then run the same command to go on"
        ) from error


def sync(path: Path) -> None:
    """Have the system put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    with explain_write_errors(path):
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(part)
        part.replace(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in (output_dir / CHECKPOINTS).glob("step-*") if (p / "state.json").is_file())


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / CHECKPOINTS / f"step-{step:08d}"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ema: AveragedModel | None = None,
) -> None:
    """Write everything about this step; every process calls it."""
    model = accelerator.unwrap_model(model)
    weights = full_weights(model)
    moments = get_optimizer_state_dict(model, inner(optimizer), options=FULL)
    averaged = None if ema is None else full_weights(ema.module)
    if accelerator.is_main_process:
        final = checkpoint_path(output_dir, progress.step)
        part = final.with_name(f".part-{final.name}")
        with explain_write_errors(final):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
                tensors = {name: value for name, value in moments.items() if torch.is_tensor(value)}
                save_file(
                    {name: value.contiguous() for name, value in tensors.items()}, part / "optimizer.safetensors"
                )
                if averaged is not None:
                    save_file(averaged, part / "ema.safetensors")
                state = {
                    "progress": asdict(progress),
                    "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
                    "optimizer": moments["param_groups"],
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                }
                (part / "state.json").write_text(json.dumps(state))
                for file in (*part.iterdir(), part):
                    sync(file)
                shutil.rmtree(final, ignore_errors=True)
                part.replace(final)
                sync(final.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    accelerator.wait_for_everyone()


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
        ValueError: the checkpoint is of another model.
    """
    state = json.loads((folder / "state.json").read_text())
    model = accelerator.unwrap_model(model)
    progress = Progress(**state["progress"])
    load_weights(model, folder / "model.safetensors")
    if ema is not None:
        load_weights(ema.module, folder / "ema.safetensors")
        ema.n_averaged.fill_(progress.step)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        weight, key = name.rsplit(".", 1)
        moments.setdefault(weight, {})[key] = value
    set_optimizer_state_dict(
        model, inner(optimizer), {"state": moments, "param_groups": state["optimizer"]}, options=FULL
    )
    # LambdaLR keeps its functions where the state says None.
    schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(inner(optimizer).param_groups)})
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a weights file; tied weights stand in it once.

    Raises:
        ValueError: the names or shapes are not the model's.
    """
    weights = load_file(file)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(shapes.keys() - tied_names(model) - weights.keys())
    unexpected = sorted(weights.keys() - shapes.keys())
    odd = sorted(name for name in weights.keys() & shapes.keys() if tuple(weights[name].shape) != shapes[name])
    if missing or unexpected or odd:
        raise ValueError(
            f"{file} is of another model: missing {missing[:3]}, unexpected {unexpected[:3]}, other shape {odd[:3]}"
        )
    set_weights(model, weights)


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


def rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints, all but the last ``keep`` and the best."""
    for folder in checkpoints(output_dir)[:-keep]:
        if best_step is None or folder != checkpoint_path(output_dir, best_step):
            shutil.rmtree(folder)


def claim(output_dir: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Make ``output_dir`` this run's own; one process calls it, before anything is trained.

    Args:
        identity: what makes a run itself: model, data, and the knobs that change its numbers. JSON values.
        overwrite: delete another run that is there.

    Returns:
        Whether this very run was begun here before.

    Raises:
        ValueError: the folder holds another run, or other files.
        OSError: the folder cannot be written.
    """
    identity = json.loads(json.dumps(identity))
    run_file = output_dir / RUN_FILE
    if run_file.is_file():
        held = json.loads(run_file.read_text())["identity"]
        changed = sorted(k for k in held.keys() | identity.keys() if held.get(k) != identity.get(k))
        if not changed:
            for part in (output_dir / CHECKPOINTS).glob(".part-*"):
                shutil.rmtree(part)
            return True
        if not overwrite:
            shown = "; ".join(f"{k}: {held.get(k)!r} there, {identity.get(k)!r} now" for k in changed[:5])
            raise ValueError(
                f"output_dir {output_dir} holds another run ({shown}): choose another folder, or set "
                "overwrite_output_dir to delete that run"
            )
        with explain_write_errors(output_dir):
            shutil.rmtree(output_dir)
    elif output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        # Not even with overwrite: what is there was not made by a run.
        raise ValueError(f"output_dir {output_dir} is not empty and holds no run: choose another folder")
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_file, {"identity": identity})
    return False


def require_room(output_dir: Path, model: nn.Module, checkpoints: int, ema: bool) -> None:
    """Refuse to start a run whose checkpoints the disk cannot hold: weights, two moments, and the average.

    Raises:
        OSError: with the room needed and the room there is.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) * (4 if ema else 3) * (checkpoints + 1)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OSError(
            f"{checkpoints} checkpoints take about {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free for "
            f"output_dir {output_dir}: make room, or lower keep_checkpoints or average_checkpoints"
        )


class History:
    """The lines of history.jsonl; going back to an earlier step forgets what came after it."""

    def __init__(self, output_dir: Path, step: int = 0):
        self.path = output_dir / HISTORY_FILE
        rows = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # cut off in the middle of a line by a kill
        self.rows = [row for row in rows if row["step"] <= step]
        with explain_write_errors(self.path):
            part = self.path.with_name(self.path.name + ".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            part.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with explain_write_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
