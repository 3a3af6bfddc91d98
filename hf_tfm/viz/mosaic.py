"""Mosaic of images in rows and columns, with titles at the edges.

Lengths are in inches.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .grid import DPI, GAP, LETTER, MAX_PIXELS, SMALL

LINE = 0.16  # height of a line of text


@dataclass
class Mosaic:
    """Content of the mosaic. Images keep their aspect ratio; the total size follows from them.

    Args:
        panels: R rows of C images, each (H, W, 3) in [0, 1].
        rows: R titles at the left edge; long ones are truncated.
        columns: C titles above the first row; long ones are wrapped.
        title: lines above all; long ones are wrapped.
        side: length of the longer side of the images in a row.

    Raises:
        ValueError: the mosaic would have more than `MAX_PIXELS`.
    """

    panels: list[list[np.ndarray]]
    rows: list[str]
    columns: list[str]
    title: list[str]
    side: float = 1.8

    def __post_init__(self):
        shapes = [row[0].shape[:2] for row in self.panels]
        self.heights = [self.side * height / max(height, width) for height, width in shapes]
        self.widths = [self.side * width / max(height, width) for height, width in shapes]
        self.column = max(self.widths)
        self.left = 0.15 + (LINE + 0.05) * any(self.rows)
        C = len(self.columns)
        self.width = max(self.left + C * (self.column + GAP) - GAP + 0.15, 4.0)
        self.names = [textwrap.fill(name, max(int(self.column / (LETTER * SMALL)), 4)) for name in self.columns]
        self.lines = [
            part for line in self.title for part in textwrap.wrap(line, int(self.width / (LETTER * SMALL)) - 3)
        ]
        self.head = 0.2 + LINE * (len(self.lines) + max(name.count("\n") + 1 for name in self.names)) + 0.1
        self.height = self.head + sum(self.heights) + GAP * (len(self.heights) - 1) + 0.12
        count = self.width * self.height * DPI**2
        if count > MAX_PIXELS:
            raise ValueError(
                f"a picture of {len(self.rows)} x {C} images has {count / 1e6:.0f} million pixels, the limit is "
                f"{MAX_PIXELS / 1e6:.0f}: choose fewer"
            )

    def draw(self) -> Figure:
        """Draw the mosaic."""
        figure = Figure(figsize=(self.width, self.height), dpi=DPI)

        def text(x: float, y: float, words: str, **style) -> None:
            figure.text(x / self.width, y / self.height, words, fontsize=SMALL, parse_math=False, **style)

        text(0.1, self.height - 0.1, "\n".join(self.lines), va="top")
        step = self.column + GAP
        for i, name in enumerate(self.names):
            text(
                self.left + i * step + self.column / 2, self.height - self.head + 0.05, name, ha="center", va="bottom"
            )
        top = self.height - self.head
        for images, name, width, height in zip(self.panels, self.rows, self.widths, self.heights, strict=True):
            letters = max(int(height / (LETTER * SMALL)), 4)
            text(0.1, top - height / 2, shorten(name, letters), rotation=90, va="center", ha="left")
            for i, image in enumerate(images):
                x = self.left + i * step + (self.column - width) / 2
                place = (x / self.width, (top - height) / self.height, width / self.width, height / self.height)
                ax = figure.add_axes(place)
                ax.imshow(image, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                ax.set_axis_off()
            top -= height + GAP
        return figure

    def save(self, path: str | Path) -> Path:
        """Write a PNG file, creating its folder if necessary."""
        return save(self.draw(), path)


def save(figure: Figure, output: str | Path) -> Path:
    """Write a figure as a PNG file, creating its folder if necessary.

    Raises:
        ValueError: the file does not end in ".png".
    """
    path = Path(output)
    if path.suffix != ".png":
        raise ValueError(f'output must be a ".png" file, got "{output}"')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def shorten(name: str, letters: int) -> str:
    """Truncate a name at the start, because the end distinguishes files."""
    return name if len(name) <= letters else "\N{HORIZONTAL ELLIPSIS}" + name[1 - letters :]
