"""Training curve of a run: losses and learning rate over steps, and scores if there are any."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .saved_files import CURVE

TRAINING, EVALUATION, RATE = "#4477aa", "#ee6677", "#777777"  # colour-blind safe
SCORES = {"AP": "#aa3377", "AP50": "#ccbb44", "PQ": "#228833"}  # evaluation scores in [0, 1]


def plot_history(rows: list[dict[str, Any]], title: str) -> Figure | None:
    """Plot the rows of history.jsonl (see `results.read_history`).

    Args:
        rows: training rows with ``step``, ``loss`` and ``learning_rate``; evaluation rows with ``step`` and
            ``evaluation.loss``, and any of ``AP``, ``AP50`` and ``PQ``. Other rows are ignored.

    Returns:
        The figure, 8 x 5 inches, or 8 x 7 with a panel of scores; None if no row has a loss.
    """
    training = series(rows, "loss")
    evaluations = [{"step": row["step"], **row["evaluation"]} for row in rows if "evaluation" in row]
    evaluation = series(evaluations, "loss")
    scores = {name: points for name in SCORES if (points := series(evaluations, name))}
    rate = series(rows, "learning_rate")
    if not training and not evaluation:
        return None
    heights = [4, 3, 1] if scores else [4, 1]
    figure = Figure(figsize=(8, 7 if scores else 5))  # fixed margins: the layouts of matplotlib draw all of it twice
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.08 if scores else 0.11, top=0.94, hspace=0.12)
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


def plot_scores(
    runs: dict[str, list[dict[str, int | float]]], score: str, over: Literal["steps", "minutes"] = "steps"
) -> Figure:
    """Plot a score of several runs during training.

    Args:
        runs: evaluations of each run, see `results.RunRecord`.
        score: name of the score.
        over: what the horizontal axis shows: steps, or minutes of training time.

    Raises:
        ValueError: a run has no such score, or no times; the message names it.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, rows) in enumerate(runs.items()):
        if not (points := series(rows, score)):
            known = sorted({key for row in rows for key in row} - {"step", "epoch", "seconds"})
            raise ValueError(f"score must be one of {', '.join(known) or 'none'} for {name}, got {score!r}")
        if over == "minutes":
            times = dict(series(rows, "seconds"))
            if missing := next((step for step, _ in points if step not in times), None):
                raise ValueError(f"over must be steps for {name}, whose step {missing} has no time, got {over!r}")
            points = [(times[step] / 60, value) for step, value in points]
        draw(axes, points, name, f"C{number}")
    axes.set_xlabel("step" if over == "steps" else "minutes of training")
    axes.set_ylabel(score)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw(axes: Axes, points: Sequence[tuple[float, float]], label: str, color: str) -> None:
    """Plot a line through points."""
    # A marker makes a single point visible, but hundreds of markers would hide the line.
    marker = "o" if len(points) <= 60 else None
    axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=3.5)


def series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows with a number under ``name``."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def write_curve(folder: str | Path, rows: list[dict[str, Any]], title: str) -> Path | None:
    """Write training_curve.png to ``folder``; return None, without a file, if there is nothing to plot."""
    figure = plot_history(rows, title)
    if figure is None:
        return None
    path = Path(folder) / CURVE
    figure.savefig(path, dpi=120)
    return path
