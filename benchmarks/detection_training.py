"""Detection training speed: our model and step against transformers' and the authors', ResNet-50, auxiliary losses on.

python -m benchmarks detection_training [--authors DIR] [--architecture deformable_detr --height 256 --width 256]

Training steps (forward, matching, losses, backward, clipping, AdamW) on random images, interleaved, in fp32 and bf16
autocast. Ours uses `train_step`; the peers use a plain loop with clipping at 0.1. transformers' model has our weights;
it freezes no part of a timm backbone (5.23), ours and the authors' freeze the stem and the first stage.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common, peers
from .detection_peers import Labels, authors_loss, native, ours, scenes
from .detection_peers import authors as authors_model


class Scenes:
    """The task of a batch {"x", "mask", "labels"} for `train_step`.

    Args:
        model: counts the items of a batch.
    """

    item = term = "image"

    def __init__(self, model: Any):
        self.model = model

    def count(self, batch: dict[str, Any]) -> dict[str, float]:
        items = self.model.count_items(batch["labels"])
        return {"image": len(batch["x"]), "class": items["loss_ce"], "box": items["loss_bbox"]}

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        sums = model(batch["x"], batch["mask"], labels=batch["labels"]).loss_sums
        return {"class": sums["loss_ce"], "box": sums["loss_bbox"] + sums["loss_giou"]}


def trainer(model: nn.Module, loss: Callable[[], Tensor], precision: str, device: str) -> Callable[[], None]:
    """A function that performs one training step of another library's model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=1e-4)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def our_trainer(architecture: str, batch: dict[str, Any], precision: str, device: str) -> Callable[[], None]:
    """A function that performs one training step of our model."""
    AcceleratorState._reset_state()  # otherwise one process may have only one precision
    accelerator = Accelerator(mixed_precision=precision)
    model = ours(architecture).to(device).train()
    args = TrainingArguments(output_dir=".", max_steps=1, learning_rate=1e-5, weight_decay=1e-4)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    return lambda: train_step(accelerator, Scenes(model), prepared, optimizer, [batch], max_grad_norm=0.1)


def implementations(
    architecture: str, pixels: Tensor, mask: Tensor, labels: Labels, folder: str | None, precision: str
) -> dict[str, Callable[[], Any]]:
    """A training step of each variant."""
    device = pixels.device.type
    theirs = native(ours(architecture)).to(device).train()
    found = {
        "ours": our_trainer(architecture, {"x": pixels, "mask": mask, "labels": labels}, precision, device),
        "transformers": trainer(theirs, lambda: theirs(pixels, mask, labels=labels).loss, precision, device),
    }
    if folder:
        model, criterion = authors_model(folder)
        model, criterion = model.to(device).train(), criterion.to(device).train()
        loss = partial(authors_loss, model, criterion, pixels, mask, labels)
        found["authors"] = trainer(model, loss, precision, device)
    return found


def main(
    precisions: tuple[str, ...] = ("no", "bf16"),
    batch_size: int = 2,
    height: int = 800,
    width: int = 800,
    objects: int = 20,
    rounds: int = 3,
    authors: str | None = None,
    architecture: str = "detr",
) -> None:
    """Measure and write benchmarks/results/detection_training.json, or ARCHITECTURE_training.json.

    Args:
        precisions: no (float32) and bf16.
        batch_size: images per step.
        height, width: pixels.
        objects: objects per image.
        rounds: timed rounds of one step each; medians are reported.
        authors: folder of a copy of facebookresearch/detr.
        architecture: detr or deformable_detr.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, mask, labels = scenes(batch_size, height, width, objects)
    pixels, mask = pixels.to(device), mask.to(device)
    labels = [{name: value.to(device) for name, value in label.items()} for label in labels]
    variants: dict[str, Callable[[int], float]] = {}
    flops: dict[str, float] = {}
    for precision in precisions:
        label = "fp32" if precision == "no" else precision
        for name, step in implementations(architecture, pixels, mask, labels, authors, precision).items():
            if precision == precisions[0]:
                with FlopCounterMode(display=False) as counter:
                    step()
                flops[name] = counter.get_total_flops()
            variants[f"{name} {label}"] = partial(one, step, batch_size)
    rates = common.interleaved(variants, rounds)
    labels_of = {"no": "fp32", "bf16": "bf16"}
    common.write(
        "detection_training" if architecture == "detr" else f"{architecture}_training",
        {
            "architecture": architecture,
            "batch_size": batch_size,
            "height": height,
            "width": width,
            "objects": objects,
            "rounds": rounds,
            "images_per_second": {name: round(statistics.median(r), 3) for name, r in rates.items()},
            "ratios": ratios(rates),
            "gflop_a_step": {name: round(value / 1e9) for name, value in flops.items()},
            "share_of_floor": {
                labels_of[p]: round(
                    statistics.median(rates[f"ours {labels_of[p]}"])
                    / batch_size
                    * flops["ours"]
                    / common.matmul_rate(peers.dtype_of(p)),
                    3,
                )
                for p in precisions
            },
        },
    )


def one(step: Callable[[], None], batch_size: int, number: int) -> int:
    """One step; returns its number of images."""
    step()
    return batch_size


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Ratio of ours to each peer at the same precision, and of ours in bf16 to each peer in float32."""
    found = {}
    for name in rates:
        who, precision = name.split()
        if who == "ours":
            continue
        found[f"ours / {who}, {precision}"] = round(common.ratio(rates, f"ours {precision}", name), 2)
        if precision == "fp32" and "ours bf16" in rates:
            found[f"ours bf16 / {who} fp32"] = round(common.ratio(rates, "ours bf16", name), 2)
    return found
