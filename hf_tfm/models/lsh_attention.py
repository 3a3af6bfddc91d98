"""Attention between tokens whose vectors hash alike (Kitaev et al. 2020, "Reformer", arXiv:2001.04451, section 2).

    vectors -> hashes -> sorted by hash -> chunks attend to themselves and to the chunk before -> sorted back

Shapes: B sequences; H heads; T tokens; Dh width of a head; R rounds; n chunks of c tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import normalize, pad
from transformers.utils.generic import maybe_autocast

from .attention_method import AttentionInputs, AttentionMethod, option

ITSELF = -5e4  # score of a token with itself: it attends to itself only if there is no other token


@dataclass(frozen=True)
class ReformerAttention(AttentionMethod):
    """Reformer: shared queries and keys, locality-sensitive hashing.

    The shared vectors are the means of query and key projections; keys are normalised to length 1, and a token attends
    to itself only if there is no other one. Padding is sorted behind all tokens, and the first chunk has none before
    it (the authors' looks back to the last one), so that no result depends on the padded length.

    Args:
        num_hashes: number of rounds, R; the result is their average, weighted by the sums of their softmaxes.
        num_buckets: number of hashes; even, or 1.
        chunk_size: number of tokens of a chunk, c.
        seed: seed of the rotations, which are the same in all layers and heads.
    """

    num_hashes: int = option(2, 1, 64)
    num_buckets: int = option(32, 1, 2**16)
    chunk_size: int = option(64, 1)
    seed: int = option(0, 0, 2**32 - 1)

    def __post_init__(self):
        super().__post_init__()
        if self.num_buckets % 2 and self.num_buckets > 1:
            raise ValueError(f"num_buckets must be even or 1, got {self.num_buckets}")

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout = given.tokens, given.scaling, given.dropout
        shared, size, length = (query + key) / 2, min(self.chunk_size, key.shape[2]), key.shape[2]
        order = self.hashes(shared, tokens).argsort(dim=-1, stable=True)  # (B, H, R, T)
        order = pad(order, (0, -length % size), value=length)  # of a last chunk that is not full
        there = torch.ones(len(key), length, dtype=torch.bool, device=key.device) if tokens is None else tokens
        there = pad(there, (0, 1))[:, None, None].expand(*order.shape[:3], -1).gather(3, order)
        place = order.unflatten(3, (-1, size))  # (B, H, R, n, c)

        def chunks(states: Tensor) -> Tensor:
            states = pad(states, (0, 0, 0, 1))[:, :, None].expand(-1, -1, self.num_hashes, -1, -1)
            sorted_states = states.gather(3, order[..., None].expand(*order.shape, states.shape[-1]))
            return sorted_states.unflatten(3, (-1, size))  # (B, H, R, n, c, D)

        def with_previous(parts: Tensor) -> Tensor:
            before = torch.cat([torch.zeros_like(parts[:, :, :, :1]), parts[:, :, :, :-1]], dim=3)
            return torch.cat([before, parts], dim=4)

        vectors = chunks(shared)
        keys, values = with_previous(normalize(vectors, dim=-1)), with_previous(chunks(value))
        allowed = with_previous(there.unflatten(3, (-1, size)))[..., None, :]
        scores = (vectors * scaling) @ keys.transpose(-2, -1)  # (B, H, R, n, c, 2 c)
        places = with_previous(place + 1) - 1  # the chunk before the first one has no place
        scores = scores.masked_fill(places[..., None, :] == place[..., None], ITSELF)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        total = scores.logsumexp(dim=-1, keepdim=True)  # (B, H, R, n, c, 1)
        mixed = drop(scores.softmax(dim=-1), dropout) @ values
        back = order.argsort(dim=-1)[..., :length, None]  # (B, H, R, T, 1)
        total, mixed = (
            total.flatten(3, 4).gather(3, back),
            mixed.flatten(3, 4).gather(3, back.expand(-1, -1, -1, -1, value.shape[-1])),
        )
        return (total.softmax(dim=2) * mixed).sum(dim=2).to(value.dtype)

    def hashes(self, shared: Tensor, tokens: Tensor | None) -> Tensor:
        """Return the hash of each token in each round (section 2.2): (B, H, T, Dh) -> (B, H, R, T), the highest for
        padding."""
        half = rotations(self.num_hashes, shared.shape[-1], max(self.num_buckets // 2, 1), self.seed, shared.device)
        with maybe_autocast(shared.device.type, enabled=False):  # bf16 would change the hashes
            turned = torch.einsum("bhtd,rdk->bhrtk", shared.detach().float(), half)
        turned = torch.cat([turned, -turned], dim=-1) if self.num_buckets > 1 else turned
        found = turned.argmax(dim=-1)
        return found if tokens is None else found.masked_fill(~tokens[:, None, None], self.num_buckets)


@torch.compiler.assume_constant_result
def rotations(rounds: int, dim: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return random rotations, (R, Dh, count) from N(0, 1)."""
    return torch.from_numpy(random_rotations(rounds, dim, count, seed)).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def random_rotations(rounds: int, dim: int, count: int, seed: int) -> np.ndarray:
    """Draw the numbers of `rotations`. NumPy guarantees the stream of this generator."""
    return np.random.RandomState(seed).standard_normal((rounds, dim, count)).astype(np.float32)
