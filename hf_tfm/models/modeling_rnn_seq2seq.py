"""Recurrent encoder-decoder with attention (Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015,
arXiv:1508.04025) or without (Cho et al. 2014, arXiv:1406.1078).

    source ids (B, S) -> embed -> bidirectional GRU or LSTM layers -> memory (B, S, 2E)
    target ids (B, T) -> embed -> GRU or LSTM layers with attention over the memory -> readout (B, T, M) -> logits

Shapes: B sentences; S source, T target positions; M = config.embedding_size; E = config.encoder_hidden_size;
D = config.hidden_size; V = config.vocab_size; G gates of a cell; A size of the keys. Attention masks passed by the
user are (B, S) or (B, T), 1 for tokens and 0 for padding.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .attention import wants_maps
from .cache_names import CACHE_NAME, CACHE_NAMES, takes_cache
from .configuration_rnn_seq2seq import TfmRNNSeq2SeqConfig
from .dropout import Dropout
from .generation import Rows, SharedMemoryGenerationMixin
from .input_checks import embed, readable, require_mask
from .linear import project
from .losses import require_labels
from .native_names import OwnNamesPreTrainedModel
from .recurrent_cache import RecurrentLayer, recurrent_cache
from .recurrent_layers import (
    GRU,
    LSTM,
    AttentionScore,
    AttentiveLayer,
    BidirectionalLayer,
    State,
    attend,
    init_layer,
    init_linear,
    recurrent,
    reversal,
    take,
)
from .seq2seq import EncoderDecoderMixin, TokenLossOutput, output_of, shift_right, target_loss


class TfmRNNSeq2SeqPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the recurrent encoder-decoder models: weight initialisation, loading and saving."""

    config: TfmRNNSeq2SeqConfig
    base_model_prefix = "model"
    _no_split_modules = ["BidirectionalLayer", "AttentiveLayer"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise gates as in `init_gates`, other matrices by Xavier uniform and embeddings from N(0, 1/M)."""
        factor = self.config.initializer_factor
        if isinstance(module, nn.Linear):
            init_linear(module, factor)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor * self.config.embedding_size**-0.5)
        elif isinstance(module, (GRU, LSTM)):
            init_layer(module, factor)
        elif isinstance(module, AttentionScore) and module.additive:
            init.normal_(module.score_vector, std=factor * self.config.hidden_size**-0.5)


class Embedding(nn.Module):
    """Token embeddings times sqrt(M), so that inputs have variance 1 although the table is shared with the output."""

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.scale = math.sqrt(config.embedding_size)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, prefix: str = "") -> Tensor:
        """Embed ids (B, T), or given embeddings (B, T, M): (B, T, M).

        Raises:
            ValueError: both or neither are given, the input is empty, or, on a CPU, an id is not in the vocabulary.
        """
        return self.dropout(embed(self.tokens, input_ids, inputs_embeds, prefix) * self.scale)


class TfmRNNSeq2SeqStack(TfmRNNSeq2SeqPreTrainedModel):
    """Base class of encoder and decoder: an embedding, and dropout between layers."""

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.dropout = Dropout(config.dropout)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.tokens = value


def wants_states(config: TfmRNNSeq2SeqConfig, kwargs: dict) -> bool:
    """Return whether a call requests the outputs of all layers, by argument or by configuration."""
    asked = kwargs.get("output_hidden_states")
    return bool(config.output_hidden_states if asked is None else asked)


class TfmRNNSeq2SeqEncoder(TfmRNNSeq2SeqStack):
    """Bidirectional encoder: source ids (B, S) -> memory (B, S, 2E), zero at padding."""

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__(config)
        width = config.encoder_hidden_size
        self.layers = nn.ModuleList(
            BidirectionalLayer(config.cell, 2 * width if i else config.embedding_size, width)
            for i in range(config.num_encoder_layers)
        )
        self.post_init()
        self._fsdp_plan = {}  # the plan in the config uses the module names of the whole model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode ``input_ids`` (B, S), or ``inputs_embeds`` (B, S, M), with ``attention_mask`` (B, S).

        Padding may be anywhere: both directions read the tokens of a sentence first.

        Returns:
            ``last_hidden_state`` (B, S, 2E); on request ``hidden_states``, the embeddings (B, S, M) and the outputs of
            all layers (B, S, 2E).
        """
        states = self.embedding(input_ids, inputs_embeds)  # (B, S, M)
        require_mask("attention_mask", attention_mask, *states.shape[:2])
        order = real = lengths = None
        if attention_mask is not None and not (readable(attention_mask) and attention_mask.all()):
            real = attention_mask.to(states.device, torch.bool)  # (B, S)
            lengths = real.sum(dim=1)
            if not readable(real) or (real[:, 1:] & ~real[:, :-1]).any():
                order = tokens_first(real, lengths)  # position of each token among the tokens of its row
                states = take(states, order.argsort(dim=1))
        reverse = reversal(lengths, states.shape[:2], states.device)
        hidden = [states]
        for i, layer in enumerate(self.layers):
            states = layer(self.dropout(states) if i else states, reverse)  # (B, S, 2E)
            hidden.append(states)
        if order is not None:
            hidden = [take(each, order) for each in hidden]
        if real is not None:
            hidden[-1] = hidden[-1] * real[:, :, None]
        return BaseModelOutput(
            last_hidden_state=hidden[-1], hidden_states=tuple(hidden) if wants_states(self.config, kwargs) else None
        )


def tokens_first(real: Tensor, lengths: Tensor) -> Tensor:
    """Return the positions (B, S) of all columns if the tokens of each row, ``real`` (B, S), come before its padding.

    Args:
        lengths: (B,) tokens per row.
    """
    return torch.where(real, real.cumsum(dim=1) - 1, lengths[:, None] + (~real).cumsum(dim=1) - 1)


class Source(NamedTuple):
    """Inputs of the decoder that depend on the sources alone.

    Args:
        memory: (B, S, 2E).
        keys, values: see `TfmRNNSeq2SeqDecoder.of_memory`.
        mask: (B, 1, S), added to attention scores, or None.
    """

    memory: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def keep(self, rows: Tensor) -> "Source":
        """Return some rows (R,)."""
        return Source(*(None if part is None else part[rows] for part in self))


class TfmRNNSeq2SeqDecoder(TfmRNNSeq2SeqStack):
    """Recurrent decoder: target ids (B, T) and memory (B, S, 2E) -> readout (B, T, M).

    The initial state of every layer is tanh(W h + b) of the backward encoder state h at the first token. With additive
    attention the first layer is an `AttentiveLayer`; layers above it, and all layers of the other kinds, run over all
    steps at once, as do the readout and Luong's attention.
    """

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__(config)
        width, memory, size = config.hidden_size, 2 * config.encoder_hidden_size, config.embedding_size
        kind, cell = config.attention_score, config.cell
        first = (
            AttentiveLayer(cell, size, width, memory)
            if kind == "additive"
            else recurrent(cell, size + memory if kind == "none" else size, width)
        )
        above = (recurrent(cell, width, width) for _ in range(1, config.num_decoder_layers))
        self.layers = nn.ModuleList([first, *above])
        self.score = None if kind == "none" else AttentionScore(kind, width, memory)
        self.parts = 2 if cell == "lstm" else 1  # tensors of a layer's state
        self.bridge = nn.Linear(config.encoder_hidden_size, self.parts * config.num_decoder_layers * width)
        self.readout = nn.Linear(width + memory + size, size * (2 if config.readout == "maxout" else 1))
        self.post_init()
        self._fsdp_plan = {}  # the plan in the config uses the module names of the whole model

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
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
        """Decode ``input_ids`` (B, T), or (n B, T) if n rows share a sentence, over ``encoder_hidden_states``
        (B, S, 2E).

        Args:
            attention_mask: (B, cached + T); padding must come after the tokens, where it changes nothing.
            encoder_attention_mask: (B, S).
            cache: states after earlier tokens, and what is computed once a sentence; extended by T tokens.

        Returns:
            ``last_hidden_state`` (B, T, M), ``cache``; on request ``hidden_states``, the embeddings (B, T, M) and the
            outputs of all layers (B, T, D), and ``cross_attentions``, one tensor (B, 1, T, S).

        Raises:
            ValueError: ``encoder_hidden_states`` is missing, or target padding comes before a token.
        """
        if encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_hidden_states of shape (B, S, 2E), got None")
        memory, real = encoder_hidden_states, encoder_attention_mask
        inputs = self.embedding(input_ids, inputs_embeds, prefix="decoder_")  # (n B, T, M)
        require_target_padding(attention_mask)
        require_mask("attention_mask", real, *memory.shape[:2])
        cache = recurrent_cache(cache) if use_cache or cache is not None else None
        if cache is None or cache.get_seq_length() == 0:
            states = self.initial_states(memory, real, inputs.shape[0])
        else:
            states = unpacked(cache.self_attention_cache.layers[0])
        source = Source(memory, *self.of_memory(memory, real, cache), self.score_mask(memory, real))
        hidden, states, readout, maps = self.advance(inputs, states, source)
        if cache is not None:
            cache.self_attention_cache.update(*packed(states), 0, new_tokens=inputs.shape[1])
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=readout,
            **{CACHE_NAME: cache},
            hidden_states=tuple(hidden) if wants_states(self.config, kwargs) else None,
            cross_attentions=(maps,) if maps is not None and wants_maps(self.config, kwargs) else None,
        )

    def advance(
        self, inputs: Tensor, states: list[State], source: Source
    ) -> tuple[list[Tensor], list[State], Tensor, Tensor | None]:
        """Read further tokens.

        Args:
            inputs: (n B, T, M) embeddings.
            states: of every layer.

        Returns:
            inputs and outputs (n B, T, D) of the layers; the new states; the readout (n B, T, M); attention
            probabilities (n B, 1, T, S), or None without attention.
        """
        rows, length, _ = inputs.shape
        outputs, maps = inputs, None
        if self.score is None:
            context = source.keys.repeat_interleave(rows // source.keys.shape[0], dim=0).expand(rows, length, -1)
            outputs = torch.cat([inputs, context], dim=-1)
        hidden, new = [inputs], []
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            outputs = self.dropout(outputs) if i else outputs
            if isinstance(layer, AttentiveLayer):
                outputs, state, maps = layer(outputs, state, self.score, source.keys, source.values, source.mask)
            else:
                outputs, state = layer(outputs, state)  # (n B, T, D)
            hidden.append(outputs)
            new.append(state)
        if self.score is not None:
            if maps is None:
                maps = attend(self.score(outputs, source.keys), source.mask).view(rows, length, -1)
            maps = maps[:, None]  # (n B, 1, T, S)
            memory = source.memory
            context = (maps.reshape(memory.shape[0], -1, memory.shape[1]) @ memory).view(rows, length, -1)
        return hidden, new, self.read(outputs, context, inputs), maps

    def score_mask(self, memory: Tensor, real: Tensor | None) -> Tensor | None:
        """Return what is added to attention scores, (B, 1, S); None without padding or attention."""
        if real is None or self.score is None:
            return None
        shut = torch.finfo(memory.dtype).min
        return torch.zeros_like(real, dtype=memory.dtype).masked_fill_(real == 0, shut)[:, None]

    def initial_states(self, memory: Tensor, real: Tensor | None, rows: int) -> list[State]:
        """Return the state of every layer before the first token, for ``rows`` = n B rows."""
        size, layers = self.config.hidden_size, self.config.num_decoder_layers
        first = memory[:, 0] if real is None else memory[torch.arange(memory.shape[0]), real.int().argmax(dim=1)]
        packed = torch.tanh(self.bridge(first[:, memory.shape[-1] // 2 :]))  # (B, layers parts D)
        packed = packed.repeat_interleave(rows // memory.shape[0], dim=0).view(rows, layers, self.parts, size)
        return [tuple(packed[:, layer, part] for part in range(self.parts)) for layer in range(layers)]

    def of_memory(
        self, memory: Tensor, real: Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return what is computed once a sentence: keys (B, S, A) and values (B, S, G), kept in the cache.

        Without attention the keys are the last states of both encoder directions, (B, 1, 2E).
        """
        if cache is not None and cache.is_updated.get(0):
            layer = cache.cross_attention_cache.layers[0]
            return layer.keys[:, 0], layer.values[:, 0]
        first = self.layers[0]
        keys = last_states(memory, real)[:, None] if self.score is None else self.score.keys(memory)
        values = first.values(memory) if isinstance(first, AttentiveLayer) else keys[..., :0]
        if cache is not None:
            cache.cross_attention_cache.update(keys[:, None], values[:, None], 0)
            cache.is_updated[0] = True
        return keys, values

    def read(self, outputs: Tensor, context: Tensor, inputs: Tensor) -> Tensor:
        """Compute the readout (n B, T, M) of states (n B, T, D), contexts (n B, T, 2E) and inputs (n B, T, M)."""
        readout = project(self.readout, torch.cat([outputs, context, inputs], dim=-1))
        if self.config.readout == "maxout":
            return self.dropout(readout.unflatten(-1, (-1, 2)).amax(dim=-1))
        return self.dropout(torch.tanh(readout))


def packed(states: list[State]) -> tuple[Tensor, Tensor]:
    """Return the states of all layers as hidden states (B, L, D) and LSTM cells (B, L, D) or (B, 0, D)."""
    hidden = torch.stack([state[0] for state in states], dim=1)
    return hidden, torch.stack([state[-1] for state in states], dim=1) if len(states[0]) == 2 else hidden[:, :0]


def unpacked(layer: RecurrentLayer) -> list[State]:
    """Return the states of every layer in a cache, the inverse of `packed`."""
    parts = (layer.keys, layer.values) if layer.values.shape[1] else (layer.keys,)
    return [tuple(part[:, i] for part in parts) for i in range(layer.keys.shape[1])]


def last_states(memory: Tensor, real: Tensor | None) -> Tensor:
    """Return the last state of each encoder direction, (B, 2E): forward at the last token, backward at the first.

    Args:
        memory: (B, S, 2E).
        real: (B, S), nonzero at tokens; None for no padding.
    """
    forward, backward = memory.chunk(2, dim=-1)
    if real is None:
        return torch.cat([forward[:, -1], backward[:, 0]], dim=-1)
    rows, real = torch.arange(memory.shape[0], device=memory.device), real.int()
    last = real.shape[1] - 1 - real.flip(1).argmax(dim=1)
    return torch.cat([forward[rows, last], backward[rows, real.argmax(dim=1)]], dim=-1)


def require_target_padding(mask: Tensor | None) -> None:
    """Raise if padding of a target mask (B, T) comes before a token: the decoder would read it.

    Raises:
        ValueError: there is such a row.
    """
    if mask is not None and readable(mask) and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError(
            "decoder_attention_mask must have padding after the tokens only, because the decoder reads it"
        )


class TfmRNNSeq2SeqModel(EncoderDecoderMixin, TfmRNNSeq2SeqPreTrainedModel):
    """Encoder and decoder without an output layer."""

    _auto_class = "AutoModel"
    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embedding.tokens.weight": "shared.weight",
        "decoder.embedding.tokens.weight": "shared.weight",
    }

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.embedding_size) if config.tie_word_embeddings else None
        self.encoder = TfmRNNSeq2SeqEncoder(config)
        self.decoder = TfmRNNSeq2SeqDecoder(config)
        self.post_init()


def is_replaced(module: nn.Module) -> bool:
    """Return whether a module has hooks, or its ``forward`` was replaced: it must be called."""
    return bool("forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks)


class StateRows:
    """`Rows` decoded by `TfmRNNSeq2SeqDecoder.advance` alone: a step of a recurrent decoder takes less time than what
    a forward pass of the model does besides.

    Args:
        model: calls its layers, so that their hooks run.
        memory: (R, S, 2E); real: (R, S), nonzero at tokens, or None.
    """

    def __init__(self, model: "TfmRNNSeq2SeqForConditionalGeneration", memory: Tensor, real: Tensor | None):
        self.model, self.decoder = model, model.get_decoder()
        self.states = self.decoder.initial_states(memory, real, memory.shape[0])
        self.source = Source(
            memory, *self.decoder.of_memory(memory, real, None), self.decoder.score_mask(memory, real)
        )

    def scores(self, ids: Tensor) -> Tensor:
        """See `Rows`."""
        _, self.states, readout, _ = self.decoder.advance(self.decoder.embedding(ids), self.states, self.source)
        return project(self.model.lm_head, readout[:, -1])

    def keep(self, rows: Tensor) -> None:
        """See `Rows`."""
        self.states = [tuple(part[rows] for part in state) for state in self.states]
        self.source = self.source.keep(rows)


class TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqPreTrainedModel, SharedMemoryGenerationMixin):
    """Recurrent encoder-decoder with a language-modelling head, for translation and other text-to-text tasks."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _is_stateful = True  # a state cannot go back by some tokens, as assisted generation needs
    _tied_weights_keys = {  # noqa: RUF012
        "model.encoder.embedding.tokens.weight": "model.shared.weight",
        "model.decoder.embedding.tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    }

    def __init__(self, config: TfmRNNSeq2SeqConfig):
        super().__init__(config)
        self.model = TfmRNNSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.output_bias)
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> TfmRNNSeq2SeqEncoder:
        return self.model.encoder

    def get_decoder(self) -> TfmRNNSeq2SeqDecoder:
        return self.model.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return decoder inputs (B, T) for labels (B, T), shifted right by one; called by transformers' collators."""
        return shift_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenLossOutput:
        """Predict target tokens; with ``labels``, also compute the label-smoothed loss.

        Args:
            labels: (B, T), -100 at positions excluded from the loss. Without decoder inputs,
                `prepare_decoder_input_ids_from_labels` provides them.
            num_items_in_batch: divisor of the summed loss, see `losses`; default: the number of labels.
            return_logits: if False, compute the loss without materialising the logits (see `linear_cross_entropy`).

        Returns:
            ``loss`` scalar, ``logits`` (B, T, V) or None, and the outputs of `TfmRNNSeq2SeqModel`.

        Raises:
            TypeError, ValueError: labels are empty, have a different shape from the decoder inputs or, on a CPU,
                contain values outside the vocabulary.
        """
        if labels is not None:
            use_cache = False
            require_labels(labels, self.config.vocab_size)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, T, M)
        logits = project(self.lm_head, hidden) if return_logits else None  # (B, T, V)
        loss = None
        if labels is not None:
            smoothing = self.config.label_smoothing
            loss = target_loss(self.lm_head, hidden, logits, labels, smoothing, num_items_in_batch)
        return output_of(outputs, loss=loss, logits=logits, token_loss=loss)

    def rows_of(self, inputs: dict[str, Any]) -> Rows | None:
        """See `GreedyGenerationMixin.rows_of`."""
        rows = super().rows_of(inputs)
        whole = (self, self.model, self.get_decoder())
        if rows is None or not rows.use_cache or any(is_replaced(module) for module in whole):
            return rows
        return StateRows(self, rows.memory, rows.attention_mask)

    def most_positions(self) -> None:
        """See `GreedyGenerationMixin.most_positions`: there is no limit."""

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        """Refuse caches of keys and values; the decoder turns an empty one into a cache of states."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation must be dynamic for a recurrent model, whose cache does not grow, got "
                f"{generation_config.cache_implementation}"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)
