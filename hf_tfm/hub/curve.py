"""The picture of a run: losses over steps, scores of detection where there are any, and the learning rate below."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .saved_files import CURVE

TRAINING, EVALUATION, RATE = "#4477aa", "#ee6677", "#777777"  # told apart by colour-blind readers too
SCORES = {"AP": "#aa3377", "AP50": "#ccbb44", "PQ": "#228833"}  # of evaluations, in [0, 1]


def plot_history(rows: list[dict[str, Any]], title: str) -> Figure | None:
    """Draw the rows of history.jsonl (see `results.read_history`).

    Args:
        rows: training rows with ``step``, ``loss`` and ``learning_rate``; evaluation rows with ``step`` and
            ``evaluation.loss``, and any of ``AP``, ``AP50`` and ``PQ``. Rows without these are left out.

    Returns:
        The figure, 8 x 5 inches, with a panel of scores 8 x 7, or None where no row has a loss.
    """
    training = series(rows, "loss")
    evaluations = [{"step": row["step"], **row["evaluation"]} for row in rows if "evaluation" in row]
    evaluation = series(evaluations, "loss")
    scores = {name: points for name in SCORES if (points := series(evaluations, name))}
    rate = series(rows, "learning_rate")
    if not training and not evaluation:
        return None
    heights = [4, 3, 1] if scores else [4, 1]
    figure = Figure(figsize=(8, 7 if scores else 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, *middle, rates = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    losses.set_title(title)
    losses.set_ylabel("loss")
    for points, label, color in ((training, "training", TRAINING), (evaluation, "evaluation", EVALUATION)):
        if points:
            draw(losses, points, label, color)
    losses.legend(frameon=False)
    for axes in middle:
        for name, points in scores.items():
            draw(axes, points, name, SCORES[name])
        axes.set_ylabel("score")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)
    if rate:
        rates.plot(*zip(*rate, strict=True), color=RATE)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rates.set_xlabel("step")
    rates.set_xlim(left=0)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(axes: Axes, points: list[tuple[int, float]], label: str, color: str) -> None:
    """A line through points."""
    # A marker makes a single point visible; hundreds of them would hide the line.
    marker = "o" if len(points) <= 60 else None
    axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=3.5)


def series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a number under ``name``."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def write_curve(folder: str | Path, rows: list[dict[str, Any]], title: str) -> Path | None:
    """Write training_curve.png in ``folder``; None, and no file, where there is nothing to draw."""
    figure = plot_history(rows, title)
    if figure is None:
        return None
    path = Path(folder) / CURVE
    figure.savefig(path, dpi=120)
    return path
