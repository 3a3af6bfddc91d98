"""Formulas and tables of positions in sequences (Vaswani et al. 2017, section 3.5) and in images.

Shapes: B sequences; T positions; D = hidden size.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .linear import embedding_table


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """Return sines and cosines of geometrically spaced wavelengths, 2 pi to 10000 x 2 pi (section 3.5).

    The paper interleaves sine and cosine (features 2i, 2i + 1); here all sines come first, then all cosines, as in the
    authors' tensor2tensor and in Marian. The two differ by a fixed permutation of features.

    Args:
        positions: (T,) or (B, T), any numbers.
        dim: D, number of features.

    Returns:
        (T, D) or (B, T, D) float32.
    """
    # float64 keeps large positions exact to float32: 10000 ** x of a float32 x is already off in the 7th digit.
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] / 10000.0 ** (even / dim)  # (..., T, ceil(D / 2))
    return torch.cat([angles.sin(), angles.cos()[..., : dim // 2]], dim=-1).float()


class SinusoidTable(nn.Module):
    """Table of sines and cosines, computed once; positions beyond it are computed on the fly.

    Args:
        length: number of positions in the table.
        dim: D, number of features.
        scale: factor of the values.
    """

    def __init__(self, length: int, dim: int, scale: float = 1.0):
        super().__init__()
        self.length = length
        self.dim = dim
        self.scale = scale
        self.register_buffer("table", self.compute(torch.arange(length)), persistent=False)

    def compute(self, positions: Tensor) -> Tensor:
        """Compute rows of the table: (T,) or (B, T) -> (T, D) or (B, T, D)."""
        rows = sinusoidal(positions, self.dim)
        return rows if self.scale == 1.0 else rows * self.scale

    def reset_parameters(self) -> None:
        """Fill the table."""
        init.copy_(self.table, self.compute(torch.arange(self.length)))

    def forward(self, positions: Tensor, end: int | None = None) -> Tensor:
        """Return the rows of ``positions``, (T,) or (B, T), all below ``end`` if that is known: (..., D)."""
        if end is None or end > self.length:
            return self.compute(positions).to(self.table.dtype)
        return nn.functional.embedding(positions, self.table)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Return fixed positions of a grid; half of the features encode the column, the other half the row.

    In the order of the MAE authors' released weights: column before row, each as sines then cosines (He et al. 2021,
    arXiv:2111.06377, appendix A.1). Wavelengths as in `sinusoidal`.

    Args:
        rows, columns: size of the grid.
        dim: D, a multiple of 4.

    Returns:
        (rows * columns, D) float32, in row-major order.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the hidden size must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    across, down = (sinusoidal(torch.arange(count), dim // 2) for count in (columns, rows))
    return torch.cat([across.repeat(rows, 1), down.repeat_interleave(columns, dim=0)], dim=1)


def sine_2d(mask: Tensor, dim: int, shift: float = 0.0) -> Tensor:
    """Return fixed positions of the cells of padded images (Carion et al. 2020, arXiv:2005.12872, appendix A.4; Parmar
    et al. 2018, arXiv:1802.05751).

    Each coordinate is scaled to 2 pi over the unpadded image. The first half of the features encodes the row, the
    second half the column, with sine and cosine interleaved, as in the authors' released weights.

    Args:
        mask: (B, rows, columns) bool, True at image cells; padding is at the bottom and right.
        dim: D, a multiple of 4.
        shift: added to the number of a cell, counted from 1: 0 in DETR, -0.5, its centre, in Deformable DETR.

    Returns:
        (B, rows * columns, D) float32, in row-major order.
    """
    parts = []
    for axis in (1, 2):
        counts = mask.cumsum(axis, dtype=torch.float32)  # 1, 2, ...
        extent = counts.narrow(axis, counts.shape[axis] - 1, 1)
        parts.append(sine_of_shares((counts + shift) / (extent + 1e-6), dim // 2))  # (B, rows, columns, D / 2)
    return torch.cat(parts, dim=-1).flatten(1, 2)


def sine_of_shares(shares: Tensor, dim: int) -> Tensor:
    """Return sines and cosines, interleaved, of coordinates that are scaled to 2 pi: (...) -> (..., dim) float32.

    Args:
        shares: coordinates as shares of the image, in [0, 1].
        dim: number of features, even.
    """
    wavelengths = 10000.0 ** (torch.arange(0, dim, 2, device=shares.device) / dim)  # (dim / 2,)
    angles = (shares.float() * (2 * math.pi))[..., None] / wavelengths
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def join_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Combine a vector per row (R, D / 2) and per column (C, D / 2) into one per cell of the grid, (1, R C, D).

    Cells are in row-major order; the column's half of the features comes first.
    """
    across = columns.expand(len(rows), -1, -1)
    down = rows[:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)[None]


class LearnedPositions2D(nn.Module):
    """Learned position embeddings, one per row and one per column (Carion et al. 2020, table 3, "learned at input").

    Args:
        dim: D, even.
        length: maximum number of rows, and of columns; a larger feature map raises an error.
    """

    def __init__(self, dim: int, length: int = 50):
        super().__init__()
        self.length = length
        self.row_embeddings = nn.Embedding(length, dim // 2)
        self.column_embeddings = nn.Embedding(length, dim // 2)

    def forward(self, mask: Tensor) -> Tensor:
        """Return the positions of a grid: (B, rows, columns) -> (1, rows * columns, D), the column's half first.

        Raises:
            ValueError: the feature map has more rows or columns than there are embeddings.
        """
        rows, columns = mask.shape[1:]
        length = self.length
        if max(rows, columns) > length:
            raise ValueError(
                f"the feature map has {rows} x {columns} cells, but learned positions end at {length}: use smaller "
                f'images or position_embedding_type="sine"'
            )
        return join_axes(
            embedding_table(self.row_embeddings, rows, mask.device),
            embedding_table(self.column_embeddings, columns, mask.device),
        )
