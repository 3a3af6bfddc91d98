"""Object queries of a DETR (Carion et al. 2020, arXiv:2005.12872, figures 6 and 7).

    one image  -> cross-attention of the last decoder layer, mean over heads -> each confident query over the image
    a data set -> every query's box in every image -> one plot per query: box centres, coloured by shape

Shapes: Q queries; n of them selected; H heads; N = rows x columns cells of the feature map; I images.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.images import IMAGE, BadImage, decode
from ..hub.detectors import classes, predict, processed
from .attention import forming_maps
from .detections import read_pixels
from .grid import DPI, SMALL
from .image_maps import overlay, scaled
from .images import NamedImage, name_of, visible
from .mosaic import save
from .objects import BOX_THRESHOLD, Objects, Panel, draw_boxes, gallery

log = logging.getLogger(__name__)

AT_LEAST = 4  # number of queries to draw if none is confident
SLOTS = 20  # queries to draw for a data set, as in the paper


@dataclass(frozen=True)
class QueryMaps:
    """Attention maps of a detector's confident queries for one image.

    Args:
        model: name of the model.
        name: name of the image.
        image: (H, W, 3) float32 in [0, 1], as the model reads it, without padding.
        classes: class names of the model.
        queries: (n,) query indices, the most confident first.
        objects: objects that they detected, in pixels of ``image``.
        maps: (n, rows, columns) float32, attention to each cell, without padding.
    """

    model: str
    name: str
    image: np.ndarray
    classes: list[str]
    queries: np.ndarray
    objects: Objects
    maps: np.ndarray


@torch.no_grad()
def query_maps(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    image: NamedImage,
    threshold: float = BOX_THRESHOLD,
    most: int = 15,
) -> QueryMaps:
    """Run a detector on one image and return the attention maps of its queries.

    Args:
        model: a DETR whose queries attend to one feature map: ours, `DetrForObjectDetection`, `DetrForSegmentation`
            and the like. It runs without dropout, and its state is restored.
        processor: processor of the model.
        image: result of `read_image`.
        threshold: minimum score of a query, in [0, 1]; if none reaches it, the four best are used.
        most: maximum number of queries.

    Raises:
        ValueError: an option is out of range, or the model has no such attention.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    batch = send_to_device(processed(processor, [read_pixels(image)]), model.device)
    with forming_maps(model):
        output, grid = with_grid(model, batch)
    height, width = batch["labels"][0]["size"].tolist()
    rows, columns = (
        -(-side * cells // whole)
        for side, cells, whole in zip((height, width), grid, batch["pixel_values"].shape[2:], strict=True)
    )
    maps = output.cross_attentions[-1][0].mean(dim=0).unflatten(-1, grid)[:, :rows, :columns]  # (Q, rows, columns)
    scores, labels, boxes = query_objects(output, len(model.config.id2label), (height, width))
    order = scores.argsort(descending=True, stable=True)
    count = min(max(int((scores >= threshold).sum()), 0) or AT_LEAST, most)
    chosen = order[:count]
    labels, scores, boxes, maps = (value[chosen].float().cpu().numpy() for value in (labels, scores, boxes, maps))
    return QueryMaps(
        model=name_of(model),
        name=image.name,
        image=visible(processor, batch["pixel_values"])[:height, :width],
        classes=classes(model.config),
        queries=chosen.cpu().numpy(),
        objects=Objects(labels.astype(np.int64), scores, boxes),
        maps=maps,
    )


def with_grid(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[ModelOutput, tuple[int, int]]:
    """Run a DETR with cross-attention maps; return its output and the (rows, columns) of the feature map.

    Raises:
        ValueError: it has no single feature map, or no maps over all of its cells.
    """
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "input_projection"]
    sizes: list[tuple[int, int]] = []
    # The layer before the encoder has the same name in our model and in transformers', and gives the size for any
    # backbone.
    hooks = [m.register_forward_hook(lambda *args: sizes.append(tuple(args[-1].shape[2:]))) for m in found]
    try:
        output = predict(model, batch, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    maps = output.get("cross_attentions")
    if len(sizes) != 1 or not maps or maps[-1].shape[-1] != sizes[0][0] * sizes[0][1]:
        raise ValueError(
            f"{type(model).__name__} has no attention of its queries over one feature map: these pictures are for DETR"
        )
    return output, sizes[0]


def query_objects(output: ModelOutput, num_labels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return score (Q,), class (Q,) and box (Q, 4) in pixels of all queries, in their order.

    The post-processing of some models reorders queries, so it is not used.
    """
    logits = output.logits[0].float()
    # DETR has a "no object" class; later models without one score each class independently.
    shares = logits.softmax(dim=-1)[:, :-1] if logits.shape[-1] == num_labels + 1 else logits.sigmoid()
    scores, labels = shares.max(dim=-1)
    x, y, w, h = output.pred_boxes[0].float().unbind(dim=-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    return scores, labels, corners * corners.new_tensor([size[1], size[0]] * 2)


def plot_queries(maps: QueryMaps, output: str | Path) -> Path:
    """Plot the attention of each query over the image with its box; the first panel shows all boxes.

    Args:
        maps: result of `query_maps`.
        output: a ".png" file.
    """

    def box_of(which: Sequence[int]):
        own = Objects(maps.objects.labels[which], maps.objects.scores[which], maps.objects.boxes[which])
        return lambda ax, font: draw_boxes(ax, own, maps.classes, font)

    every = list(range(len(maps.queries)))
    panels = [Panel(maps.image, "all of these", box_of(every))]
    for i, (query, weights) in enumerate(zip(maps.queries.tolist(), maps.maps, strict=True)):
        panels.append(Panel(overlay(maps.image, scaled(weights)), f"query {query}", box_of([i])))
    title = [f"{maps.model}, {maps.name}: where queries look in the last decoder layer, mean over heads, largest at 1"]
    return save(gallery(panels, columns=4, title=title), output)


def read_images(rows: datasets.Dataset) -> Iterable[Tensor]:
    """Yield the images of `image_rows` as uint8 (3, H, W); unreadable ones are skipped with a warning."""
    for i, row in enumerate(rows):
        try:
            yield decode(row[IMAGE])
        except BadImage as error:
            log.warning("image %d is left out: %s", i, error)


@torch.no_grad()
def query_boxes(model: PreTrainedModel, processor: BaseImageProcessor, images: Iterable[Tensor]) -> np.ndarray:
    """Return the predicted box of every query, whatever its score.

    Args:
        model: a detector. It runs without dropout, and its state is restored.
        processor: processor of the model.
        images: uint8 (3, H, W), read one at a time.

    Returns:
        (I, Q, 4) float32, cxcywh relative to the image size.

    Raises:
        ValueError: there are no images.
    """
    training = model.training
    model.eval()
    try:
        found = [
            predict(model, send_to_device(processed(processor, [image]), model.device)).pred_boxes.float().cpu()
            for image in images
        ]
    finally:
        model.train(training)
    if not found:
        raise ValueError("images must hold at least one that can be read")
    return torch.cat(found).numpy()


def shape_colours(boxes: np.ndarray) -> np.ndarray:
    """Return the RGB colour of boxes (n, 4) cxcywh: green if small, red if wide, blue if tall, violet if both."""
    width, height = boxes[:, 2].clip(0, 1), boxes[:, 3].clip(0, 1)
    return np.stack([width, 1 - np.maximum(width, height), height], axis=-1)


def plot_query_slots(
    boxes: np.ndarray, output: str | Path, title: str = "", queries: Sequence[int] | None = None
) -> Path:
    """Plot the centres of all boxes of each query in the unit square (figure 7).

    Args:
        boxes: result of `query_boxes`.
        output: a ".png" file.
        title: title of the figure.
        queries: query indices; by default the first 20.

    Raises:
        ValueError: a query does not exist.
    """
    count = boxes.shape[1]
    queries = list(range(min(SLOTS, count))) if queries is None else list(queries)
    if not queries or any(not 0 <= query < count for query in queries):
        raise ValueError(f"queries must be one or more of 0 to {count - 1}, got {queries}")
    columns, side = min(5, len(queries)), 1.8
    lines = -(-len(queries) // columns)
    head = 0.55
    width, height = columns * (side + 0.1) + 0.1, lines * (side + 0.3) + head
    figure = Figure(figsize=(max(width, 4.0), height), dpi=DPI)
    letters = {"fontsize": SMALL, "parse_math": False}
    about = f"each of {len(boxes)} boxes by its centre: green small, red wide, blue tall, violet large"
    figure.text(0.1 / figure.get_figwidth(), 1 - 0.08 / height, f"{title}\n{about}", va="top", **letters)
    for i, query in enumerate(queries):
        x, y = 0.1 + i % columns * (side + 0.1), height - head - (i // columns + 1) * (side + 0.3) + 0.1
        place = (x / figure.get_figwidth(), y / height, side / figure.get_figwidth(), side / height)
        slot(figure.add_axes(place), boxes[:, query], f"query {query}")
    return save(figure, output)


def slot(ax: Axes, boxes: np.ndarray, title: str) -> None:
    """Draw one panel of `plot_query_slots`: boxes (I, 4)."""
    size = float(np.clip(300 / len(boxes), 2, 12))
    ax.scatter(boxes[:, 0], boxes[:, 1], s=size, c=shape_colours(boxes), linewidths=0)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])  # the y axis points down, as in images
    ax.set_title(title, fontsize=SMALL, pad=2)
