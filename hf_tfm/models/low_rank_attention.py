"""Attention of low rank: few keys, few landmarks, or scores that do not depend on the keys.

Shapes: B sequences; H heads; T tokens; Dh width of a head; N maximum number of tokens of the model.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, scaled_dot_product_attention
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .attention_method import (
    AttentionInputs,
    AttentionMethod,
    AttentionWeights,
    masked_scores,
    option,
    without_padding,
)


def require_length(method: str, option: int | None, length: int | None) -> int:
    """Return the maximum number of tokens: that of the option ``length``, or else of the model.

    Raises:
        ValueError: there is neither.
    """
    if option is None and length is None:
        raise ValueError(f'length is needed: "{method}" has weights for each position, and the model has no maximum')
    return option or length or 0


def first_positions(table: Tensor, length: int, dim: int) -> Tensor:
    """Return the part of a table of weights for the first positions.

    Args:
        table: has a size of N at ``dim``.

    Raises:
        ValueError: the input is longer.
    """
    if length > table.shape[dim]:
        raise ValueError(
            f"the input has {length} tokens, but the weights of its attention end at {table.shape[dim]}: shorten it, "
            "or train with a larger max_position_embeddings or length"
        )
    return table.narrow(dim, 0, length)


@dataclass(frozen=True)
class LinformerAttention(AttentionMethod):
    """Linformer (Wang et al. 2020, arXiv:2006.04768, equation 7): keys and values are projected to ``rank`` rows.

    The projections are shared by the heads of a layer. Padded keys and values count as 0.

    Args:
        rank: number of projected keys, k.
        share: one projection for keys and values, E = F, as in the Long Range Arena.
        length: maximum number of tokens; default, max_position_embeddings of the model.
    """

    rank: int = option(64, 1)
    share: bool = option(True)
    length: int | None = option(None, 1)

    def weights(self, num_heads: int, head_dim: int, length: int | None) -> AttentionWeights:
        """Projections (k, N); the initial ones preserve the variance of N keys."""
        length = require_length("linformer", self.length, length)
        weight = (self.rank, length), partial(init.normal_, std=length**-0.5)
        return AttentionWeights(keys=weight) if self.share else AttentionWeights(keys=weight, values=weight)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout, layer = given.tokens, given.scaling, given.dropout, given.layer
        weights = layer.attention_weights
        rows = first_positions(weights.keys, key.shape[2], 1)
        others = rows if self.share else first_positions(weights.values, key.shape[2], 1)
        key, value = rows @ without_padding(key, tokens), others @ without_padding(value, tokens)  # (B, H, k, Dh)
        return scaled_dot_product_attention(query, key.to(query), value.to(query), dropout_p=dropout, scale=scaling)


@dataclass(frozen=True)
class SynthesizerAttention(AttentionMethod):
    """Synthesizer (Tay et al. 2021, arXiv:2005.00743, section 3): scores that are learned, not computed from keys.

    All kinds are scores of vectors of the positions, so that SDPA computes them without a table of T x T.

    Args:
        kind: "factorized" (random, of low rank; section 3.1.3), "random" (section 3.1.2; N x N weights a head), or
            "dense" (section 3.1.1: relu of the query projection, then one score vector a position).
        rank: rank of the factorized scores.
        length: maximum number of tokens; default, max_position_embeddings of the model.
    """

    unused: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj")

    kind: str = option("factorized", choices=("factorized", "random", "dense"))
    rank: int = option(32, 1)
    length: int | None = option(None, 1)

    def weights(self, num_heads: int, head_dim: int, length: int | None) -> AttentionWeights:
        """Factors (H, N, rank) or scores (H, N, N); dense, score vectors (H, N, Dh)."""
        length = require_length("synthesizer", self.length, length)
        if self.kind == "random":
            return AttentionWeights(scores=((num_heads, length, length), init.xavier_uniform_))
        width = self.rank if self.kind == "factorized" else head_dim
        table = (num_heads, length, width), partial(init.normal_, std=width**-0.25)
        return (
            AttentionWeights(rows=table, columns=table)
            if self.kind == "factorized"
            else AttentionWeights(columns=table)
        )

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, dropout, layer = given.tokens, given.dropout, given.layer
        weights, length = layer.attention_weights, key.shape[2]
        mask = None if tokens is None else tokens[:, None, None]
        if self.kind == "random":
            scores = first_positions(first_positions(weights.scores, length, 1), length, 2)
            probabilities = masked_scores(scores[None], mask).softmax(dim=-1)
            return (nn.functional.dropout(probabilities, dropout) @ value).to(value.dtype)
        columns = first_positions(weights.columns, length, 1)[None]
        rows = query.relu() if self.kind == "dense" else first_positions(weights.rows, length, 1)[None]
        # Without a table of T x T, SDPA on a CPU needs vectors of the size of the values.
        width, size = value.shape[-1], max(value.shape[-1], columns.shape[-1])
        rows, columns, value = (
            nn.functional.pad(part.to(value.dtype), (0, size - part.shape[-1])).expand(len(value), -1, -1, -1)
            for part in (rows, columns, value)
        )
        mixed = scaled_dot_product_attention(rows, columns, value, attn_mask=mask, dropout_p=dropout, scale=1.0)
        return mixed[..., :width]


@dataclass(frozen=True)
class NystromAttention(AttentionMethod):
    """Nystromformer (Xiong et al. 2021, arXiv:2102.03902, equation 13 and algorithm 1).

    softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V, with landmarks Q~ and K~: means of equal segments of the
    tokens of each row, so that padding has no effect on them. The iteration for the pseudo-inverse starts from each
    matrix's own norms; the authors' code takes those of the whole batch.

    Args:
        num_landmarks: number of landmarks; a shorter row has one a token, and its attention is exact.
        iterations: number of steps towards the pseudo-inverse.
        kernel_size: tokens of the depthwise convolution of the values that is added, odd; 0, no convolution.
    """

    num_landmarks: int = option(64, 1)
    iterations: int = option(6, 1, 100)
    kernel_size: int = option(33, 0)

    def __post_init__(self):
        super().__post_init__()
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd or 0, got {self.kernel_size}")

    def weights(self, num_heads: int, head_dim: int, length: int | None) -> AttentionWeights | None:
        """Kernels of the convolution, (H, 1, kernel_size, 1)."""
        if not self.kernel_size:
            return None
        return AttentionWeights(
            kernels=((num_heads, 1, self.kernel_size, 1), partial(init.normal_, std=(3 * self.kernel_size) ** -0.5))
        )

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`; nothing is dropped, as in the paper."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, layer = given.tokens, given.scaling, given.layer
        if tokens is None:
            tokens = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        with maybe_autocast(query.device.type, enabled=False):
            segments, absent = equal_segments(tokens, self.num_landmarks)
            query, key = query.float() * scaling, key.float()
            few, marks = segments @ query, segments @ key  # (B, H, m, Dh)
            middle = masked_scores(few @ marks.transpose(2, 3), ~absent[:, None, None]).softmax(dim=-1)
            unit = torch.eye(self.num_landmarks, device=key.device)
            middle = torch.where((absent[:, None, None] | absent[:, None, :, None]), unit, middle)
            left = masked_scores(query @ marks.transpose(2, 3), ~absent[:, None, None]).softmax(dim=-1)
            right = scaled_dot_product_attention(few, key, value.float(), attn_mask=tokens[:, None, None], scale=1.0)
            mixed = left @ (pseudo_inverse(middle, self.iterations) @ right)
            if self.kernel_size:
                values, kernels = without_padding(value.float(), tokens), layer.attention_weights.kernels.float()
                mixed = mixed + conv2d(values, kernels, padding=(self.kernel_size // 2, 0), groups=len(kernels))
        return mixed.to(value.dtype)


def equal_segments(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the averaging matrix of equal segments of the tokens of each row, and which segments are empty.

    Args:
        tokens: (B, T) bool, False at padding.
        count: number of segments, m; a row of fewer tokens has one a token, and empty ones.

    Returns:
        (B, 1, m, T) float32 and (B, m) bool.
    """
    total = tokens.sum(dim=1, keepdim=True)  # (B, 1)
    places = (tokens.cumsum(dim=1) - 1) * total.clamp(max=count) // total.clamp(min=1)
    numbers = torch.arange(count, device=tokens.device)
    members = (places[:, None] == numbers[:, None]) & tokens[:, None]  # (B, m, T)
    sizes = members.sum(dim=-1, keepdim=True)
    return (members / sizes.clamp(min=1))[:, None], sizes[..., 0] == 0


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Approximate the Moore-Penrose inverse of (..., m, m) (Xiong et al. 2021, equation 11)."""
    unit = torch.eye(matrix.shape[-1], device=matrix.device)
    norms = matrix.abs().sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    norms = norms * matrix.abs().sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    inverse = matrix.transpose(-2, -1) / norms
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * unit - product @ (15 * unit - product @ (7 * unit - product)))
    return inverse
