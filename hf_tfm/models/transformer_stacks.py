"""Encoder and decoder of the Transformer (Vaswani et al. 2017, figure 1): embedding, N blocks, final norm.

Shapes: B sentences; S source, T target positions; D = config.hidden_size; H heads. Attention masks passed by the user
are (B, S) or (B, T), 1 for tokens and 0 for padding.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import MultiHeadAttention, eager_view, padding_mask, wants_maps
from .attention_method import AttentionWeights
from .blocks import DecoderBlock, EncoderBlock
from .cache_names import CACHE_NAME, CACHE_NAMES, takes_cache
from .configuration_transformer import TfmTransformerConfig
from .dropout import Dropout
from .input_checks import embed
from .native_names import OwnNamesPreTrainedModel
from .sequence_positions import NOWHERE, WITH_TABLES, make_positions


class TfmTransformerPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the Transformer models: weight initialisation, loading and saving."""

    config: TfmTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock", "DecoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise matrices by Xavier uniform and embeddings from N(0, 1/D): scaled embeddings have variance 1."""
        factor = self.config.initializer_factor
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=factor)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor * self.config.hidden_size**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WITH_TABLES):
            module.reset_parameters()
        elif isinstance(module, MultiHeadAttention) and module.additive:
            init.normal_(module.score_vector, std=factor * module.scaling)


def positions_of(states: Tensor, offset: int | Tensor = 0) -> tuple[Tensor, int | None]:
    """Return the positions (T,) of states (B, T, D) from ``offset`` on, and their end if that is a number."""
    length = states.shape[1]
    return torch.arange(length, device=states.device) + offset, offset + length if isinstance(offset, int) else None


class Embedding(nn.Module):
    """Token embeddings times sqrt(D), plus positions, then dropout (sections 3.4, 3.5 and 5.4)."""

    def __init__(self, config: TfmTransformerConfig, num_layers: int, cross_attention: bool):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = make_positions(config, num_layers, cross_attention)
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        offset: int | Tensor = 0,
        prefix: str = "",
    ) -> Tensor:
        """Embed ids (B, T), or given embeddings (B, T, D), at positions starting at ``offset``: (B, T, D).

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds`` are given, the input is empty, or, on a
                CPU, an id is not in the vocabulary.
        """
        inputs_embeds = embed(self.tokens, input_ids, inputs_embeds, prefix)
        states, added = inputs_embeds * self.scale, self.positions(*positions_of(inputs_embeds, offset))
        return self.dropout(states if added is None else states + added.to(states.dtype))


class TfmTransformerStack(TfmTransformerPreTrainedModel):
    """Base class of encoder and decoder: an embedding, N blocks, and a final norm after pre-norm blocks."""

    def __init__(
        self, config: TfmTransformerConfig, num_layers: int, block: Callable[[int], nn.Module], cross_attention: bool
    ):
        super().__init__(config)
        self.embedding = Embedding(config, num_layers, cross_attention)
        self.layers = nn.ModuleList(block(i) for i in range(num_layers))
        # The output of pre-norm blocks is not normalised yet; that of post-norm blocks is.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()
        self._tp_plan, self._fsdp_plan = {}, {}  # the plans in the config use the module names of the whole model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.tokens = value


class TfmTransformerEncoder(TfmTransformerStack):
    """Transformer encoder (figure 1, left): source ids (B, S) -> memory (B, S, D)."""

    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012

    def __init__(self, config: TfmTransformerConfig):
        super().__init__(config, config.num_encoder_layers, partial(EncoderBlock, config), cross_attention=False)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode ``input_ids`` (B, S), or ``inputs_embeds`` (B, S, D), with ``attention_mask`` (B, S).

        Returns:
            ``last_hidden_state`` (B, S, D); on request ``hidden_states``, N + 1 tensors (B, S, D), and
            ``attentions``, N tensors (B, H, S, S).
        """
        hidden_states = self.embedding(input_ids, inputs_embeds)  # (B, S, D)
        kind, (positions, end) = self.embedding.positions, positions_of(hidden_states)
        config = self.config
        kwargs["output_attentions"] = wants_maps(config, kwargs)
        if kwargs["output_attentions"]:
            config = eager_view(config)
        mask = padding_mask(config, hidden_states, attention_mask)
        mask = kind.mask(mask, positions, positions, hidden_states.dtype)
        placements = kind.placements(positions, end) or [NOWHERE] * len(self.layers)
        for layer, placement in zip(self.layers, placements, strict=True):
            hidden_states = layer(hidden_states, mask, placement=placement, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class TfmTransformerDecoder(TfmTransformerStack):
    """Transformer decoder (figure 1, right): target ids (B, T) and memory (B, S, D) -> (B, T, D)."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DecoderBlock,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: TfmTransformerConfig):
        causal = config.decoding == "autoregressive"
        block = partial(DecoderBlock, config, is_causal=causal)
        super().__init__(config, config.num_decoder_layers, block, cross_attention=True)
        self.is_causal = causal

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode ``input_ids`` (B, T) over ``encoder_hidden_states`` (B, S, D).

        Args:
            attention_mask: (B, cached + T).
            encoder_attention_mask: (B, S).
            cache: keys and values of earlier tokens and of the memory; extended by T tokens.

        Returns:
            ``last_hidden_state`` (B, T, D), ``cache``; on request ``hidden_states``, ``attentions``, N tensors
            (B, H, T, cached + T), and ``cross_attentions``, N tensors (B, H, T, S).

        Raises:
            ValueError: ``encoder_hidden_states`` is missing.
        """
        if encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_hidden_states of shape (B, S, D), got None")
        if not self.is_causal:
            cache = None  # every token attends to every other one, so cached keys and values do not stay valid
        elif use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(seen, Tensor) and seen.device.type == "cpu" and not torch.compiler.is_compiling():
            seen = int(seen)  # a static cache keeps the count on its device: a free read on a CPU, a sync on a GPU
        hidden_states = self.embedding(input_ids, inputs_embeds, offset=seen, prefix="decoder_")  # (B, T, D)
        kind, (positions, end) = self.embedding.positions, positions_of(hidden_states, seen)
        config = self.config
        kwargs["output_attentions"] = wants_maps(config, kwargs)
        if kwargs["output_attentions"]:
            config = eager_view(config)
        if self.is_causal:
            own = cache
            # Other forms of the mask are not for adding to.
            visible = eager_view(config) if kind.adds_to_scores else config
            if isinstance(own, EncoderDecoderCache):
                own = own.self_attention_cache
            mask = create_causal_mask(visible, hidden_states, attention_mask, own)
        else:
            mask = padding_mask(config, hidden_states, attention_mask)
        if kind.adds_to_scores:
            count = positions.shape[0] if mask is None else mask.shape[-1]
            keys = torch.arange(count, device=positions.device)
            mask = kind.mask(mask, positions, keys, hidden_states.dtype)
        memory_mask = padding_mask(config, hidden_states, encoder_attention_mask, encoder_hidden_states)
        placements = kind.placements(positions, end, encoder_hidden_states.shape[1]) or [NOWHERE] * len(self.layers)
        for layer, placement in zip(self.layers, placements, strict=True):
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                mask,
                placement=placement,
                memory_mask=memory_mask,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache}
        )
