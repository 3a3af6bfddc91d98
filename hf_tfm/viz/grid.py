"""Grid of attention maps in one image, with tokens at the left and lower edge and one colour scale.

Shapes: R rows and C columns of panels; Q queries (rows of a map) and K keys (its columns). Lengths are in inches.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 100
MAX_PIXELS = 80_000_000  # of an image: 6 layers of 16 heads with 60 tokens per side
LETTER = 0.58 / 72  # width of a letter per point of font size, slightly above the font's mean
SMALL = 9  # font size of titles, in points
GAP = 0.12  # between panels
CELL = 0.14  # minimum side of a cell of a map


def check_tokens(argument: str, count: int, longest: int | None = None) -> None:
    """Refuse a text with more tokens than fit in an image of one map, before attention is computed.

    Args:
        argument: name of the text's argument.
        count: number of tokens of the text.
        longest: maximum number of tokens of the model; None if unlimited.

    Raises:
        ValueError: reports the limit.
    """
    if longest is not None and count > longest:
        raise ValueError(f"{argument} must have at most {longest} tokens, max_position_embeddings, got {count}")
    most = int(MAX_PIXELS**0.5 / (CELL * DPI))
    if count > most:
        raise ValueError(f"{argument} must have at most {most} tokens, which fill a picture, got {count}")


@dataclass
class Grid:
    """Content of the image, whose size follows from the number of panels and labels.

    Args:
        panels: (R, C, Q, K), values in [0, 1].
        queries: Q labels at the left edge.
        keys: K labels at the lower edge.
        rows: R titles.
        columns: C titles.
        query_name: axis label of the queries.
        key_name: axis label of the keys.
        title: lines above the grid; long ones are wrapped.
        cell: minimum side of a cell of a map.
        font: font size of the labels, in points.

    Raises:
        ValueError: the image would have more than `MAX_PIXELS`.
    """

    panels: np.ndarray
    queries: list[str]
    keys: list[str]
    rows: list[str]
    columns: list[str]
    query_name: str
    key_name: str
    title: list[str]
    cell: float = CELL
    font: float = 7

    def __post_init__(self):
        R, C, Q, K = self.panels.shape
        cell = max(self.cell, 1.2 / max(Q, K))
        self.panel_width, self.panel_height = K * cell, Q * cell
        self.grid_width, self.grid_height = C * (self.panel_width + GAP) - GAP, R * (self.panel_height + GAP) - GAP
        self.left = 0.85 + LETTER * self.font * max(map(len, self.queries))
        self.bottom = 0.4 + LETTER * self.font * max(map(len, self.keys))
        self.width = max(self.left + self.grid_width + 0.9, 5.0)
        letters = int(self.width / (LETTER * SMALL)) - 4
        self.lines = [part for line in self.title for part in textwrap.wrap(line, letters)]
        self.height = self.bottom + self.grid_height + 0.5 + 0.16 * len(self.lines)
        pixels = self.width * self.height * DPI**2
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"a picture of {R} layers and {C} heads with {Q} x {K} tokens has {pixels / 1e6:.0f} million pixels, "
                f"the limit is {MAX_PIXELS / 1e6:.0f}: choose fewer layers or heads, or a shorter sentence"
            )

    def draw(self) -> Figure:
        """Draw the grid."""
        R, C, _, _ = self.panels.shape
        figure = Figure(figsize=(self.width, self.height), dpi=DPI)

        def axes(x: float, y: float, width: float, height: float) -> Axes:
            return figure.add_axes((x / self.width, y / self.height, width / self.width, height / self.height))

        def text(x: float, y: float, words: str, **style) -> None:
            figure.text(x / self.width, y / self.height, words, fontsize=SMALL, **style)

        for row in range(R):
            for column in range(C):
                x = self.left + column * (self.panel_width + GAP)
                y = self.bottom + (R - 1 - row) * (self.panel_height + GAP)
                image = self.panel(axes(x, y, self.panel_width, self.panel_height), row, column)
        right, top = self.left + self.grid_width, self.bottom + self.grid_height
        bar_height = min(self.grid_height, 3.0)
        bar = axes(right + 0.2, top - bar_height, 0.12, bar_height)
        figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
        text(0.1, (self.bottom + top) / 2, self.query_name, va="center", rotation=90)
        text((self.left + right) / 2, 0.1, self.key_name, ha="center")
        text(0.1, self.height - 0.1, "\n".join(self.lines), va="top", parse_math=False)
        return figure

    def panel(self, ax: Axes, row: int, column: int):
        """Draw one map; labels and titles appear only at the edges of the grid."""
        R, _, Q, K = self.panels.shape
        image = ax.imshow(
            self.panels[row, column], vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest"
        )
        ax.set_xticks([])
        ax.set_yticks([])
        labels = {"fontsize": self.font, "parse_math": False}  # a dollar sign does not start a formula
        if column == 0:
            ax.set_yticks(range(Q), self.queries, va="center_baseline", **labels)
            ax.set_ylabel(self.rows[row], fontsize=SMALL, labelpad=8)
        if row == R - 1:
            ax.set_xticks(range(K), self.keys, rotation=90, **labels)
        if row == 0:
            ax.set_title(self.columns[column], fontsize=SMALL)
        ax.tick_params(length=2, pad=2)
        return image

    def save(self, path: str | Path) -> Path:
        """Write a PNG file, creating its folder if necessary."""
        path = Path(path)
        figure = self.draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
        return path
