"""Time of the parts of a detector's training step, from image files to weights.

python -m benchmarks detection_step --data DATA --backbone FOLDER

Runs the recipe `detection_train` with the preset `finetune_small` on the detection data set DATA. Images are decoded
and augmented in the training process, so their cost adds to that of the step; with ``dataloader_num_workers`` they are
prepared beside it. Without a backbone's folder the backbone of the preset has random weights, which costs the same.
"""

import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.swa_utils import AveragedModel

from hf_tfm import TfmDeformableDetrForObjectDetection
from hf_tfm.models import modeling_deformable_detr, set_loss
from hf_tfm.tasks.scenes import SceneCollator
from hf_tfm.training import session

from . import common

RECIPE = Path(__file__).parent.parent / "recipes" / "detection_train.py"
MODEL = ("forward", "backward", "optimizer")
OTHER = "loop and logging"


class Parts:
    """Seconds that each named part of a step took, without the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]  # seconds of finished parts within each part that is running

    def timed(self, name: str, function: Callable) -> Callable:
        """Return ``function`` with its seconds added to the part ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inner.pop()
                self.inner[-1] += took

        return call


@contextmanager
def watched(parts: Parts, steps: list[dict[str, float]]) -> Iterator[None]:
    """Time the parts of every training step within; ``steps`` gets one dictionary per step, from one step's end to
    the next's."""
    ended = [time.perf_counter()]
    step = session.Session.step

    def whole(self: Any, *args: Any) -> None:
        step(self, *args)
        now = time.perf_counter()
        found = dict(parts.seconds)
        steps.append(found | {OTHER: now - ended[0] - sum(found.values())})
        parts.seconds.clear()
        ended[0] = now

    places = [
        (SceneCollator, "__call__", "decoding and augmentation"),
        (TfmDeformableDetrForObjectDetection, "forward", "forward"),
        (modeling_deformable_detr, "detection_losses", "loss without matching"),
        (set_loss, "match_sets", "matching"),
        (Accelerator, "backward", "backward"),
        (Accelerator, "clip_grad_norm_", "optimizer"),
        (AcceleratedOptimizer, "step", "optimizer"),
        (AveragedModel, "update_parameters", "average of weights"),
    ]
    patches = [patch.object(owner, name, parts.timed(part, getattr(owner, name))) for owner, name, part in places]
    patches.append(patch.object(session.Session, "step", whole))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def main(
    data: str = "digit-scenes", backbone: str | None = None, max_steps: int = 60, warm_up: int = 10, options: str = ""
) -> None:
    """Measure and write benchmarks/results/detection_step.json.

    Args:
        data: detection data set, as for --dataset_name.
        backbone: folder of a timm model, as for --backbone.
        max_steps, warm_up: steps of the run, of which the first are not counted.
        options: more options of the recipe, separated by spaces.
    """
    parts, steps = Parts(), []
    with tempfile.TemporaryDirectory() as folder, watched(parts, steps):
        given = {
            **{"config": "finetune_small", "dataset_name": data, "output_dir": f"{folder}/run"},
            **({"backbone": backbone} if backbone else {"pretrained_backbone": "false"}),
            **{"num_train_epochs": "null", "max_steps": max_steps, "eval_steps": max_steps, "warmup_steps": warm_up},
            **{"dataloader_num_workers": 0, "progress": "false"},
        }
        argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        if runpy.run_path(str(RECIPE))["main"]([*argv, *options.split()]):
            raise SystemExit("the recipe failed")
    common.write("detection_step", {"data": Path(data).name, "options": options, **summary(steps[warm_up:])})


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Return milliseconds of a step, the share of each part, and the share of all that is not the model.

    Args:
        steps: seconds of each part, by step. The median step is that of the total; shares are those of sums.
    """
    names = sorted({name for step in steps for name in step}, key=lambda name: (name not in MODEL, name))
    totals = {name: sum(step.get(name, 0.0) for step in steps) for name in names}
    whole = sum(totals.values())
    return {
        "steps": len(steps),
        "median_milliseconds": round(1e3 * statistics.median(sum(step.values()) for step in steps), 1),
        "bfloat16_matmul_gflops": round(common.matmul_rate(torch.bfloat16) / 1e9),
        "share": {name: round(total / whole, 4) for name, total in totals.items()},
        "share_not_model": round(sum(total for name, total in totals.items() if name not in MODEL) / whole, 4),
    }
