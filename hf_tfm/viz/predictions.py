"""Predictions of a detector during training: the same few validation images at every evaluation.

images, each with its batch -> at each evaluation: predicted and true objects -> PNG, trackers
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from ..hub.detectors import classes
from ..writing import explain_write_errors
from .detections import objects_panel
from .mosaic import save
from .objects import Objects, Panel, found_objects, gallery, numbered_segments

FOLDER = "predictions"
THRESHOLD = 0.5  # lower than in pictures of trained models: scores are low for most of the training
COLUMNS = 4


class PredictionPictures:
    """Writes predictions/step-NNNNNNNN.png in a run's folder, and sends it to TensorBoard and Weights & Biases.

    All pictures are kept, to show the progress; one of eight images takes 0.3 MB for small ones, and about 2 MB for
    photographs.

    Args:
        accelerator: all processes compute, since sharded models need them; the main one draws.
        processor: of the model.
        predict: (model, batch) -> output.
        images: each an image (H, W, 3) in [0, 1], and the batch of it alone, with ``references``.
        masks: draw segments instead of boxes.
        output_dir: of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processor: BaseImageProcessor,
        predict: Callable[[nn.Module, dict[str, Any]], ModelOutput],
        images: Sequence[tuple[np.ndarray, dict[str, Any]]],
        masks: bool,
        output_dir: str | Path,
    ):
        self.accelerator, self.processor, self.predict = accelerator, processor, predict
        self.images, self.masks, self.folder = images, masks, Path(output_dir) / FOLDER

    @torch.inference_mode()
    def __call__(self, model: nn.Module, step: int) -> Path | None:
        """Draw the predictions of a model at a step; return the file, on the main process and if there are images."""
        training = model.training
        model.eval()
        found = []
        for _, batch in self.images:
            # One by one: the masks of all queries of a few images take gigabytes.
            inputs = send_to_device({k: v for k, v in batch.items() if k != "references"}, self.accelerator.device)
            found += found_objects(model.config, self.processor, self.predict(model, inputs), inputs, THRESHOLD)
        model.train(training)
        if not (self.images and self.accelerator.is_main_process):
            return None
        title = f"step {step}: score from {THRESHOLD:.0%} on; " + ("above" if self.masks else "dashed") + ": truth"
        figure = gallery(self.panels(found, classes(model.config)), COLUMNS, [title])
        with explain_write_errors(self.folder):
            path = save(figure, self.folder / f"step-{step:08d}.png")
        self.send(path, step)
        return path

    def panels(self, found: list[Objects], names: list[str]) -> list[Panel]:
        """Return panels with predicted and true boxes; or rows of true segments, each above the predicted ones."""
        panels: list[Panel] = []
        above: list[Panel] = []
        for (image, batch), objects in zip(self.images, found, strict=True):
            truth = true_objects(batch["references"][0], self.masks)
            title = f"{len(objects.labels)} found, {len(truth.labels)} true"
            if objects.segments is None:
                panels.append(objects_panel(title, image, names, objects, truth))
                continue
            above.append(objects_panel("truth", image, names, truth))
            panels.append(objects_panel(title, image, names, objects))
        if not above:
            return panels
        starts = range(0, len(panels), COLUMNS)
        return [panel for i in starts for panel in (*above[i : i + COLUMNS], *panels[i : i + COLUMNS])]

    def send(self, path: Path, step: int) -> None:
        """Send the picture to the trackers that accept images."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({FOLDER: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({FOLDER: [pixels]}, step=step)


def true_objects(reference: dict[str, Any], segments: bool) -> Objects:
    """Return the objects of a reference: as segments if it has them and they are asked for, else as boxes without
    crowds."""
    if segments and "segmentation" in reference:
        return numbered_segments(reference["segmentation"], reference["segments_info"], "category_id")
    single = reference["iscrowd"] == 0
    return Objects(reference["labels"][single], boxes=reference["boxes"][single])
