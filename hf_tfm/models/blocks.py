"""Encoder and decoder blocks (Vaswani et al. 2017, figure 1; pre-norm: Xiong et al. 2020).

    encoder block: x -> self-attention -> feed-forward
    decoder block: x -> masked self-attention -> cross-attention over the encoder's output -> feed-forward

Each sublayer f has a residual connection: post-norm ``norm(x + f(x))`` (the paper) or pre-norm
``x + f(norm(x))`` (ViT).

Shapes: B sequences; T target, S source positions; D = config.hidden_size; F = config.intermediate_size.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ConfigView, MultiHeadAttention
from .dropout import Dropout
from .encoder_attention import method_of, set_method
from .linear import project
from .sequence_positions import NOWHERE, BlockPlacement

FUSED = {"gelu_new": "gelu_pytorch_tanh"}  # the same function as one operation instead of eight


class FeedForward(nn.Module):
    """Position-wise feed-forward layer: two linear layers with an activation in between (section 3.3, equation 2)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[FUSED.get(config.hidden_act, config.hidden_act)]
        self.dropout = Dropout(config.activation_dropout)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), through (B, T, F)."""
        states = self.dropout(self.activation(project(self.up_proj, hidden_states)))
        return project(self.down_proj, states)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for random samples of a batch (Huang et al. 2016, arXiv:1603.09382).

    Args:
        rate: probability of dropping the branch for a sample, in [0, 1); kept branches are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if not self.training or not self.rate:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        return branch * (keep / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Residual(nn.Module):
    """Residual wrapper of a sublayer: dropout, drop path, residual sum and layer norm, in post- or pre-norm order."""

    def __init__(self, config: PreTrainedConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm_first = config.norm_first
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a sublayer with its residual: (B, T, D) -> (B, T, D).

        Args:
            sublayer: a function that calls a module, not the module itself: accelerate moves modules among the
                arguments of a call to another device, which breaks offloaded modules.
        """
        if self.norm_first:
            return hidden_states + self.drop_path(self.dropout(sublayer(self.norm(hidden_states))))
        return self.norm(hidden_states + self.drop_path(self.dropout(sublayer(hidden_states))))


def layer_view(config: PreTrainedConfig, layer_idx: int | None) -> Any:
    """Return the configuration of a block, whose sizes differ from those of others in a pruned model."""
    heads, sizes = config.layer_num_attention_heads, config.layer_intermediate_sizes
    if layer_idx is None or (heads is None and sizes is None):
        return config
    count = config.num_attention_heads if heads is None else heads[layer_idx]
    return ConfigView(
        config,
        num_attention_heads=count,
        qkv_size=count * (config.hidden_size // config.num_attention_heads),
        intermediate_size=config.intermediate_size if sizes is None else sizes[layer_idx],
    )


class EncoderBlock(GradientCheckpointingLayer):
    """Encoder block (figure 1, left); with ``is_causal``, a block of a decoder-only model (GPT).

    Args:
        drop_path: see `DropPath`.
        is_causal: mask later tokens.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int | None = None,
        drop_path: float = 0.0,
        is_causal: bool = False,
    ):
        super().__init__()
        config = layer_view(config, layer_idx)
        self.self_attn = MultiHeadAttention(config, is_causal, layer_idx)
        set_method(self.self_attn, method_of(config, is_causal), config)
        self.self_attn_residual = Residual(config, drop_path)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config, drop_path)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        placement: BlockPlacement = NOWHERE,
        **kwargs,
    ) -> Tensor:
        """Apply the block: (B, S, D) -> (B, S, D); the mask is in the form of the attention backend.

        Args:
            positions: added to queries and keys in this block, for stacks whose input does not include positions.
            placement: see `PositionKind.placements`.
        """
        place = {"query_positions": positions, "key_positions": positions, "placement": placement.own}

        def attend(states: Tensor) -> Tensor:
            return self.self_attn(states, attention_mask=attention_mask, **place, **kwargs)[0]

        hidden_states = self.self_attn_residual(hidden_states, attend)
        return self.feed_forward_residual(hidden_states, lambda states: self.feed_forward(states))


class DecoderBlock(GradientCheckpointingLayer):
    """Decoder block (figure 1, right).

    Args:
        is_causal: False for a decoder that attends to its whole input (non-autoregressive).
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, is_causal: bool = True):
        super().__init__()
        self.self_attn = MultiHeadAttention(config, is_causal=is_causal, layer_idx=layer_idx)
        self.self_attn_residual = Residual(config)
        self.cross_attn = MultiHeadAttention(config, layer_idx=layer_idx)
        self.cross_attn_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        attention_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        placement: BlockPlacement = NOWHERE,
        **kwargs,
    ) -> Tensor:
        """Apply the block to (B, T, D) and the encoder's output (B, S, D): -> (B, T, D).

        Args:
            attention_mask, memory_mask: in the form of the attention backend.
            positions, memory_positions: added to queries and keys in this block, for stacks whose input does not
                include positions.
            placement: see `PositionKind.placements`.
        """
        kwargs["cache"] = cache
        place = {"query_positions": positions, "key_positions": positions, "placement": placement.own}
        place_in_memory = {
            "query_positions": positions,
            "key_positions": memory_positions,
            "placement": placement.memory,
        }

        def attend(states: Tensor) -> Tensor:
            return self.self_attn(states, attention_mask=attention_mask, **place, **kwargs)[0]

        def attend_to_memory(states: Tensor) -> Tensor:
            return self.cross_attn(states, memory, attention_mask=memory_mask, **place_in_memory, **kwargs)[0]

        hidden_states = self.self_attn_residual(hidden_states, attend)
        hidden_states = self.cross_attn_residual(hidden_states, attend_to_memory)
        return self.feed_forward_residual(hidden_states, lambda states: self.feed_forward(states))
