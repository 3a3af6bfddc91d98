"""Multi-head self-, cross- and causal attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    queries (B, Tq, D), keys and values (B, Tk, D) -> heads (B, H, T, Dh) -> scores -> softmax -> mix -> (B, Tq, D)

Shapes: B sequences; Tq, Tk query and key positions; D = config.hidden_size; H heads; Dh = D / H.
A mask is True (or 0.0) where a query may attend and False (or a large negative number) where it may not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_method import AttentionMethod
from .cache_names import CACHE_NAME
from .dropout import Dropout
from .dropout import dropout as drop
from .input_checks import require_mask
from .linear import project
from .sequence_positions import Biases, Rotation

# Before transformers 5.24 the attention function, not the model, updates the cache of continuous batching.
PAGED_ELSEWHERE = CACHE_NAME != "cache"
# On a CPU in bf16 two batched matrix products are faster than torch's flash kernel until the score tables outgrow the
# cache: attention in a training step is 3x to 6x as fast at 50 x 50, 2.4x to 2.9x at 197 x 197, 1.3x to 2.3x at
# 577 x 577 and equal near 1,000 x 1,000 (torch 2.14, Zen 4, heads of 32 and 64). In float32 the kernel is faster.
SMALL_SCORE_TABLE = 640 * 640


def explicit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Compute attention with explicit probabilities (equation 1); a transformers attention function.

    Used for the "eager" backend, additive scores, and small shapes on a CPU. Accepts masks in the form of either
    transformers' "eager" or "sdpa" backend.

    Args:
        module: the calling `AttentionLayer`; its methods ``scores`` and ``normalize`` compute the raw scores and the
            probabilities.
        query: (B, H, Tq, Dh); key, value: (B, H, Tk, Dh).
        attention_mask: bool or additive, broadcastable to (B, H, Tq, Tk), or (n, ...) for B a multiple of n, whose
            rows repeat; None masks nothing, except that a causal module applies a causal mask.

    Returns:
        mixed values (B, Tq, H, Dh) and probabilities (B, H, Tq, Tk).
    """
    scores = module.scores(query, key, scaling)  # (B, H, Tq, Tk)
    query_length, key_length = scores.shape[-2:]
    causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is None and causal and query_length > 1:
        # Aligned at the first key, like torch's `is_causal`: a static cache may have empty slots after the last query.
        attention_mask = torch.ones(query_length, key_length, dtype=torch.bool, device=scores.device).tril_()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # Adding the mask takes a quarter of the time of filling on a CPU, and none in the backward pass.
        shut = torch.finfo(scores.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(~attention_mask, shut)
    rows = attention_mask.shape[0] if attention_mask is not None and attention_mask.ndim == 4 else 1
    if rows not in (1, scores.shape[0]):
        scores = (scores.unflatten(0, (-1, rows)) + attention_mask).flatten(0, 1)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = module.normalize(scores)
    kept = drop(probabilities, dropout) if dropout and module.training else probabilities
    return (kept @ value).transpose(1, 2), probabilities  # (B, Tq, H, Dh)


class ConfigView:
    """View of a configuration that overrides some fields.

    A view rather than a copy, so that later changes of the original, such as the attention backend, take effect.

    Args:
        config: original configuration.
        fields: names and values of the overridden fields.
    """

    def __init__(self, config: PreTrainedConfig, **fields: Any):
        self.original = config
        for name, value in fields.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "original":  # ``original`` is not set yet while the view is being copied
            raise AttributeError(name)
        return getattr(self.original, name)


def eager_view(config: PreTrainedConfig) -> ConfigView:
    """Return a view of ``config`` with the eager backend, to build masks in the form that backend expects."""
    return ConfigView(config, _attn_implementation="eager")


def wants_maps(config: PreTrainedConfig, kwargs: dict) -> bool:
    """Return whether a call requests attention maps, by argument or by configuration."""
    asked = kwargs.get("output_attentions")
    return bool(config.output_attentions if asked is None else asked) or bool(kwargs.get("output_cross_attentions"))


def padding_mask(
    config: PreTrainedConfig, queries: Tensor, attention_mask: Tensor | None, memory: Tensor | None = None
) -> Tensor | None:
    """Convert a padding mask (B, Tk), 1 = token, to the backend's form for bidirectional attention.

    transformers' helper first checks whether anything is masked, which synchronises the GPU in every forward. The two
    most common backends also accept one bool row per sentence, True at tokens, which needs no check.

    Args:
        queries: (B, Tq, D) hidden states that attend, or (n B, T, D) if n rows share a row of memory.
        memory: (B, Tk, D) for cross-attention; None for self-attention.

    Raises:
        ValueError: a two-dimensional mask is not (B, Tk).
    """
    keys = queries if memory is None else memory
    require_mask("attention_mask", attention_mask, keys.shape[0], keys.shape[1])
    if attention_mask is not None and attention_mask.ndim == 2 and config._attn_implementation in ("eager", "sdpa"):
        return attention_mask[:, None, None].to(queries.device, torch.bool)  # (B, 1, 1, Tk)
    if memory is not None and memory.shape[0] != queries.shape[0]:
        queries = queries.reshape(memory.shape[0], -1, queries.shape[-1])
    return create_bidirectional_mask(config, queries, attention_mask, encoder_hidden_states=memory)


def placed(states: Tensor, positions: Tensor | None) -> Tensor:
    """Add positions to states, if there are any."""
    return states if positions is None else states + positions


class AttentionLayer(nn.Module):
    """Base class of attention layers: raw scores, dropout of the probabilities, choice of the attention function.

    Args:
        config: provides the attention backend.
        hidden_size: D.
        num_heads: H.
        dropout: dropout rate of the probabilities.
        is_causal: mask later keys.

    Attributes:
        attention_method: computes attention instead of the attention backend, see `encoder_attention.set_method`.
        attention_weights: weights of this method.
    """

    attention_method: AttentionMethod | None = None

    def __init__(
        self, config: PreTrainedConfig, hidden_size: int, num_heads: int, dropout: float, is_causal: bool = False
    ):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = Dropout(dropout)  # holds the rate; the attention function applies it
        self.attention_weights: nn.Module | None = None

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Compute raw scores, before mask and softmax: (B, H, Tq, Dh), (B, H, Tk, Dh) -> (B, H, Tq, Tk)."""
        # Scaling the queries is cheaper than scaling the larger score table.
        return (query * scaling) @ key.transpose(2, 3)

    def normalize(self, scores: Tensor) -> Tensor:
        """Compute probabilities from masked scores (B, H, Tq, Tk)."""
        return scores.softmax(dim=-1)

    def dropout_rate(self) -> float:
        """Return the current dropout rate of the probabilities, 0 in evaluation."""
        return self.dropout.p if self.training else 0.0

    def attention_function(self, query: Tensor, key: Tensor, output_attentions: bool) -> Callable:
        """Select the attention function for queries (B, H, Tq, Dh) and keys (B, H, Tk, Dh)."""
        chosen = self.config._attn_implementation
        if self.attention_method is not None:
            if chosen not in ("eager", "sdpa"):
                name = "decoder_attention" if self.is_causal else "encoder_attention"
                raise ValueError(f'{name} other than "full" runs with attn_implementation="sdpa", got "{chosen}"')
            return partial(self.attention_method, output_attentions=output_attentions)
        if output_attentions:
            return explicit_attention
        if chosen == "sdpa" and query.device.type == "cpu" and not torch.compiler.is_compiling():
            # torch has no CPU kernel with dropout; it would also form the probabilities, but more slowly.
            drops = self.dropout_rate() > 0.0
            small = query.dtype == torch.bfloat16 and query.shape[2] * key.shape[2] <= SMALL_SCORE_TABLE
            if drops or small:
                return explicit_attention
        return ALL_ATTENTION_FUNCTIONS.get_interface(chosen, explicit_attention)


class MultiHeadAttention(AttentionLayer):
    """Multi-head attention; self-attention, or cross-attention when ``memory`` is given (section 3.2.2).

    Args:
        config: needs ``hidden_size``, ``num_attention_heads``, ``attention_dropout`` and ``attention_score``;
            ``qkv_bias=False`` omits the biases of queries, keys and values; ``qkv_size`` is their size, default D.
        is_causal: mask later keys, as in the decoder's self-attention.
        layer_idx: index of the layer in its stack, used to index the cache.
    """

    def __init__(self, config: PreTrainedConfig, is_causal: bool = False, layer_idx: int | None = None):
        width = config.qkv_size or config.hidden_size
        super().__init__(config, width, config.num_attention_heads, config.attention_dropout, is_causal)
        self.layer_idx = layer_idx
        self.additive = config.attention_score == "additive"
        bias = getattr(config, "qkv_bias", True)
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.out_proj = nn.Linear(width, config.hidden_size)
        if self.additive:
            # Bahdanau et al. 2015 (arXiv:1409.0473, appendix A.1.2): v . tanh(W q + U k). W and U are the projections.
            self.score_vector = nn.Parameter(torch.zeros(config.num_attention_heads, self.head_dim))

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Compute raw scores, before mask and softmax: (B, H, Tq, Dh), (B, H, Tk, Dh) -> (B, H, Tq, Tk)."""
        if self.additive:
            joint = torch.tanh(query[:, :, :, None] + key[:, :, None])  # (B, H, Tq, Tk, Dh)
            return torch.einsum("bhqkd,hd->bhqk", joint, self.score_vector)
        return super().scores(query, key, scaling)

    def attention_function(self, query: Tensor, key: Tensor, output_attentions: bool) -> Callable:
        """Select the attention function for queries (B, H, Tq, Dh) and keys (B, H, Tk, Dh)."""
        chosen = self.config._attn_implementation
        if not self.additive:
            return super().attention_function(query, key, output_attentions)
        if chosen not in ("eager", "sdpa"):
            raise ValueError(f'attention_score="additive" runs with attn_implementation="eager", got "{chosen}"')
        return explicit_attention

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        placement: Rotation | Biases | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: (B, Tq, D), source of the queries, and of keys and values unless ``memory`` is given.
            memory: (B, Tk, D), the encoder's output (cross-attention); (B / n, Tk, D) if n consecutive rows of hidden
                states share one row of memory, such as the beams of a sentence.
            attention_mask: in the form of the selected backend; of the eager one with ``output_attentions``.
            cache: extended by Tq keys in self-attention; filled once and then reused in cross-attention.
            output_attentions: compute the probabilities, whatever the backend.
            query_positions, key_positions: added to the input of the query and key projections but not to that of the
                values, broadcastable to it (Carion et al. 2020, figure 10).
            placement: applies the positions of a sequence to the projections, see `PositionKind`.

        Returns:
            (B, Tq, D), and the probabilities (B, H, Tq, Tk), or None if the backend does not compute them.
        """
        B, Tq = hidden_states.shape[:2]
        if memory is not None or kwargs.get("is_causal") is None:  # continuous batching sets it for self-attention
            kwargs["is_causal"] = self.is_causal
        query = project(self.q_proj, placed(hidden_states, query_positions))  # (B, Tq, D)
        query = query if placement is None else placement.query(query)
        shared = memory is not None and memory.shape[0] != B
        if shared:  # treat rows that share a memory as additional queries: from here B is B / n and Tq is n Tq
            query = query.reshape(memory.shape[0], -1, query.shape[-1])
        query = query.view(*query.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, Tq, Dh)
        if PAGED_ELSEWHERE and cache is not None and not isinstance(cache, Cache):
            kwargs["cache"], cache = cache, None
        key, value = self.keys_and_values(
            hidden_states, memory, cache, key_positions, placement, kwargs
        )  # (B, H, Tk, Dh)
        mixed, probabilities = self.attention_function(query, key, output_attentions)(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout_rate(),
            **kwargs,
        )  # (B, Tq, H, Dh)
        if shared and probabilities is not None:
            probabilities = probabilities.unflatten(2, (-1, Tq)).transpose(1, 2).flatten(0, 1)
        return project(self.out_proj, mixed.reshape(B, Tq, -1)), probabilities

    def keys_and_values(
        self,
        hidden_states: Tensor,
        memory: Tensor | None,
        past: Cache | None,
        positions: Tensor | None,
        placement: Rotation | Biases | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, Tk, Dh), reading from and updating the cache if there is one.

        A paged cache reads and modifies ``kwargs``, the keyword arguments of the attention function.
        """
        crossing = memory is not None
        cache = past
        if isinstance(past, EncoderDecoderCache):
            cache = past.cross_attention_cache if crossing else past.self_attention_cache
            if crossing and past.is_updated.get(self.layer_idx):
                layer = cache.layers[self.layer_idx]
                return layer.keys, layer.values
        source = memory if crossing else hidden_states
        shape = (*source.shape[:2], -1, self.head_dim)
        key, value = project(self.k_proj, placed(source, positions)), project(self.v_proj, source)  # (B, Tk, D)
        if placement is not None:
            key, value = placement.key(key), placement.value(value)
        key, value = (states.view(shape).transpose(1, 2) for states in (key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            if crossing and isinstance(past, EncoderDecoderCache):
                past.is_updated[self.layer_idx] = True
        return key, value
