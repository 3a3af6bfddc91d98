"""Attention with kernels instead of a softmax, whose cost is linear in the number of tokens.

    phi(q) . phi(k) in place of exp(q . k): out = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K))

`LinearAttention` takes phi(x) = elu(x) + 1; `PerformerAttention` random features, of which exp(q . k) is the mean.

Shapes: B sequences; H heads; T tokens; Dh width of a head; M features.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .attention_method import AttentionInputs, AttentionMethod, option, without_padding

TINY = 1e-30  # smallest divisor: a smaller sum is that of a row without tokens
CHUNK = 128  # tokens whose products are formed at once in causal attention


@dataclass(frozen=True)
class LinearAttention(AttentionMethod):
    """Linear Transformer (Katharopoulos et al. 2020, arXiv:2006.16236, equations 5 to 7); phi(x) = elu(x) + 1."""

    causal: ClassVar[bool] = True

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`; the features are neither scaled nor dropped, as in the paper."""
        query, key, value = given.query, given.key, given.value
        tokens, layer = given.tokens, given.layer
        with maybe_autocast(query.device.type, enabled=False):
            features = [nn.functional.elu(states.float()) + 1.0 for states in (query, key)]
            return kernel_attention(*features, value, tokens, layer.is_causal)


@dataclass(frozen=True)
class PerformerAttention(AttentionMethod):
    """FAVOR+ (Choromanski et al. 2021, arXiv:2009.14794, section 2): positive orthogonal random features.

    Numerator and denominator of softmax attention are estimated without bias; the error falls with the number of
    features. The features are drawn once, the same in all layers and heads.

    Args:
        num_features: number of random features, M.
        seed: seed of the features.
    """

    causal: ClassVar[bool] = True

    num_features: int = option(256, 1, 2**16)
    seed: int = option(0, 0, 2**32 - 1)

    def attend(self, given: AttentionInputs) -> Tensor:
        """See `AttentionMethod.attend`; nothing is dropped, as in the paper."""
        query, key, value = given.query, given.key, given.value
        tokens, scaling, layer = given.tokens, given.scaling, given.layer
        directions = random_directions(self.num_features, query.shape[-1], self.seed, query.device)
        with maybe_autocast(query.device.type, enabled=False):
            features = []
            for states in (query, key):
                states = states.float() * scaling**0.5
                norms = states.square().sum(dim=-1, keepdim=True) / 2
                features.append((states @ directions.T).sub_(norms))  # (B, H, T, M), logarithms
            query, key = features
            # Any factor per query, and any per head of the keys, cancels. A causal layer must not see later keys: the
            # largest value that any key can have takes the place of the largest one that occurs.
            if layer.is_causal:
                highest = directions.square().sum(dim=-1).amax() / 2
            else:
                there = key if tokens is None else key.masked_fill(~tokens[:, None, :, None], -torch.inf)
                highest = there.detach().amax(dim=(-2, -1), keepdim=True)
            query = query.sub_(query.detach().amax(dim=-1, keepdim=True)).exp_()
            return kernel_attention(query, key.sub_(highest).exp_(), value, tokens, layer.is_causal)


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor | None, causal: bool) -> Tensor:
    """Compute attention from features of queries and keys, in float32.

    Args:
        query: (B, H, Tq, M) at least 0; if causal, those of the last Tq tokens.
        key: (B, H, T, M) at least 0.
        value: (B, H, T, Dv).
        tokens: (B, T) bool, False at padding.
        causal: mask later tokens.

    Returns:
        (B, H, Tq, Dv) in the dtype of the values; 0 where there is no token to attend to.
    """
    key = without_padding(key, tokens)
    values = nn.functional.pad(without_padding(value.float(), tokens), (0, 1), value=1.0)  # sums of keys come last
    sums = causal_products(query, key, values) if causal else query @ (key.transpose(2, 3) @ values)
    return (sums[..., :-1] / sums[..., -1:].clamp(min=TINY)).to(value.dtype)


def causal_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute sum_{j <= i} (q_i . k_j) v_j in chunks: (B, H, Tq, M), (B, H, T, M), (B, H, T, D) -> (B, H, Tq, D).

    Args:
        query: those of the last Tq tokens.
    """
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    seen = key[:, :, :past].transpose(2, 3) @ value[:, :, :past]  # (B, H, M, D)
    chunk = min(CHUNK, length)
    spare = -length % chunk
    query, key, value = (
        nn.functional.pad(states, (0, 0, 0, spare)).unflatten(2, (-1, chunk))
        for states in (query, key[:, :, past:], value[:, :, past:])
    )  # (B, H, n, chunk, ...)
    products = key.transpose(-2, -1) @ value  # (B, H, n, M, D)
    before = products.cumsum(dim=2) - products + seen[:, :, None]
    within = (query @ key.transpose(-2, -1)).tril() @ value
    return (query @ before + within).flatten(2, 3)[:, :, :length]


@torch.compiler.assume_constant_result
def random_directions(count: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """Return random directions, orthogonal in blocks of ``dim``, with the lengths of normal vectors: (count, dim)."""
    return torch.from_numpy(orthogonal_numbers(count, dim, seed)).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def orthogonal_numbers(count: int, dim: int, seed: int) -> np.ndarray:
    """Draw the numbers of `random_directions`. NumPy guarantees the stream of this generator."""
    random = np.random.RandomState(seed)
    blocks = []
    for _ in range(-(-count // dim)):
        directions, triangle = np.linalg.qr(random.standard_normal((dim, dim)))
        # LAPACK's signs are not random: the mean direction would not be 0, and the estimate of exp(q . k) biased.
        blocks.append((directions * np.sign(np.diag(triangle))).T)
    lengths = np.linalg.norm(random.standard_normal((count, dim)), axis=1)
    return (np.concatenate(blocks)[:count] * lengths[:, None]).astype(np.float32)
