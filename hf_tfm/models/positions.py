"""Position embeddings: where a token stands, added to what it is (Vaswani et al. 2017, section 3.5).

Shapes: T positions; D = hidden size.
"""

import torch
from torch import Tensor, nn


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines of geometrically spaced wavelengths, 2 pi to 10000 x 2 pi (section 3.5).

    The paper writes sine and cosine in turn (features 2i, 2i + 1); here all sines come first, then all cosines, as in
    the authors' tensor2tensor and in Marian. The two differ by a fixed permutation of features.

    Args:
        positions: (T,), any numbers.
        dim: D, features a position.

    Returns:
        (T, D) float32.
    """
    # float64 keeps late positions exact to float32: 10000 ** x of a float32 x is already off in the 7th digit.
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] / 10000.0 ** (even / dim)  # (T, ceil(D / 2))
    return torch.cat([angles.sin(), angles.cos()[:, : dim // 2]], dim=1).float()


class SinusoidalPositions(nn.Module):
    """The sinusoidal table, computed once; longer inputs are computed as they come.

    Args:
        length: positions in the table.
        dim: D, features a position.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.length = length
        self.dim = dim
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> Tensor:
        """The table, (length, D)."""
        return sinusoidal(torch.arange(self.length), self.dim)

    def forward(self, positions: Tensor, length: int | None = None) -> Tensor:
        """Embed ``positions`` (T,), the largest below ``length`` when that is known: (T, D)."""
        if length is None or length > self.length:
            return sinusoidal(positions, self.dim).to(self.table.dtype)
        return nn.functional.embedding(positions, self.table)


class LearnedPositions(nn.Embedding):
    """One learned vector a position (section 3.5, the alternative of table 3 row E; BERT, GPT, ViT).

    Args:
        length: positions there are; a longer input is refused.
        dim: D, features a position.
    """

    def forward(self, positions: Tensor, length: int | None = None) -> Tensor:
        """Embed ``positions`` (T,), the largest below ``length`` when that is known: (T, D).

        Raises:
            ValueError: ``length`` exceeds the table.
        """
        if length is not None and length > self.num_embeddings:
            raise ValueError(
                f"the input reaches position {length - 1}, but learned positions end at max_position_embeddings - 1 = "
                f"{self.num_embeddings - 1}: shorten the input or train with a larger max_position_embeddings"
            )
        return super().forward(positions)


def positions_1d(kind: str, length: int, dim: int) -> nn.Module:
    """The position module of a kind, "sinusoidal" or "learned"."""
    if kind == "sinusoidal":
        return SinusoidalPositions(length, dim)
    if kind == "learned":
        return LearnedPositions(length, dim)
    raise ValueError(f'position_embedding_type must be "sinusoidal" or "learned", got "{kind}"')


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed positions of a grid: half of the features say where in a row, the other half in which row.

    In the order of the MAE authors' released weights, column before row, each as sines then cosines (He et al. 2021,
    arXiv:2111.06377, appendix A.1). Wavelengths as in `sinusoidal`.

    Args:
        rows, columns: of the grid.
        dim: D, a multiple of 4.

    Returns:
        (rows * columns, D) float32, row by row.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the hidden size must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    across, down = (sinusoidal(torch.arange(count), dim // 2) for count in (columns, rows))
    return torch.cat([across.repeat(rows, 1), down.repeat_interleave(columns, dim=0)], dim=1)
