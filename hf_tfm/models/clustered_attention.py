"""Self-attention in which queries that hash alike share one row of attention (Zheng et al. 2020, "End-to-End Object
Detection with Adaptive Clustering Transformer", arXiv:2011.09315).

    queries (B, H, T, Dh) -> hashes (B, H, T) -> clusters of equal hash -> prototypes, their means (B, H, C, Dh)
    prototypes attend to all keys: (B, H, C, Dh) -> every query takes the output of its prototype: (B, T, H, Dh)

It needs no training and has no weights. Shapes: B sequences; H heads; T tokens; Dh width of a head; L = rounds;
C = the largest number of clusters of a head in the batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils.generic import maybe_autocast

from .attention_method import AttentionInputs, AttentionMethod, option

PADDING = -(2**63)  # hash of padded tokens, which form a cluster of their own


@dataclass(frozen=True)
class ClusteredAttention(AttentionMethod):
    """Clustered attention, a method of `set_encoder_attention`.

    The authors hash queries that are already multiplied by the scaling of attention, so ``width`` is in those units
    here too, whether or not the queries of a model are scaled. Their 64-bit code of 32 rounds of 2 bits merges unlike
    queries where a hash exceeds 3; here the hashes of the rounds are combined by random 64-bit factors.

    Args:
        rounds: number of random projections, L; more give more clusters and come closer to exact attention.
        width: width of a hash bucket; a smaller one gives more clusters.
        seed: seed of the random projections, which are the same in all layers and heads.

    Raises:
        ValueError: an option is out of range.
    """

    rounds: int = option(32, 1, 1024)
    width: float = option(8.0)
    seed: int = option(0, 0, 2**32 - 1)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, dropout = given.tokens, given.scaling, given.dropout
        mask = None if tokens is None else tokens[:, None, None]  # (B, 1, 1, T)
        clusters, count = self.clusters(query, scaling, mask)
        prototypes = cluster_means(query, clusters, count)  # (B, H, C, Dh)
        mixed = scaled_dot_product_attention(prototypes, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return mixed.gather(2, clusters[..., None].expand(*clusters.shape, value.shape[-1]))  # (B, H, T, Dh)

    def clusters(self, query: Tensor, scaling: float, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Cluster the queries of each row and head; reading the number of clusters synchronises a GPU.

        Args:
            query: (B, H, T, Dh).
            scaling: factor of the scores.
            mask: (B, 1, 1, T) bool, False at padding.

        Returns:
            the cluster of each query, (B, H, T) int64, and C.
        """
        hashes = self.hashes(query.detach(), scaling)
        if mask is not None:
            hashes = hashes.masked_fill(~mask[:, :, 0], PADDING)
        found, order = hashes.sort(dim=-1)
        ranks = (found[..., 1:] != found[..., :-1]).cumsum(dim=-1)
        ranks = nn.functional.pad(ranks, (1, 0))  # (B, H, T), numbers the runs of equal hashes
        count = ranks[..., -1].max().item() + 1
        if torch.compiler.is_compiling():
            torch._check(count >= 1)
            torch._check(count <= ranks.shape[-1])
            count += 1  # one empty cluster more: a compiled graph must know that there is not just one
        return torch.empty_like(order).scatter_(-1, order, ranks), count

    def hashes(self, query: Tensor, scaling: float) -> Tensor:
        """Join the L hashes of each query, floor((a_l . q + b_l) / width): (B, H, T, Dh) -> (B, H, T) int64."""
        projections, offsets, factors = hash_family(self.rounds, query.shape[-1], self.seed, query.device)
        projections = projections * (scaling / self.width)
        queries = query.transpose(1, 2)  # (B, T, H, Dh), as attention layers store them
        with maybe_autocast(query.device.type, enabled=False):  # bf16 would round the hashes, not only the queries
            buckets = nn.functional.linear(queries.float(), projections, offsets).floor_().long()  # (B, T, H, L)
        # Wraps around modulo 2^64: unlike queries get the same hash with a probability of about 2^-63.
        terms = buckets.mul_(factors)
        # ONNX Runtime reduces integers as floating-point numbers, but adds them exactly.
        joint = sum(terms.unbind(dim=-1)) if torch.compiler.is_exporting() else terms.sum(dim=-1)
        return joint.transpose(1, 2)


@torch.compiler.assume_constant_result
def hash_family(rounds: int, dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return projections (L, Dh) from N(0, 1), offsets (L,) in buckets from U(0, 1), and odd factors (L,) int64.

    The first rounds are the same for every number of rounds.
    """
    projections, offsets, factors = map(torch.from_numpy, random_numbers(rounds, dim, seed))
    return tuple(part.to(device, non_blocking=True) for part in (projections, offsets, factors))


@lru_cache(maxsize=64)
def random_numbers(rounds: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the numbers of `hash_family`. NumPy guarantees the stream of this generator."""
    normal, uniform, integer = (np.random.RandomState([seed, part]) for part in range(3))
    projections = normal.standard_normal((rounds, dim)).astype(np.float32)
    offsets = uniform.uniform(size=rounds).astype(np.float32)
    return projections, offsets, integer.randint(0, 2**63, size=rounds, dtype=np.int64) | 1


def cluster_means(query: Tensor, clusters: Tensor, count: int) -> Tensor:
    """Return the mean query of each cluster, summed in float32 at least: (B, H, T, Dh), (B, H, T) -> (B, H, C, Dh)."""
    queries = query.to(torch.promote_types(query.dtype, torch.float32))
    sums = queries.new_zeros(*clusters.shape[:2], count, query.shape[-1])
    sums = sums.scatter_add(2, clusters[..., None].expand_as(query), queries)
    sizes = sums.new_zeros(*clusters.shape[:2], count).scatter_add(2, clusters, sums.new_ones(clusters.shape))
    return (sums / sizes.clamp(min=1.0)[..., None]).to(query.dtype)
