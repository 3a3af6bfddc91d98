"""Confusion matrix of a classifier.

Shapes: N images; C classes.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from .grid import DPI, LETTER, SMALL
from .mosaic import save

NUMBERS = 30  # maximum number of classes for which cells contain numbers
TICKS = 60  # maximum number of tick labels per axis
LETTERS = 24  # maximum length of a class name
MAX_CLASSES = 4000


def plot_confusion(
    labels: Sequence[int], predictions: Sequence[int], names: Sequence[str], output: str | Path, title: str = ""
) -> Path:
    """Plot the percentage of each label's images predicted as each class.

    Rows are labels and sum to 100, columns are predictions; rows of labels without images are grey.

    Args:
        labels: (N,) class indices.
        predictions: (N,) class indices.
        names: names of the C classes.
        output: a ".png" file.
        title: line above the plot.

    Raises:
        ValueError: there are no images, an index is not a class, there are more than `MAX_CLASSES`, or the file does
            not end in ".png".
    """
    if len(labels) == 0:
        raise ValueError("a confusion matrix needs images with a label, got none")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"a picture of a confusion matrix has at most {MAX_CLASSES} classes, got {len(names)}")
    for argument, values in (("labels", labels), ("predictions", predictions)):
        if min(values) < 0 or max(values) >= len(names):
            raise ValueError(f"{argument} must be from 0 to {len(names) - 1}, got {min(values)} to {max(values)}")
    counts = confusion_matrix(labels, predictions, labels=range(len(names)))
    return save(draw(counts, names, [title, *summary(counts, names)]), output)


def summary(counts: np.ndarray, names: Sequence[str], most: int = 3) -> list[str]:
    """Return the number of correct predictions, and the most frequent confusions."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    worst = wrong.argsort(axis=None, kind="stable")[::-1][:most]
    pairs = [divmod(int(place), len(counts)) for place in worst if wrong.flat[place]]
    said = "; ".join(f"{cut(names[a])} as {cut(names[b])} ({wrong[a, b]})" for a, b in pairs)
    return [f"{counts.trace()} of {counts.sum()} images right", *([f"most often wrong: {said}"] if said else [])]


def cut(name: str) -> str:
    """Truncate a name to `LETTERS` characters; ImageNet names list synonyms, and the first one is sufficient."""
    return name if len(name) <= LETTERS else name[: LETTERS - 1].rstrip(", ") + "\N{HORIZONTAL ELLIPSIS}"


def draw(counts: np.ndarray, names: Sequence[str], title: Sequence[str]) -> Figure:
    """Plot the matrix of (C, C) counts."""
    C = len(counts)
    # Whole pixels give all classes the same width; at least two, because a single image would otherwise be invisible.
    cell = max(44, 220 // C) if C <= NUMBERS else max(2, 900 // C)
    font = 8 if C <= NUMBERS else 7
    side = C * cell / DPI
    step = -(-C // min(TICKS, int(side * 72 / (1.3 * font))))
    edge = 0.5 + LETTER * font * max(len(cut(name)) for name in names[::step])
    width = edge + side + 1.1
    lines = [part for line in title for part in textwrap.wrap(line, int(width / (LETTER * SMALL)) - 2)]
    height = edge + side + 0.35 + 0.16 * len(lines)
    figure = Figure(figsize=(width, height), dpi=DPI)

    def axes(x: float, w: float) -> Axes:
        return figure.add_axes((x / width, edge / height, w / width, side / height))

    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    # A root scale, because one image in fifty would be indistinguishable from none, especially in cells of two pixels.
    scale = PowerNorm(0.5 if C <= NUMBERS else 0.3, 0, 100)
    ax = axes(edge, side)
    colours = colormaps["Blues"].with_extremes(bad="0.85")
    image = ax.imshow(shares, norm=scale, cmap=colours, aspect="auto", interpolation="nearest")
    shown = range(0, C, step)
    words = [cut(names[number]) for number in shown]
    ax.set_xticks(shown, words, rotation=90, fontsize=font, parse_math=False)
    ax.set_yticks(shown, words, fontsize=font, parse_math=False)
    ax.set_xlabel("prediction", fontsize=SMALL)
    ax.set_ylabel("label", fontsize=SMALL)
    ax.tick_params(length=2, pad=2)
    if C <= NUMBERS:
        write_numbers(ax, shares, scale)
    bar = axes(edge + side + 0.15, 0.12)
    figure.colorbar(image, cax=bar, ticks=[0, 2, 10, 20, 40, 60, 80, 100])
    bar.set_ylabel("per cent of the label's images", fontsize=SMALL)
    bar.tick_params(labelsize=8)
    figure.text(0.1 / width, 1 - 0.1 / height, "\n".join(lines), fontsize=SMALL, va="top", parse_math=False)
    return figure


def write_numbers(ax: Axes, shares: np.ndarray, scale: PowerNorm) -> None:
    """Write each nonzero percentage into its cell."""
    for row, column in zip(*np.nonzero(np.nan_to_num(shares)), strict=True):
        share = shares[row, column]
        words = f"{share:.0f}" if share >= 1 else "<1"
        colour = "white" if scale(share) > 0.6 else "black"
        ax.text(column, row, words, ha="center", va="center", fontsize=8, color=colour)
