"""Attention to some blocks of tokens: neighbours, a window with global tokens, or random blocks.

Shapes: B sequences; H heads; T tokens; Dh width of a head; n blocks of c tokens; S keys that a block attends to.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import initialization as init

from .attention_method import AttentionInputs, AttentionMethod, AttentionWeights, masked_scores, option


def all_tokens(key: Tensor, tokens: Tensor | None) -> Tensor:
    """Return ``tokens`` (B, T) bool, all True for None."""
    return torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device) if tokens is None else tokens


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, rate: float
) -> Tensor:
    """Compute attention with explicit scores: (..., c, Dh), (..., S, Dh), (..., S, Dv) -> (..., c, Dv).

    Args:
        allowed: bool, broadcastable to (..., c, S).
        rate: dropout rate of the probabilities.
    """
    scores = masked_scores((query * scaling) @ key.transpose(-2, -1), allowed)
    return drop(scores.softmax(dim=-1), rate) @ value


def split(states: Tensor, size: int, before: int = 0, after: int = 0) -> Tensor:
    """Split (B, H, T, D) into blocks with some tokens before and after each: (B, H, n, before + size + after, D)."""
    spare = -states.shape[2] % size
    blocks = pad(states, (0, 0, before, spare + after)).unfold(2, before + size + after, size)
    return blocks.transpose(-2, -1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    near: Tensor,
    past: int,
    shared: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Compute attention of blocks of c tokens to ``past`` tokens before, their own, and as many after as ``near`` has.

    Args:
        query: (B, H, T, Dh); key and value alike.
        tokens: (B, T) bool, False at padding.
        near: (c, S) bool, which tokens of the window a query of a block attends to; S is the size of the window.
        shared: number of first tokens that all queries attend to, and that are left out of the windows.

    Returns:
        (B, H, T, Dh).
    """
    (size, window), length = near.shape, query.shape[2]
    edges = past, window - past - size
    there = tokens.clone()
    there[:, :shared] = False
    allowed = split(there[:, None, :, None], size, *edges)[..., 0][:, 0, :, None] & near  # (B, n, c, S)
    query = split(query, size)
    key_blocks, value_blocks = (split(states, size, *edges) for states in (key, value))
    if shared:
        blocks = query.shape[2]
        first = [states[:, :, None, :shared].expand(-1, -1, blocks, -1, -1) for states in (key, value)]
        key_blocks, value_blocks = (
            torch.cat(pair, dim=3) for pair in zip(first, (key_blocks, value_blocks), strict=True)
        )
        global_tokens = tokens[:, None, None, :shared].expand(-1, blocks, size, -1)
        allowed = torch.cat([global_tokens, allowed], dim=3)
    mixed = softmax_attention(query, key_blocks, value_blocks, allowed[:, None], scaling, dropout)
    return mixed.flatten(2, 3)[:, :, :length]


@dataclass(frozen=True)
class LocalAttention(AttentionMethod):
    """Each block of tokens attends to itself and to its neighbours on both sides.

    If causal, to itself, without later tokens, and to those before. Cached queries are computed one block at a time.

    Args:
        block_size: number of tokens of a block, c.
        neighbours: number of blocks on each side.
    """

    causal: ClassVar[bool] = True

    block_size: int = option(64, 1)
    neighbours: int = option(1, 0)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout, layer = given.tokens, given.scaling, given.dropout, given.layer
        size, beside = self.block_size, self.neighbours * self.block_size
        cached = key.shape[2] - query.shape[2]
        skipped = cached // size * size  # whole blocks without a query
        query = pad(query, (0, 0, cached - skipped, 0))
        start = max(skipped - beside, 0)
        tokens = all_tokens(key, tokens)[:, start:]
        key, value = key[:, :, start:], value[:, :, start:]
        query = pad(query, (0, 0, skipped - start, 0))
        inner = torch.ones(size, size, dtype=torch.bool, device=key.device)
        outer = torch.ones(size, beside, dtype=torch.bool, device=key.device)
        near = torch.cat([outer, inner.tril()] if layer.is_causal else [outer, inner, outer], dim=1)
        mixed = window_attention(query, key, value, tokens, near, beside, 0, scaling, dropout)
        return mixed[:, :, cached - start :]


@dataclass(frozen=True)
class StridedAttention(AttentionMethod):
    """Each token attends to every ``stride``-th token before and after it.

    It is what the Long Range Arena calls "local" (Tay et al. 2021, arXiv:2011.04006): its code reshapes T tokens to
    (c, T / c) and attends along the first axis, which is a stride of T / c.

    Args:
        stride: distance of the tokens.
    """

    stride: int = option(16, 1)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout = given.tokens, given.scaling, given.dropout
        length = key.shape[2]
        tokens = split(all_tokens(key, tokens)[:, None, :, None], self.stride)[:, 0, :, :, 0]  # (B, n, stride)
        mask = tokens.transpose(1, 2).flatten(0, 1)[:, None, None]  # (B stride, 1, 1, n)
        query, key, value = (
            split(states, self.stride).permute(0, 3, 1, 2, 4).flatten(0, 1) for states in (query, key, value)
        )  # (B stride, H, n, Dh)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return mixed.unflatten(0, (-1, self.stride)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :length]


@dataclass(frozen=True)
class LongformerAttention(AttentionMethod):
    """Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1): a sliding window, and global tokens.

    The first tokens are global: they attend to all tokens, and all attend to them. The authors' global queries, keys
    and values are further projections of the hidden states; here global queries and keys are maps of the projected
    ones, a head at a time, which start as the identity, and values are shared.

    Args:
        window: number of tokens before and after a token, together; even.
        num_global_tokens: number of first tokens that are global, for instance the class token.
    """

    window: int = option(128, 2)
    num_global_tokens: int = option(1, 0)

    def __post_init__(self):
        super().__post_init__()
        if self.window % 2:
            raise ValueError(f"window must be even, got {self.window}")

    def weights(self, num_heads: int, head_dim: int, length: int | None) -> AttentionWeights | None:
        """Maps of queries and keys for the attention of global tokens, (H, Dh, Dh)."""
        if not self.num_global_tokens:
            return None
        unit = torch.eye(head_dim).expand(num_heads, -1, -1)
        weight = unit.shape, lambda table: init.copy_(table, unit)
        return AttentionWeights(queries=weight, keys=weight)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout, layer = given.tokens, given.scaling, given.dropout, given.layer
        size, shared = self.window // 2, min(self.num_global_tokens, key.shape[2])
        tokens = all_tokens(key, tokens)
        distance = torch.arange(3 * size, device=key.device) - size - torch.arange(size, device=key.device)[:, None]
        mixed = window_attention(query, key, value, tokens, distance.abs() <= size, size, shared, scaling, dropout)
        if not shared:
            return mixed
        maps = layer.attention_weights
        query, key = (query[:, :, :shared] @ maps.queries).to(query), (key @ maps.keys).to(key)
        mask = tokens[:, None, None]
        first = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return torch.cat([first, mixed[:, :, shared:]], dim=2)


@dataclass(frozen=True)
class BigBirdAttention(AttentionMethod):
    """BigBird (Zaheer et al. 2020, arXiv:2007.14062, section 2, "ITC"): global, neighbouring and random blocks.

    The first and the last block of each row are global: they attend to all tokens, and all attend to them. A row of at
    most ``num_random_blocks`` + 3 blocks has exact attention.

    Args:
        block_size: number of tokens of a block, c.
        num_random_blocks: number of random blocks that each block attends to.
        seed: seed of the random blocks, which are the same in all layers and heads.
    """

    block_size: int = option(64, 1)
    num_random_blocks: int = option(3, 0)
    seed: int = option(0, 0, 2**32 - 1)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout = given.tokens, given.scaling, given.dropout
        size, (batch, heads, length, _) = self.block_size, query.shape
        tokens = all_tokens(key, tokens)
        places = torch.arange(length, device=key.device)
        last = (tokens * places).amax(dim=1) // size  # (B,), the last block of each row
        chosen, there = self.blocks(last, -(-length // size))  # (B, n, K)
        allowed = pick(tokens[:, None, :, None], chosen, size)[..., 0]  # (B, 1, n, K c)
        allowed = allowed & there.repeat_interleave(size, dim=2)[:, None]
        key_blocks, value_blocks = (pick(states, chosen, size) for states in (key, value))  # (B, H, n, K c, Dh)
        allowed = allowed[..., None, :]  # (B, 1, n, 1, K c)
        mixed = softmax_attention(split(query, size), key_blocks, value_blocks, allowed, scaling, dropout)
        mixed = mixed.flatten(2, 3)[:, :, :length]
        ends = (last[:, None] * size + torch.arange(size, device=key.device)).clamp(max=length - 1)
        ends = torch.cat([places[: min(size, length)].expand(batch, -1), ends], dim=1)  # (B, 2 c)
        ends = ends[:, None, :, None].expand(-1, heads, -1, -1)
        mask = tokens[:, None, None]
        first = query.gather(2, ends.expand(-1, -1, -1, query.shape[-1]))
        first = scaled_dot_product_attention(first, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return mixed.scatter(2, ends.expand_as(first), first)

    def blocks(self, last: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose the blocks that each block attends to.

        Args:
            last: (B,) number of the last block of each row.
            count: number of blocks, n.

        Returns:
            numbers (B, n, K), and which of them count, (B, n, K) bool: a block is chosen once, and a short row has
            fewer.
        """
        number, few = torch.arange(count, device=last.device)[:, None], self.num_random_blocks + 3
        last = last[:, None, None]
        shares = random_shares(count, 2 * few, self.seed, last.device)  # (n, 2 few)
        random = (shares * (last + 1)).long()
        random = torch.where(last < few, torch.arange(2 * few, device=last.device), random)  # all of a short row
        near = number + torch.tensor([-1, 0, 1], device=last.device)  # (n, 3)
        chosen = torch.cat(
            [near.expand(len(last), -1, -1), 0 * last.expand(-1, count, -1), last.expand(-1, count, -1), random], dim=2
        )
        new = (chosen[..., None] != chosen[..., None, :]) | ~torch.ones(
            chosen.shape[-1:] * 2, dtype=torch.bool, device=last.device
        ).tril(-1)
        counts = new.all(dim=-1) & (chosen >= 0) & (chosen <= last)
        drawn = counts[..., 5:].cumsum(dim=-1) <= self.num_random_blocks
        counts[..., 5:] &= drawn
        # At most 5 + num_random_blocks of them count.
        first = counts.byte().argsort(dim=-1, descending=True, stable=True)[..., : self.num_random_blocks + 5]
        return chosen.gather(2, first).clamp(min=0, max=count - 1), counts.gather(2, first)


def pick(states: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Return the chosen blocks of states side by side: (B, H, T, D), numbers (B, n, K) -> (B, H, n, K size, D)."""
    blocks = split(states, size).transpose(1, 2)  # (B, n, H, size, D)
    batch, count = blocks.shape[:2]
    numbers = chosen + count * torch.arange(batch, device=chosen.device)[:, None, None]
    found = blocks.reshape(batch * count, *blocks.shape[2:]).index_select(0, numbers.flatten())
    return found.unflatten(0, chosen.shape).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)


@torch.compiler.assume_constant_result
def random_shares(count: int, draws: int, seed: int, device: torch.device) -> Tensor:
    """Return random numbers in [0, 1), (count, draws); those of the first blocks are the same for every count."""
    return torch.from_numpy(random_numbers(count, draws, seed)).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def random_numbers(count: int, draws: int, seed: int) -> np.ndarray:
    """Draw the numbers of `random_shares`. NumPy guarantees the stream of this generator."""
    return np.random.RandomState(seed).uniform(size=(count, draws)).astype(np.float32)
