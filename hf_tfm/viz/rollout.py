"""Attention rollout: contribution of each input token to each output token (Abnar & Zuidema 2020,
arXiv:2005.00928)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Multiply the attention of all layers, with the residual connection weighted as half of each layer (section 3).

    Heads are averaged, the identity is added for the residual connection, rows are normalised to sum to 1, and the
    matrices are multiplied from the first layer to the last.

    Args:
        attentions: of L layers, the first one first, each (B, H, T, T) with rows that sum to 1, such as the
            ``attentions`` of a model output. Rollout requires self-attention, so that token positions are preserved.

    Returns:
        (B, T, T) float32; row i holds the contributions to output token i, and sums to 1.

    Raises:
        ValueError: there are no maps, or one differs from (B, H, T, T) of the first.
    """
    if not attentions:
        raise ValueError("attentions must hold the maps of at least one layer, got none")
    B, _, T, _ = attentions[0].shape if attentions[0].ndim == 4 else (0, 0, 0, 0)
    identity = torch.eye(T, device=attentions[0].device)
    rollout = identity.expand(B, T, T)
    for number, maps in enumerate(attentions):
        if maps.ndim != 4 or (len(maps), *maps.shape[2:]) != (B, T, T):
            raise ValueError(
                f"attentions must be (B, H, T, T) with the same B and T in every layer, got {tuple(maps.shape)} "
                f"in layer {number}"
            )
        mixed = maps.float().mean(dim=1) + identity  # (B, T, T)
        rollout = mixed / mixed.sum(dim=-1, keepdim=True) @ rollout
    return rollout
