"""Draw objects on images: boxes with class and score, or coloured segments with names; single images and galleries.

output of a model -> `found_objects` -> `Panel` -> `gallery` -> PNG

Shapes: H, W pixels of an image; n objects. Lengths are in inches.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import distance_transform_edt
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.utils import ModelOutput

from ..hub.detectors import PANOPTIC_THRESHOLD, detections, panoptic_maps
from .grid import DPI, GAP, LETTER, SMALL
from .mosaic import LINE

BOX_THRESHOLD = 0.7  # as in the authors' demo
COVER = 0.55  # opacity of segments


@dataclass(frozen=True)
class Objects:
    """Predicted or ground-truth objects of an image, as boxes or segments.

    Args:
        labels: (n,) classes.
        scores: (n,) in [0, 1]; None for ground truth.
        boxes: (n, 4) left, top, right, bottom in pixels.
        segments: (H, W) index of the object at each pixel, -1 for none.
    """

    labels: np.ndarray
    scores: np.ndarray | None = None
    boxes: np.ndarray | None = None
    segments: np.ndarray | None = None

    def captions(self, names: Sequence[str]) -> list[str]:
        """Return the caption of each object: its class, and its score if it has one."""
        words = [names[label] for label in self.labels.tolist()]
        if self.scores is None:
            return words
        return [f"{word} {score:.0%}" for word, score in zip(words, self.scores.tolist(), strict=True)]


def found_objects(
    config: PreTrainedConfig,
    processor: BaseImageProcessor,
    output: ModelOutput,
    batch: dict[str, Any],
    threshold: float | None = None,
) -> list[Objects]:
    """Return the objects detected in each image of a batch: segments if the model predicts masks, otherwise boxes.

    Args:
        config: of the model.
        batch: from a task or from `processed`.
        threshold: minimum score in [0, 1]; by default 0.7 for boxes and 0.85 for segments, as in the authors' code.

    Raises:
        ValueError: the threshold is out of range.
    """
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if output.get("pred_masks") is not None:
        maps = panoptic_maps(processor, output, batch, PANOPTIC_THRESHOLD if threshold is None else threshold)
        return [numbered_segments(one["segmentation"].cpu().numpy(), one["segments_info"], "label_id") for one in maps]
    least = BOX_THRESHOLD if threshold is None else threshold
    found = []
    for one in detections(config, processor, output, batch):
        labels, scores, boxes = (one[name].float().cpu().numpy() for name in ("labels", "scores", "boxes"))
        good = scores >= least
        found.append(Objects(labels[good].astype(np.int64), scores[good], boxes[good]))
    return found


def numbered_segments(ids: np.ndarray, segments: Sequence[dict], label_key: str) -> Objects:
    """Convert a map of segment ids (H, W) and their descriptions, as for `PanopticQuality`, to objects."""
    numbers = np.full(ids.shape, -1)
    for number, segment in enumerate(segments):
        numbers[ids == segment["id"]] = number
    scores = [segment["score"] for segment in segments if "score" in segment]
    labels = np.array([segment[label_key] for segment in segments], np.int64)
    return Objects(labels, np.array(scores) if len(scores) == len(labels) > 0 else None, segments=numbers)


def class_colour(label: int, instance: int = 0) -> np.ndarray:
    """Return the RGB colour of a class in [0, 1]: hue varies between classes, brightness between instances."""
    return hsv_to_rgb((label * 0.618034 % 1.0, 0.85, (0.95, 0.7, 0.82)[instance % 3]))


@dataclass(frozen=True)
class Panel:
    """An image of a gallery.

    Args:
        image: (H, W, 3) in [0, 1].
        title: title above it.
        draw: draws on it, given its axes and the font size in points.
    """

    image: np.ndarray
    title: str
    draw: Callable[[Axes, float], None] | None = None


def draw_boxes(ax: Axes, objects: Objects, names: Sequence[str], font: float, true: bool = False) -> None:
    """Draw boxes in class colours, the best on top; ground-truth ones are dashed white, with the class inside."""
    order = range(len(objects.labels)) if objects.scores is None else np.argsort(objects.scores)
    captions = objects.captions(names)
    for i in order:
        left, top, right, bottom = objects.boxes[i].tolist()
        colour = np.ones(3) if true else class_colour(int(objects.labels[i]))
        style = {"edgecolor": colour, "linewidth": font / 5, "linestyle": (0, (2, 2)) if true else "solid"}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
        if true:
            write(ax, captions[i], (left, bottom), (right, bottom), font - 1, colour)
        else:
            write(ax, captions[i], (left, top), (right, top), font, colour)


def draw_segments(ax: Axes, image: np.ndarray, objects: Objects, names: Sequence[str], font: float) -> None:
    """Draw segments in class colours on an image (H, W, 3), with white edges and centred names."""
    numbers, shown = objects.segments, image.copy()
    seen: dict[int, int] = {}
    texts = objects.captions(names)
    anchors = []
    for number, label in enumerate(objects.labels.tolist()):
        colour = class_colour(label, seen.get(label, 0))
        seen[label] = seen.get(label, 0) + 1
        inside = numbers == number
        if not inside.any():
            continue
        shown[inside] = (1 - COVER) * shown[inside] + COVER * colour
        depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]  # the image border counts as an edge
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        anchors.append((texts[number], (x, y), colour))
    edges = np.zeros(numbers.shape, bool)
    edges[1:] |= numbers[1:] != numbers[:-1]
    edges[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    shown[edges] = 1.0
    ax.imshow(shown, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for text, (x, y), colour in anchors:
        half = min(text_width(ax, text, font), numbers.shape[1]) / 2
        label_at(ax, text, np.clip(x, half, numbers.shape[1] - half), y, font, colour, ha="center", va="center")


def write(
    ax: Axes, text: str, left: tuple[float, float], right: tuple[float, float], font: float, colour: np.ndarray
) -> None:
    """Write a caption above the line from left to right, or below it if there is no room."""
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    high, wide = 1.5 * font / 72 * inch(ax), text_width(ax, text, font)
    x, align = left[0], "left"
    if x + wide > width:
        x, align = min(right[0], width), "right"
    x, align = (0.0, "left") if align == "right" and x < wide else (x, align)
    y, above = (left[1], "bottom") if left[1] >= high else (max(left[1], 0.0), "top")
    label_at(ax, text, max(x, 0.0), min(y, height), font, colour, ha=align, va=above)


def inch(ax: Axes) -> float:
    """Return the number of image pixels per inch of the figure."""
    return ax.get_xlim()[1] / (ax.get_position().width * ax.figure.get_figwidth())


def text_width(ax: Axes, text: str, font: float) -> float:
    """Estimate the width of a caption in image pixels."""
    return (LETTER * font * len(text) + 0.05) * inch(ax)


def label_at(ax: Axes, text: str, x: float, y: float, font: float, colour: np.ndarray, **align: str) -> None:
    """Write text on a coloured background, in black or white for contrast."""
    ink = "black" if colour @ (0.299, 0.587, 0.114) > 0.5 else "white"
    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    ax.text(x, y, text, fontsize=font, color=ink, bbox=box, clip_on=True, parse_math=False, **align)


def gallery(panels: Sequence[Panel], columns: int, title: Sequence[str] = (), side: float = 3.0) -> Figure:
    """Arrange images in rows, each with a title and its own aspect ratio.

    Args:
        panels: images to draw.
        columns: number of panels per row.
        title: lines above all; long ones are wrapped.
        side: length of the longer side of an image.
    """
    columns = min(columns, len(panels))
    font = float(np.clip(2.2 * side, 6.0, 10.0))
    sizes = [tuple(side * s / max(panel.image.shape[:2]) for s in panel.image.shape[:2]) for panel in panels]
    titles = [textwrap.fill(panel.title, max(int(side / (LETTER * SMALL)), 4)) for panel in panels]
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    heads = [LINE * max(titles[i].count("\n") + bool(titles[i]) for i in row) + 0.05 for row in rows]
    tops = [max(sizes[i][0] for i in row) for row in rows]
    column = max(width for _, width in sizes)
    width = max(columns * (column + GAP) + GAP, 4.0)
    lines = [part for line in title for part in textwrap.wrap(line, int(width / (LETTER * SMALL)) - 2)]
    height = GAP + LINE * len(lines) + sum(heads) + sum(tops) + GAP * len(rows)
    figure = Figure(figsize=(width, height), dpi=DPI)
    letters = {"fontsize": SMALL, "parse_math": False}
    figure.text(GAP / width, 1 - 0.08 / height, "\n".join(lines), va="top", **letters)
    y = height - GAP / 2 - LINE * len(lines)
    for row, head, tallest in zip(rows, heads, tops, strict=True):
        y -= head
        for place, i in enumerate(row):
            h, w = sizes[i]
            x = GAP + place * (column + GAP) + (column - w) / 2
            ax = figure.add_axes((x / width, (y - h) / height, w / width, h / height))
            ax.imshow(panels[i].image, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            ax.set_axis_off()
            figure.text((x + w / 2) / width, (y + 0.04) / height, titles[i], ha="center", va="bottom", **letters)
            limits = ax.get_xlim(), ax.get_ylim()
            if panels[i].draw is not None:
                panels[i].draw(ax, font)
            ax.set(xlim=limits[0], ylim=limits[1])
        y -= tallest + GAP
    return figure
