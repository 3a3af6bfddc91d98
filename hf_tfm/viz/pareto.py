"""Score against size and time of compressed models, with the Pareto front.

rows of the cost table -> one panel for each cost -> models that no other one beats in both score and cost are joined
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..hub.cost import Cost
from .mosaic import save

PANELS = {"megabytes": "MB on disk", "milliseconds_1": "ms, 1 sample", "milliseconds_32": "ms, 32 samples"}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, score) that no other point beats, by ascending cost."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def plot_pareto(rows: Sequence[Cost], output: str | Path) -> Path:
    """Plot the scores of models against their costs.

    Args:
        rows: each with a score.
        output: a ".png" file.
    """
    figure = Figure(figsize=(4.2 * len(PANELS), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        points = [(row[field], row["score"]) for row in rows]  # type: ignore[literal-required]
        axes.plot(*zip(*(points[i] for i in front(points)), strict=True), color="0.7", zorder=1)
        for number, (row, point) in enumerate(zip(rows, points, strict=True)):
            axes.scatter(*point, color=f"C{number % 10}", zorder=2, label=row["model"])
        axes.set_xlabel(title)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(rows[0].get("metric", "score"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save(figure, output)
