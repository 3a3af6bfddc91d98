"""Detections of a model in an image: boxes with class and score, or segments for a model with masks.

PIL image -> the model's own processor -> model -> boxes and segments in the image's pixels -> PNG
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..hub.detectors import classes, detections, predict, processed
from .images import NamedImage, name_of
from .mosaic import save
from .objects import Objects, Panel, draw_boxes, draw_segments, found_objects, gallery

LARGEST, SIDE = 9.0, 3.5  # longer side in inches, of a single image and of each of several


@dataclass(frozen=True)
class Detections:
    """Objects that a model detected in one image.

    Args:
        model: name of the model.
        name: name of the image.
        image: (H, W, 3) float32 in [0, 1].
        classes: class names of the model.
        objects: objects with a score above the threshold.
        best: class and score of the best object, even if below the threshold.
    """

    model: str
    name: str
    image: np.ndarray
    classes: list[str]
    objects: Objects
    best: str

    @property
    def title(self) -> str:
        """Title with the image's name and the number of objects."""
        kind = "object" if self.objects.segments is None else "segment"
        count = len(self.objects.labels)
        if not count:
            return f"{self.name}: no {kind} above the threshold; the best is {self.best}"
        return f"{self.name}: {count} {kind}{'s' if count > 1 else ''}"


def read_pixels(image: NamedImage) -> Tensor:
    """Convert an image to uint8 (3, H, W)."""
    return pil_to_tensor(image.image.convert("RGB"))


def detect(
    model: PreTrainedModel, processor: BaseImageProcessor, image: NamedImage, threshold: float | None = None
) -> Detections:
    """Detect the objects in an image.

    Args:
        model: a detector of this package or of transformers. It runs without dropout, and its state is restored.
        processor: processor of the model.
        image: result of `read_image`.
        threshold: see `found_objects`.

    Raises:
        ValueError: the threshold is out of range.
    """
    pixels = read_pixels(image)
    batch = send_to_device(processed(processor, [pixels]), model.device)
    training = model.training
    model.eval()
    try:
        output = predict(model, batch)
    finally:
        model.train(training)
    names = classes(model.config)
    (objects,) = found_objects(model.config, processor, output, batch, threshold)
    (everything,) = detections(model.config, processor, output, batch)
    first = int(torch.argmax(everything["scores"]))
    best = f"{names[int(everything['labels'][first])]} {everything['scores'][first]:.0%}"
    shown = pixels.permute(1, 2, 0).numpy().astype(np.float32) / 255
    return Detections(name_of(model), image.name, shown, names, objects, best)


def objects_panel(
    title: str, image: np.ndarray, names: Sequence[str], objects: Objects, true: Objects | None = None
) -> Panel:
    """Create a `Panel` of an image with its objects; ground-truth boxes, if given, are dashed."""

    def draw(ax: Axes, font: float) -> None:
        if objects.segments is not None:
            draw_segments(ax, image, objects, names, font)
            return
        if true is not None:
            draw_boxes(ax, true, names, font, true=True)
        draw_boxes(ax, objects, names, font)

    return Panel(image, title, draw)


def plot_detections(found: Sequence[Detections], output: str | Path) -> Path:
    """Plot the detections in one image, or in several side by side.

    Args:
        found: results of `detect`.
        output: a ".png" file.
    """
    panels = [objects_panel(one.title, one.image, one.classes, one.objects) for one in found]
    side = LARGEST if len(found) == 1 else SIDE
    return save(gallery(panels, columns=3, title=[found[0].model], side=side), output)
