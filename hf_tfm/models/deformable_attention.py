"""Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, section 4.1, equation 3).

    queries (B, T, D) -> points around their reference, and a weight of each (B, T, H, L, P)
    feature maps (B, N, D) -> bilinear samples at the points -> weighted sum (B, T, D)

Pure torch: one `grid_sample` per level, no extension to build. Points are computed and sampled in float32, whatever
the precision of the model: in bf16, coordinates near 1 are 1/256 apart, almost half a cell of a map with 100 cells.

Shapes: B images; T queries; N cells of all feature maps, one map after the other, each in row-major order; D hidden
size; H heads; L levels (feature maps); P points per head and level; h, w size of a feature map.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .attention import placed

Sizes = tuple[tuple[int, int], ...]  # height and width of each level


class References(NamedTuple):
    """Where queries look: a point is ``centre + offset * scale``.

    The coordinates are those of `grid_sample`: -1 is the left (top) edge of the padded feature map, 1 the right
    (bottom) edge; x comes first.

    Args:
        centre: reference points (1 or B, T, 1 or L, 2).
        scale: unit of the offsets, broadcastable to the same.
        sizes: h and w of every level.
    """

    centre: Tensor
    scale: Tensor
    sizes: Sizes


def precise(values: Tensor) -> Tensor:
    """Convert to float32, unless the values are float64."""
    return values if values.dtype == torch.float64 else values.float()


def reference_points(points: Tensor, ratios: Tensor | None, sizes: Sizes) -> References:
    """Return references at points of the images; offsets are in cells of each level.

    Args:
        points: (1 or B, T, 2) x and y as shares of the unpadded image.
        ratios: (B, L, 2) unpadded width and height of each level as shares of the padded ones; None without padding.
    """
    centre = precise(points)[:, :, None]  # (B, T, 1, 2)
    if ratios is not None:
        centre = centre * ratios[:, None]
    return References(2.0 * centre - 1.0, 2.0 * cell_sizes(sizes, points.device), sizes)


def reference_boxes(boxes: Tensor, ratios: Tensor | None, sizes: Sizes, num_points: int) -> References:
    """Return references at the centres of boxes; an offset of ``num_points`` is half of the box.

    Args:
        boxes: (B, T, 4) cxcywh as shares of the unpadded image.
        ratios: see `reference_points`.
        num_points: P.
    """
    boxes = precise(boxes)[:, :, None]  # (B, T, 1, 4)
    if ratios is not None:
        boxes = boxes * ratios.repeat(1, 1, 2)[:, None]
    return References(2.0 * boxes[..., :2] - 1.0, boxes[..., 2:] / num_points, sizes)


def cell_sizes(sizes: Sizes, device: torch.device) -> Tensor:
    """Return the width and height of a cell of every level as shares of the map: (1, 1, L, 2)."""
    sides = [torch.full((1,), side, dtype=torch.float32, device=device) for h, w in sizes for side in (w, h)]
    return torch.cat(sides).reciprocal().view(1, 1, -1, 2)


class SumOfPoints(torch.autograd.Function):
    """`sum_points` with its gradient, neither of which ever holds the products of all points.

    On a CPU, writing and reading them takes as long as sampling.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, weights: Tensor) -> Tensor:
        """See `sum_points`."""
        ctx.save_for_backward(samples, weights)
        return sum_points(samples, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(X, C, T) -> (X, C, P, T), (X, 1, P, T)."""
        samples, weights = ctx.saved_tensors
        for_samples, for_weights = torch.empty_like(samples), torch.empty_like(weights)
        for point in range(samples.shape[2]):
            torch.mul(gradient, weights[:, :, point], out=for_samples[:, :, point])
            torch.sum(gradient * samples[:, :, point], 1, keepdim=True, out=for_weights[:, :, point])
        return for_samples, for_weights


def sum_points(samples: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum over points: (X, C, P, T), (X, 1, P, T) -> (X, C, T)."""
    total = samples[:, :, 0] * weights[:, :, 0]
    for point in range(1, samples.shape[2]):
        total = torch.addcmul(total, samples[:, :, point], weights[:, :, point])
    return total


def sample_levels(value: Tensor, points: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """Return weighted sums of bilinear samples of feature maps; beyond their edges the maps are 0.

    Args:
        value: (B, N, D), the maps of all levels.
        points: (B, T, H, L, P, 2) in `grid_sample`'s coordinates, float32.
        weights: (B, T, H, L, P) float32.
        sizes: h and w of every level.

    Returns:
        (B, T, D) float32; D is divided among the heads.
    """
    B, T, H, L, P = weights.shape
    maps = precise(value).transpose(1, 2).reshape(B * H, -1, value.shape[1])  # (B H, D / H, N)
    # Queries last: the sum over points then adds whole rows, which a CPU does faster than sums of a few neighbours.
    # A compiler joins the operations itself.
    total = sum_points if torch.compiler.is_compiling() else SumOfPoints.apply
    grid = points.permute(3, 0, 2, 4, 1, 5).reshape(L, B * H, P, T, 2)
    share = weights.permute(3, 0, 2, 4, 1).reshape(L, B * H, 1, P, T)
    mixed = None
    for level, (part, (h, w)) in enumerate(zip(maps.split([h * w for h, w in sizes], dim=2), sizes, strict=True)):
        sampled = nn.functional.grid_sample(part.unflatten(2, (h, w)), grid[level], align_corners=False)
        own = total(sampled, share[level])  # (B H, D / H, T)
        mixed = own if mixed is None else mixed + own
    return mixed.reshape(B, -1, T).transpose(1, 2).contiguous()


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (equation 3).

    Args:
        hidden_size: D.
        num_heads: H.
        num_levels: L.
        num_points: P.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_levels, self.num_points = num_levels, num_points
        self.sampling_offsets = nn.Linear(hidden_size, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_size, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors do: uniform weights at points in a different direction for each head, 1 to P cells
        away (section 4.1, appendix A.4)."""
        init.zeros_(self.sampling_offsets.weight)
        init.copy_(self.sampling_offsets.bias, self.first_offsets().flatten())
        init.zeros_(self.attention_weights.weight)
        init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            init.xavier_uniform_(layer.weight)
            init.zeros_(layer.bias)

    def first_offsets(self) -> Tensor:
        """Return the initial offsets (H, L, P, 2): head k at angle 2 pi k / H, on a square, point p at p + 1 cells."""
        steps = self.num_levels * self.num_points
        heads = self.attention_weights.out_features // steps
        angles = torch.arange(heads) * (2.0 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1.0, self.num_points + 1)[:, None]
        return (directions[:, None, None] * distances).expand(-1, self.num_levels, -1, -1)

    def with_whole_gradient(self, value: Tensor) -> Tensor:
        """Return a value that all heads read; with tensor parallelism, its gradient is summed over the processes."""
        mesh = getattr(self.sampling_offsets.weight, "device_mesh", None)
        if mesh is None or not value.requires_grad:
            return value
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        references: References,
        memory_mask: Tensor | None = None,
        positions: Tensor | None = None,
        output_points: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: (B, T, D), source of the queries.
            memory: (B, N, D), the feature maps of all levels.
            references: of the queries.
            memory_mask: (B, N) bool, True = image.
            positions: added to the hidden states for offsets and weights, broadcastable to them.
            output_points: also return the points.

        Returns:
            (B, T, D); the weights (B, T, H, L, P), which sum to 1 over levels and points; the points
            (B, T, H, L, P, 2), x and y as shares of the padded image, or None.
        """
        B, T = hidden_states.shape[:2]
        queries = placed(hidden_states, positions)
        offsets = self.sampling_offsets(queries).view(B, T, -1, self.num_levels, self.num_points, 2)
        scores = self.attention_weights(queries).view(B, T, offsets.shape[2], -1)  # (B, T, H, L P)
        value = self.value_proj(memory)
        if memory_mask is not None:
            value = value.masked_fill(~memory_mask[..., None], 0.0)
        with maybe_autocast(value.device.type, enabled=False):
            weights = precise(scores).softmax(-1).unflatten(-1, (self.num_levels, -1))
            centre, scale = (self.with_whole_gradient(part)[:, :, None, :, None] for part in references[:2])
            offsets = precise(offsets)
            points = torch.addcmul(centre.to(offsets.dtype), offsets, scale.to(offsets.dtype))  # (B, T, H, L, P, 2)
            mixed = sample_levels(value, points, weights, references.sizes).to(value.dtype)
        return self.output_proj(mixed), weights, (points + 1.0) / 2.0 if output_points else None
