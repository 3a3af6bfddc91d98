"""Similarity of position embeddings (Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7, middle).

Shapes: R x C patches of an image; D features.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.patches import patch_grid, sides
from .grid import DPI, SMALL
from .images import is_masked_autoencoder, name_of, require_image_model
from .mosaic import save

SPACE = 4  # between maps, in pixels


@torch.no_grad()
def position_similarity(model: PreTrainedModel) -> np.ndarray:
    """Compute the cosine similarity between the position embeddings of all pairs of patches.

    Args:
        model: `TfmViTModel`, `TfmMAEModel`, transformers' `ViTModel`, `ViTMAEModel` ..., or one with a head; positions
            may be learned, learned by row and column, or fixed.

    Returns:
        (R, C, R, C) float32: [r, c] is the map of patch (r, c). Zero for a zero vector.

    Raises:
        ValueError: the model has no patches, or adds no position embedding to them.
    """
    require_image_model(model.config, type(model).__name__)
    embeddings = getattr(model.base_model, "embeddings", None)
    grid = getattr(embeddings, "grid", None)
    if grid is not None:  # our model; with a backbone, the grid is that of its feature map
        _, table = embeddings.positions(grid)
    else:
        grid = patch_grid(*sides(model.config.image_size), model.config.patch_size, "image_size")
        table = getattr(embeddings, "position_embeddings", None)
        if not isinstance(table, Tensor) or table.ndim != 3 or table.shape[1] < grid[0] * grid[1]:
            raise ValueError(f"{type(model).__name__} adds no table of position embeddings to its patches")
        table = table[:, -grid[0] * grid[1] :]  # drops [class] and other tokens before the patches
    table = nn.functional.normalize(table[0].float(), dim=-1)  # (R C, D)
    return (table @ table.T).view(*grid, *grid).cpu().numpy()


def plot_positions(model: PreTrainedModel, output: str | Path) -> Path:
    """Plot `position_similarity`: at each patch's position, a small map of its similarity to all patches.

    Args:
        model: see `position_similarity`.
        output: a ".png" file.

    Raises:
        ValueError: see `position_similarity`.
    """
    title = [f"{name_of(model)}: position embedding similarity", kind(model)]
    return save(draw(position_similarity(model), title), output)


def kind(model: PreTrainedModel) -> str:
    """Describe the kind of positions."""
    if is_masked_autoencoder(model.config):
        return "fixed positions"
    kinds = {"learned_2d": "positions learned by row and column", "sincos_2d": "fixed positions"}
    return kinds.get(getattr(model.config, "position_embedding_type", ""), "learned positions")


def draw(similarity: np.ndarray, title: list[str]) -> Figure:
    """Plot (R, C, R, C) similarities: maps arranged like their patches, on one colour scale."""
    R, C, _, _ = similarity.shape
    # All maps are drawn as one array of pixels, because a grid of 32 x 32 would need a thousand axes.
    cell = max(1, round(560 / max(R, C) ** 2))
    down, across = R * cell + SPACE, C * cell + SPACE  # distance between neighbouring maps
    plane = np.full((R, C, down, across), np.nan, np.float32)
    plane[:, :, :-SPACE, :-SPACE] = similarity.repeat(cell, axis=2).repeat(cell, axis=3)
    plane = plane.transpose(0, 2, 1, 3).reshape(R * down, C * across)[:-SPACE, :-SPACE]
    height, width = (count / DPI for count in plane.shape)
    left, bottom, top, right = 0.65, 0.55, 0.6, 0.95
    total_width, total_height = left + width + right, bottom + height + top
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / total_width, y / total_height, w / total_width, h / total_height

    ax = figure.add_axes(place(left, bottom, width, height))
    image = ax.imshow(plane, vmin=similarity.min(), vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    for count, step, axis, name in ((R, down, ax.yaxis, "patch row"), (C, across, ax.xaxis, "patch column")):
        shown = range(0, count, -(-count // 16))
        axis.set_ticks([(i + 0.5) * step - SPACE / 2 - 0.5 for i in shown], [str(i + 1) for i in shown], fontsize=8)
        axis.set_label_text(name, fontsize=SMALL)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.add_axes(place(left + width + 0.15, bottom, 0.12, height))
    figure.colorbar(image, cax=bar).set_label("cosine similarity", fontsize=SMALL)
    bar.tick_params(labelsize=8)
    text = "\n".join(title)
    figure.text(0.1 / total_width, 1 - 0.1 / total_height, text, fontsize=SMALL, va="top", parse_math=False)
    return figure
