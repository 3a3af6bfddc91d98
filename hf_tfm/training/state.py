"""Checkpoints: what a run needs to go on exactly where it stopped.

    <output_dir>/checkpoints/step-00001200/      model.safetensors  optimizer.safetensors  ema.safetensors  state.json

A checkpoint is written under another name and renamed when it is whole and on disk, and renamed again before it is
deleted, so a half of one is never found. Random states are not stored: those of a step are set from
(seed, step, rank), see `seed_step`.
"""

import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
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

from .folder import explain_write_errors, sync

CHECKPOINTS = "checkpoints"
MODEL_FILE, OPTIMIZER_FILE, EMA_FILE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE_FILE = "state.json"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        epoch: epoch of the next step; step_in_epoch: its place there.
        items: items of the task's main term learned from, say target tokens.
        skipped: steps left out because a gradient was not finite; streak: how many of them in a row by now.
        best: the best value of best_metric so far, at step best_step; waited: evaluations since.
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
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for path in (output_dir / CHECKPOINTS).glob("*"):
        if path.is_dir() and not (path.name.startswith("step-") and (path / STATE_FILE).is_file()):
            shutil.rmtree(path)


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
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    progress = Progress(**state["progress"])
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
