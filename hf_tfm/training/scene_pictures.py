"""Pictures of what a detector finds while it trains: the same few validation images at every evaluation.

rows -> some of them, evenly spread -> scenes, once -> at each evaluation: objects found and true ones -> PNG, trackers
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn

from ..data.images import IMAGE, BadImage, decode
from ..hub.detectors import classes
from ..tasks.detection import DetectionTask
from ..viz.detections import objects_panel
from ..viz.mosaic import save
from ..viz.objects import Objects, Panel, found_objects, gallery, numbered_segments
from ..writing import explain_write_errors

FOLDER = "predictions"
THRESHOLD = 0.5  # lower than in pictures of trained models: it takes long to become sure
COLUMNS = 4


class PredictionPictures:
    """Writes predictions/step-NNNNNNNN.png in a run's folder, and sends it to TensorBoard and Weights & Biases.

    All pictures are kept, for they tell a story; one of eight has 0.3 MB of small scenes, about 2 MB of photographs.

    Args:
        accelerator: all processes compute, since sharded models need them; the main one draws.
        task: of the rows.
        rows: of `scene_rows` or `panoptic_rows`.
        output_dir: of the run.
        count: images in a picture; fewer where there are fewer rows, or some cannot be read.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: DetectionTask,
        rows: datasets.Dataset,
        output_dir: str | Path,
        count: int = 8,
    ):
        self.accelerator, self.task, self.folder = accelerator, task, Path(output_dir) / FOLDER
        self.scenes: list[tuple[np.ndarray, dict[str, Any]]] = []  # image (H, W, 3) in [0, 1], batch of it alone
        for index in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist():
            row = rows[index]
            try:
                image = decode(row[IMAGE]).permute(1, 2, 0).numpy().astype(np.float32) / 255
            except BadImage:
                continue
            batch = task.collate([row], [index], epoch=0)
            if batch["images"]:
                self.scenes.append((image, batch))

    @torch.inference_mode()
    def __call__(self, model: nn.Module, step: int) -> Path | None:
        """Draw what a model finds at a step; returns the file, on the main process and where there are images."""
        training = model.training
        model.eval()
        found = []
        for _, batch in self.scenes:
            # One by one: the masks of all queries of a few images take gigabytes.
            inputs = send_to_device({k: v for k, v in batch.items() if k != "references"}, self.accelerator.device)
            found += found_objects(self.task.pixels.processor, self.task.predict(model, inputs), inputs, THRESHOLD)
        model.train(training)
        if not (self.scenes and self.accelerator.is_main_process):
            return None
        title = (
            f"step {step}: score from {THRESHOLD:.0%} on; " + ("above" if self.task.masks else "dashed") + ": truth"
        )
        figure = gallery(self.panels(found, classes(model.config)), COLUMNS, [title])
        with explain_write_errors(self.folder):
            path = save(figure, self.folder / f"step-{step:08d}.png")
        self.send(path, step)
        return path

    def panels(self, found: list[Objects], names: list[str]) -> list[Panel]:
        """Found and true boxes in one image; or rows of true segments, each above the found ones."""
        panels: list[Panel] = []
        above: list[Panel] = []
        for (image, batch), objects in zip(self.scenes, found, strict=True):
            truth = true_objects(batch["references"][0], self.task.masks)
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
        """Give the picture to the trackers that take images."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({FOLDER: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({FOLDER: [pixels]}, step=step)


def true_objects(reference: dict[str, Any], segments: bool) -> Objects:
    """A reference of a task as objects, as segments where it has them and they are asked for, else as boxes without
    crowds."""
    if segments and "segmentation" in reference:
        return numbered_segments(reference["segmentation"], reference["segments_info"], "category_id")
    single = reference["iscrowd"] == 0
    return Objects(reference["labels"][single], boxes=reference["boxes"][single])
