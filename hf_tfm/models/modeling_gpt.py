"""GPT, a causal language model (Radford et al. 2018, 2019; blocks: Vaswani et al. 2017, figure 1).

    ids (B, T) -> token + position embeddings -> causal blocks, pre-norm (GPT-2) or post-norm (GPT-1) -> (B, T, D)
    -> logits (B, T, V)

Shapes: B sequences; T tokens; D = config.hidden_size; H heads; V = config.vocab_size; C = config.num_labels. An
attention mask is 1 for tokens and 0 for padding.
"""

import math

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.conversion_mapping import WeightConverter, WeightRenaming, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MultiHeadAttention, eager_view, wants_maps
from .attention_method import AttentionWeights
from .blocks import EncoderBlock
from .cache_names import CACHE_NAME, CACHE_NAMES, cache_of, takes_cache
from .configuration_gpt import TfmGPTConfig
from .cross_entropy import IGNORE_INDEX, head_cross_entropy, label_smoothed_cross_entropy, linear_cross_entropy
from .dropout import Dropout
from .generation import GreedyGenerationMixin
from .input_checks import embed, look_up
from .linear import embedding_table, project
from .losses import labelled, per_item, require_labels, sequence_loss
from .native_names import OwnNamesPreTrainedModel


def native_names() -> list:
    """Return the conversions from weights of transformers' GPT-2 and of earlier versions of this package.

    GPT-2 files store one matrix for queries, keys and values, and store matrices transposed. Each pattern is anchored
    to a block, so that modules added by a subclass keep their names.
    """
    turned = (
        (r"attn\.c_proj\.weight", "self_attn.out_proj.weight"),
        (r"mlp\.c_fc\.weight", "feed_forward.up_proj.weight"),
        (r"mlp\.c_proj\.weight", "feed_forward.down_proj.weight"),
    )
    renamed = (
        (r"(?<!\w)h\.(\d+)\.", r"layers.\1."),
        (r"attn\.c_proj\.bias", "self_attn.out_proj.bias"),
        (r"mlp\.c_fc\.bias", "feed_forward.up_proj.bias"),
        (r"mlp\.c_proj\.bias", "feed_forward.down_proj.bias"),
        (r"(?<=\d\.)ln_1\.", "self_attn_residual.norm."),
        (r"(?<=\d\.)ln_2\.", "feed_forward_residual.norm."),
    )
    parts = [f"self_attn.{name}_proj" for name in "qkv"]
    return [
        *(WeightRenaming(source, target) for source, target in renamed),
        WeightConverter(
            r"attn\.c_attn\.weight", [f"{part}.weight" for part in parts], operations=[Transpose(), Chunk(dim=0)]
        ),
        WeightConverter(r"attn\.c_attn\.bias", [f"{part}.bias" for part in parts], operations=[Chunk(dim=0)]),
        *(WeightConverter(source, target, operations=[Transpose()]) for source, target in turned),
    ]


class TfmGPTPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the GPT models: weight initialisation, loading and saving."""

    config: TfmGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$"]  # noqa: RUF012 - causal masks in older files
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise from N(0, ``initializer_range``); in pre-norm models, scale down the last layer of each residual
        branch by sqrt(2 L).
        """
        std = self.config.initializer_range
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, EncoderBlock) and self.config.norm_first:
            small = std / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.self_attn.out_proj.weight, std=small)
            init.normal_(module.feed_forward.down_proj.weight, std=small)


class TfmGPTModel(TfmGPTPreTrainedModel):
    """GPT decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: TfmGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(EncoderBlock(config, i, is_causal=True) for i in range(config.num_hidden_layers))
        # The output of pre-norm blocks is not normalised yet; that of post-norm blocks is.
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Decode ids (B, T), or ``inputs_embeds`` (B, T, D).

        Args:
            attention_mask: (B, cached + T).
            position_ids: (B, T) or (1, T); default: the positions after the cached tokens. Without ``attention_mask``
                and cache a row may pack several texts: where positions restart, attention to earlier tokens is masked.
            cache: keys and values of earlier tokens; extended by T.

        Returns:
            ``last_hidden_state`` (B, T, D), ``cache``; on request ``hidden_states``, L + 1 tensors (B, T, D), and
            ``attentions``, L tensors (B, H, T, cached + T).

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds`` are given, the input is empty or too
                long, or, on a CPU, an id is out of range.
        """
        words = embed(self.wte, input_ids, inputs_embeds)
        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()  # a paged cache has no single length
            end, longest = seen + words.shape[1], self.config.max_position_embeddings
            if isinstance(end, int) and end > longest:
                raise ValueError(f"the input reaches {end} tokens, but max_position_embeddings is {longest}")
            positions = (torch.arange(words.shape[1], device=words.device) + seen)[None]
        else:
            positions = kwargs["position_ids"] = position_ids  # flash attention separates packed texts by position_ids
        hidden_states = self.drop(words + look_up(self.wpe, positions, "position_ids", "max_position_embeddings"))
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        config = eager_view(self.config) if kwargs["output_attentions"] else self.config
        # A single token may attend to everything in a growing cache; building the mask would cost a tenth of a small
        # decoding step.
        sees_all = attention_mask is None and words.shape[1] == 1 and type(cache) is DynamicCache
        mask = None if sees_all else create_causal_mask(config, hidden_states, attention_mask, cache, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, cache=cache, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), **{CACHE_NAME: cache if use_cache else None}
        )


def language_loss(
    hidden: Tensor,
    logits: Tensor | None,
    head: nn.Module | Tensor,
    labels: Tensor | None,
    items: int | Tensor | None,
    shift_labels: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the next-token cross-entropy for labels (B, T), from logits (B, T, V) or, if None, states (B, T, D).

    Args:
        head: output layer or its weight (V, D); used only without logits.
        row_weights: (B T,) weights of the per-token losses; only with ``head`` given as a weight.
        shift_labels: (B, T) target token of each state; replaces ``labels``.
    """
    # State t predicts token t + 1.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shift_labels is None else shift_labels
    targets = targets.flatten()
    if logits is not None:
        total = label_smoothed_cross_entropy(logits.flatten(0, 1), targets)
    elif isinstance(head, Tensor):
        total = linear_cross_entropy(hidden.flatten(0, 1), head, targets, row_weights=row_weights)
    else:
        total = head_cross_entropy(head, hidden.flatten(0, 1), targets)
    return per_item(total, labelled(targets).sum(), items)


class TfmGPTForCausalLM(TfmGPTPreTrainedModel, GreedyGenerationMixin):
    """GPT with a language-modelling head tied to the token embeddings."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: TfmGPTConfig):
        super().__init__(config)
        self.transformer = TfmGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next token at each position; with ``labels`` or ``shift_labels``, also compute the loss.

        Args:
            labels: (B, T) the input ids, `IGNORE_INDEX` at positions excluded from the loss.
            logits_to_keep: number of last tokens, or index of the tokens, to compute logits for; 0 means all.
            num_items_in_batch: divisor of the summed loss, see `losses`; default: the number of predicted labels,
                which excludes the first token of each row.
            return_logits: if False, compute the loss without materialising the logits (see `linear_cross_entropy`).
            shift_labels: (B, T) target token of each state, a keyword argument that replaces ``labels``.
                Sequence-parallel training shifts labels before it splits a sequence. It is not in the signature
                because Trainer would treat it as a label present in every batch.

        Returns:
            ``loss`` scalar, ``logits`` (B, T, V) or None, ``cache``; on request hidden states, attentions.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = project(self.lm_head, hidden[:, kept]) if return_logits else None
        loss = None
        if labels is not None or shift_labels is not None:
            given, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
            require_labels(given, self.config.vocab_size, tuple(hidden.shape[:2]), name)
            loss = language_loss(hidden, logits, self.lm_head, labels, num_items_in_batch, shift_labels)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TfmGPTForSequenceClassification(TfmGPTPreTrainedModel):
    """GPT with a sequence classifier on the state of the last token (2018, section 3.2)."""

    _auto_class = "AutoModelForSequenceClassification"
    _loss_function = staticmethod(sequence_loss)

    def __init__(self, config: TfmGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = TfmGPTModel(config)
        self.dropout = Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        language_weight: float = 0.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Classify sequences (B, T) by their last non-padding token.

        Args:
            attention_mask: (B, T); by default, tokens equal to ``pad_token_id`` are treated as padding.
            labels: (B,), as in transformers' `GPT2ForSequenceClassification`.
            language_weight: weight of an auxiliary language-modelling loss (2018, equation 5, lambda 0.5): the mean
                next-token loss of each sequence, averaged over labelled sequences, as in the authors' code.

        Returns:
            ``loss`` scalar, ``logits`` (B, C); on request the hidden states, attentions and cache of `TfmGPTModel`.

        Raises:
            ValueError: ``language_weight`` is given without ``input_ids``.
        """
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        if attention_mask is None:
            last = hidden[:, -1]
        else:
            positions = torch.arange(attention_mask.shape[1], device=hidden.device)
            # The last token, for left or right padding.
            position = (attention_mask.to(hidden.device) * positions).argmax(dim=1)
            last = hidden[torch.arange(hidden.shape[0], device=hidden.device), position]
        logits = self.score(self.dropout(last))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            if language_weight:
                if input_ids is None:
                    raise ValueError(
                        "language_weight needs input_ids, which are the targets of the language-modelling loss"
                    )
                tokens = input_ids if attention_mask is None else input_ids.where(attention_mask != 0, IGNORE_INDEX)
                loss = loss + language_weight * self.language_term(hidden, tokens, labels, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def language_term(
        self,
        hidden: Tensor,
        tokens: Tensor,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Return the mean next-token loss of tokens (B, T) from states (B, T, D), averaged over labelled sequences."""
        known = labelled(labels).reshape(hidden.shape[0], -1).to(hidden.device)  # (B, classes or 1)
        weights = known.sum(dim=1) / labelled(tokens[:, 1:]).sum(dim=1).clamp_min(1)  # (B,)
        row_weights = weights[:, None].expand(tokens.shape).flatten()  # (B T,)
        words = embedding_table(self.transformer.wte, self.config.vocab_size, hidden.device)  # (V, D)
        total = language_loss(hidden, None, words, tokens, 1, row_weights=row_weights)
        return per_item(total, known.sum(), num_items_in_batch)


register_checkpoint_conversion_mapping("TfmGPTModel", native_names(), overwrite=True)
