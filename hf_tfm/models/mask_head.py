"""Mask head of panoptic DETR (Carion et al. 2020, arXiv:2005.12872, section 4.4, figure 8).

    object queries (B, Q, D), memory (B, N, D) -> attention maps (B, Q, A, h, w)
    maps of n queries + features of their images -> convolutions, upsampled along the backbone's maps -> (n, H/4, W/4)

Shapes: B images; Q queries, n of them selected; N = h w cells of the last feature map; D = config.d_model; A heads.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .linear import is_plain


class BoxAttention(nn.Module):
    """Attention maps of queries over cells, without values; one softmax over heads and cells together.

    Args:
        hidden_size: D.
        num_heads: A.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute maps: (B, Q, D), (B, N, D) -> (B, Q, A, N); ``mask`` (B, N) is True for image, False for padding."""
        query = (self.q_proj(queries) * self.scaling).unflatten(-1, (self.num_heads, -1))  # (B, Q, A, Dh)
        key = self.k_proj(memory).unflatten(-1, (self.num_heads, -1))  # (B, N, A, Dh)
        scores = torch.einsum("bqad,bnad->bqan", query, key)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        return scores.flatten(2).softmax(dim=-1).view_as(scores)


class ConvBlock(nn.Module):
    """3 x 3 convolution, group norm and activation."""

    def __init__(self, in_channels: int, out_channels: int, activation: str):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(min(8, out_channels), out_channels)
        self.activation = ACT2FN[activation]

    def forward(self, features: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, C', h, w)."""
        # On a CPU, torch's group norm with few channels per group is slow in channels-last format.
        return self.activation(self.norm(self.conv(features).contiguous()))


class FPNBlock(nn.Module):
    """One FPN step: upsample, add a larger feature map of the backbone, refine (Lin et al. 2017)."""

    def __init__(self, map_channels: int, in_channels: int, out_channels: int, activation: str):
        super().__init__()
        self.adapter = nn.Conv2d(map_channels, in_channels, kernel_size=1)
        self.refine = ConvBlock(in_channels, out_channels, activation)

    def forward(self, features: Tensor, feature_map: Tensor, images: Tensor) -> Tensor:
        """Combine (n, C, h, w) with maps (B, F, h', w') of images ``images`` (n,): -> (n, C / 2, h', w')."""
        larger = self.adapter(feature_map)  # once per image, not per query
        enlarged = nn.functional.interpolate(features, size=larger.shape[-2:], mode="nearest")
        return self.refine(enlarged + larger[images])


class MaskHead(nn.Module):
    """Predict mask logits of selected queries.

    Args:
        hidden_size: D, a multiple of 16.
        num_heads: A; D + A must be a multiple of 8.
        map_channels: channels F of the backbone's feature maps except the last, smallest map first.
        activation: activation after every norm.
    """

    def __init__(self, hidden_size: int, num_heads: int, map_channels: list[int], activation: str):
        super().__init__()
        self.hidden_size = hidden_size
        widths = [hidden_size // 2 ** (i + 1) for i in range(len(map_channels) + 1)]
        self.first = ConvBlock(hidden_size + num_heads, hidden_size + num_heads, activation)
        self.second = ConvBlock(hidden_size + num_heads, widths[0], activation)
        steps = zip(map_channels, widths, widths[1:], strict=False)
        self.steps = nn.ModuleList(FPNBlock(channels, *step, activation) for channels, *step in steps)
        self.last = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, projected: Tensor, attention: Tensor, maps: list[Tensor], images: Tensor) -> Tensor:
        """Predict the masks of n queries.

        Args:
            projected: (B, D, h, w).
            attention: (n, A, h, w).
            maps: feature maps of the backbone except the last, largest first, (B, F, h', w').
            images: (n,) int64, the image of each query.

        Returns:
            (n, H', W'), the size of the first of ``maps``.
        """
        # The authors convolve [features, attention] for every query. The features are the same for all queries of an
        # image and convolution is linear, so that part is computed once per image.
        first, D = self.first, self.hidden_size
        if is_plain(first.conv, nn.Conv2d):
            weight, bias = first.conv.weight, first.conv.bias
            shared = nn.functional.conv2d(projected, weight[:, :D], bias, padding=1)
            convolved = shared[images] + nn.functional.conv2d(attention, weight[:, D:], padding=1)
        else:
            convolved = first.conv(torch.cat([projected[images], attention], dim=1))
        states = self.second(first.activation(first.norm(convolved)))
        for step, feature_map in zip(self.steps, reversed(maps), strict=True):
            states = step(states, feature_map, images)
        return self.last(states)[:, 0]
