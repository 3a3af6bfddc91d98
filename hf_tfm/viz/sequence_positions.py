"""Positions of text models in one picture: a row for each model, similarity over distance and maps of all pairs.

Shapes: T positions.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..hub.loading import load_model
from ..models.sequence_positions import PositionKind, cosines
from .grid import DPI, SMALL
from .mosaic import save

SIDE, GAP, LEFT, HEAD = 1.7, 0.35, 0.55, 0.5  # inches, of a map, between maps, and above them
NAMES = ("position_embeddings", "wpe")  # of learned tables in models of transformers and in GPT


@torch.no_grad()
def sequence_similarity(model: PreTrainedModel, length: int) -> dict[str, np.ndarray]:
    """Compute how close a model sees each pair of positions, see `PositionKind.similarity`.

    Args:
        model: with positions of this package, or with a table of learned positions.
        length: T; a shorter table of learned positions is shown to its end.

    Returns:
        {label: (T, T) float32}; of an encoder-decoder both stacks, except for what is the same in both.

    Raises:
        ValueError: the model has no such positions.
    """
    kinds = {name: module for name, module in model.named_modules() if is_positions(name, module)}
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no positions that can be shown")
    if not any(list(module.parameters()) for module in kinds.values()):
        kinds = dict(list(kinds.items())[:1])
    found: dict[str, np.ndarray] = {}
    for name, module in kinds.items():
        stack = f"{name.split('.')[0]}: " if len(kinds) > 1 else ""
        count = min(length, module.num_embeddings) if isinstance(module, nn.Embedding) else length
        positions = torch.arange(count, device=model.device)
        if isinstance(module, PositionKind):
            maps = module.similarity(positions)
        else:
            maps = {"embedding": cosines(module(positions))}
        for label, values in maps.items():
            if not any(np.array_equal(values, other) for other in found.values()):  # fixed positions of both stacks
                found[f"{stack}{label}"] = values.float().cpu().numpy()
    return found


def is_positions(name: str, module: nn.Module) -> bool:
    """Return True for the positions of a stack."""
    learned = isinstance(module, nn.Embedding) and name.rpartition(".")[2] in NAMES
    return isinstance(module, PositionKind) or learned


def load_text_encoder(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a text model of a folder or Hub id without its head; see `load_model`."""
    return load_model(AutoModel, model, trust_remote_code=trust_remote_code, may_lack=lambda name: "pooler." in name)


def plot_sequence_positions(models: Mapping[str, PreTrainedModel], output: str | Path, length: int = 64) -> Path:
    """Plot `sequence_similarity` of several models: a row each, at the left the mean over pairs of one distance.

    Args:
        models: by name.
        output: a ".png" file.
        length: number of positions.
    """
    rows = {}
    for name, model in models.items():
        kind = getattr(model.config, "position_embedding_type", None) or "learned"
        rows[f"{name}: {kind} positions"] = sequence_similarity(model, length)
    return save(draw(rows), output)


def by_distance(similarity: np.ndarray) -> np.ndarray:
    """Return the mean of (T, T) over all pairs of each distance, (T,)."""
    return np.array([np.diagonal(similarity, -distance).mean() for distance in range(len(similarity))])


def draw(rows: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Plot {title: {label: (T, T)}}, all maps on one colour scale."""
    columns = max(map(len, rows.values()))
    least = min(0.0, *(values.min() for maps in rows.values() for values in maps.values()))
    width = LEFT + 2 * SIDE + 0.5 + columns * (SIDE + GAP)
    height = len(rows) * (HEAD + SIDE + 0.45) + 0.1
    figure = Figure(figsize=(width, height), dpi=DPI)

    def place(x: float, top: float, w: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (top + SIDE) / height, w / width, SIDE / height

    for row, (title, maps) in enumerate(rows.items()):
        top = row * (HEAD + SIDE + 0.45) + HEAD
        figure.text(
            0.1 / width, 1 - (top - HEAD + 0.05) / height, title, fontsize=SMALL + 1, va="top", parse_math=False
        )
        curves = figure.add_axes(place(LEFT, top, 2 * SIDE))
        for column, (label, values) in enumerate(maps.items()):
            ax = figure.add_axes(place(LEFT + 2 * SIDE + 0.5 + column * (SIDE + GAP), top, SIDE))
            ax.imshow(values, vmin=least, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
            ax.set_title(label, fontsize=7, pad=3, parse_math=False)
            ax.tick_params(labelsize=7, length=2)
            curves.plot(by_distance(values), label=label, linewidth=1)
        curves.set_ylim(least - 0.05, 1.05)
        curves.set_xlabel("distance of two positions", fontsize=7)
        curves.set_title("mean over pairs of the same distance", fontsize=7, pad=3)
        curves.tick_params(labelsize=7)
        curves.legend(fontsize=5.5, labelspacing=0.2)
    return figure
