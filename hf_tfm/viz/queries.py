"""Object queries of a DETR (Carion et al. 2020, arXiv:2005.12872, figures 6 and 7) or Deformable DETR (Zhu et al.
2021, arXiv:2010.04159, figure 6).

    one image  -> cross-attention of the last decoder layer -> each confident query over the image: a map over all
                  cells, mean over heads, or the points that it samples
    a data set -> every query's box in every image -> one plot per query: box centres, coloured by shape

A detector says what its queries attend to in its class attribute ``query_attention``, a name of `KINDS`.

Shapes: Q queries; n of them selected; H heads; N = rows x columns cells of the feature map; K sampled points of a
query, of all heads and levels; I images.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.images import IMAGE, BadImage, decode
from ..hub.detectors import class_scores, classes, predict, processed
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


@dataclass(frozen=True, kw_only=True)
class QueryAttention:
    """Attention of a detector's chosen or confident queries in one image.

    Args:
        model: name of the model.
        name: name of the image.
        image: (H, W, 3) float32 in [0, 1], as the model reads it, without padding.
        classes: class names of the model.
        queries: (n,) query indices: as chosen, or the most confident first.
        objects: objects that they detected, in pixels of ``image``.
    """

    about: ClassVar[str] = ""  # what is drawn

    model: str
    name: str
    image: np.ndarray
    classes: list[str]
    queries: np.ndarray
    objects: Objects

    def shown(self, i: int) -> np.ndarray:
        """Return the image of the panel of the i-th selected query."""
        return self.image

    def draw(self, i: int, ax: Axes, font: float) -> None:
        """Draw on the panel of the i-th selected query, below its box."""


@dataclass(frozen=True, kw_only=True)
class QueryMaps(QueryAttention):
    """Attention over all cells of a feature map.

    Args:
        maps: (n, rows, columns) float32, attention to each cell, without padding.
    """

    about: ClassVar[str] = "where queries look in the last decoder layer, mean over heads, largest at 1"

    maps: np.ndarray

    def shown(self, i: int) -> np.ndarray:
        """Return the image with the map over it."""
        return overlay(self.image, scaled(self.maps[i]))


@dataclass(frozen=True, kw_only=True)
class QueryPoints(QueryAttention):
    """Attention to sampled points.

    Args:
        points: (n, K, 2) float32, x and y in pixels of ``image``; some may be outside.
        weights: (n, K) float32, attention to each point; those of a head sum to 1.
    """

    about: ClassVar[str] = (
        "points that queries sample in the last decoder layer, all heads and levels; larger and lighter: more weight"
    )

    points: np.ndarray
    weights: np.ndarray

    def draw(self, i: int, ax: Axes, font: float) -> None:
        """Draw the points, those with the largest weight on top, with area and colour by weight."""
        order = np.argsort(self.weights[i])
        points, share = self.points[i][order], self.weights[i][order] / max(self.weights[i].max(), 1e-12)
        ax.scatter(
            points[:, 0],
            points[:, 1],
            s=(font / 2) ** 2 * (0.1 + share),
            c=share,
            cmap="plasma",
            vmin=0,
            vmax=1,
            linewidths=0.2,
            edgecolors="black",
        )


@torch.no_grad()
def query_maps(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    image: NamedImage,
    threshold: float = BOX_THRESHOLD,
    most: int = 15,
    which: Sequence[int] | None = None,
) -> QueryMaps | QueryPoints:
    """Run a detector on one image and return the attention of its queries.

    Args:
        model: a detector whose queries attend to one feature map, such as our DETR or transformers'
            `DetrForObjectDetection` and `DetrForSegmentation`, or of this package and with points. It runs without
            dropout, and its state is restored.
        processor: processor of the model.
        image: result of `read_image`.
        threshold: minimum score of a query, in [0, 1]; if none reaches it, the four best are used.
        most: maximum number of queries above the threshold.
        which: query indices, in place of those above the threshold.

    Raises:
        ValueError: an option is out of range, or the model has no such attention.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    batch = send_to_device(processed(processor, [read_pixels(image)]), model.device)
    kind, attention_of = KINDS[getattr(model, "query_attention", "maps")]
    with forming_maps(model):
        output, attention = attention_of(model, batch)
    height, width = batch["labels"][0]["size"].tolist()
    scores, labels, boxes = query_objects(output, model.config, (height, width))
    if which is None:
        order = scores.argsort(descending=True, stable=True)
        chosen = order[: min(int((scores >= threshold).sum()) or AT_LEAST, most)]
    else:
        chosen = torch.tensor(existing(which, len(scores)), device=scores.device)
    labels, scores, boxes = (value[chosen].float().cpu().numpy() for value in (labels, scores, boxes))
    return kind(
        model=name_of(model),
        name=image.name,
        image=visible(processor, batch["pixel_values"])[:height, :width],
        classes=classes(model.config),
        queries=chosen.cpu().numpy(),
        objects=Objects(labels.astype(np.int64), scores, boxes),
        **{name: values[chosen].float().cpu().numpy() for name, values in attention.items()},
    )


Attention = tuple[ModelOutput, dict[str, Tensor]]


def maps_of(model: PreTrainedModel, batch: dict[str, Any]) -> Attention:
    """Run a DETR; return its output and the ``maps`` of all queries, (Q, rows, columns), see `QueryMaps`."""
    output, grid = with_grid(model, batch)
    rows, columns = (
        -(-side * cells // whole)
        for side, cells, whole in zip(
            batch["labels"][0]["size"].tolist(), grid, batch["pixel_values"].shape[2:], strict=True
        )
    )
    return output, {"maps": output.cross_attentions[-1][0].mean(dim=0).unflatten(-1, grid)[:, :rows, :columns]}


def points_of(model: PreTrainedModel, batch: dict[str, Any]) -> Attention:
    """Run a detector that samples points; return its output and ``points`` (Q, K, 2) and ``weights`` (Q, K) of all
    queries, see `QueryPoints`."""
    output = predict(model, batch, output_attentions=True, output_sampling_points=True)
    height, width = batch["pixel_values"].shape[2:]
    points = output.sampling_points[-1][0].flatten(1, -2)
    weights = output.cross_attentions[-1][0].flatten(1)
    return output, {"points": points * points.new_tensor([width, height]), "weights": weights}


# By `query_attention`: class of the picture, and (model, batch) -> output and fields of that class for all queries.
KINDS: dict[str, tuple[type[Any], Callable[[PreTrainedModel, dict[str, Any]], Attention]]] = {
    "maps": (QueryMaps, maps_of),
    "points": (QueryPoints, points_of),
}


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
            f"{type(model).__name__} has no attention of its queries over one feature map: these pictures are for "
            "DETR, and for detectors of this package that have queries"
        )
    return output, sizes[0]


def query_objects(
    output: ModelOutput, config: PreTrainedConfig, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return score (Q,), class (Q,) and box (Q, 4) in pixels of all queries, in their order.

    The post-processing of some models reorders queries, so it is not used.
    """
    shares = class_scores(config, output.logits[0])
    scores, labels = shares.max(dim=-1)
    x, y, w, h = output.pred_boxes[0].float().unbind(dim=-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    return scores, labels, corners * corners.new_tensor([size[1], size[0]] * 2)


def plot_queries(found: QueryMaps | QueryPoints, output: str | Path) -> Path:
    """Plot the attention of each query over the image with its box; the first panel shows all boxes.

    Args:
        found: result of `query_maps`.
        output: a ".png" file.
    """

    def boxes_of(which: Sequence[int], ax: Axes, font: float) -> None:
        own = Objects(found.objects.labels[which], found.objects.scores[which], found.objects.boxes[which])
        draw_boxes(ax, own, found.classes, font)

    def draw(i: int, ax: Axes, font: float) -> None:
        found.draw(i, ax, font)
        boxes_of([i], ax, font)

    every = list(range(len(found.queries)))
    panels = [Panel(found.image, "all of these", partial(boxes_of, every))]
    panels += [Panel(found.shown(i), f"query {query}", partial(draw, i)) for i, query in enumerate(found.queries)]
    return save(gallery(panels, columns=4, title=[f"{found.model}, {found.name}: {found.about}"]), output)


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
    queries = list(range(min(SLOTS, count))) if queries is None else existing(queries, count)
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


def existing(queries: Sequence[int], count: int) -> list[int]:
    """Return query indices as a list.

    Raises:
        ValueError: there are none, or one is not an index of ``count`` queries.
    """
    if not queries or any(not 0 <= query < count for query in queries):
        raise ValueError(f"queries must be one or more of 0 to {count - 1}, got {list(queries)}")
    return list(queries)


def slot(ax: Axes, boxes: np.ndarray, title: str) -> None:
    """Draw one panel of `plot_query_slots`: boxes (I, 4)."""
    size = float(np.clip(300 / len(boxes), 2, 12))
    ax.scatter(boxes[:, 0], boxes[:, 1], s=size, c=shape_colours(boxes), linewidths=0)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])  # the y axis points down, as in images
    ax.set_title(title, fontsize=SMALL, pad=2)
