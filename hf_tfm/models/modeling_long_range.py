"""Encoder and classifier of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006), with any attention method.

    ids (B, T) -> embeddings -> [class] + T tokens + positions -> pre-norm blocks -> norm -> class token or mean (B, D)
    pairs (B, 2, T) -> representations a and b of each -> [a, b, a b, a - b] (B, 4 D)
    -> linear -> relu -> linear -> logits (B, C)

Shapes: B sequences or pairs; T tokens; D = config.hidden_size; C = config.num_labels. An attention mask is 1 for
tokens and 0 for padding.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MultiHeadAttention, eager_view, padding_mask, wants_maps
from .attention_method import AttentionWeights
from .blocks import EncoderBlock
from .configuration_long_range import TfmLongRangeConfig
from .dropout import Dropout
from .input_checks import embed, require_mask
from .losses import sequence_loss
from .native_names import OwnNamesPreTrainedModel
from .sequence_positions import NOWHERE, WITH_TABLES, make_positions


class TfmLongRangePreTrainedModel(OwnNamesPreTrainedModel):
    """Base class: weight initialisation, loading and saving."""

    config: TfmLongRangeConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise matrices by Xavier uniform, embeddings from N(0, ``initializer_range``), the rest to 0, as the
        authors do.
        """
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WITH_TABLES):
            module.reset_parameters()
        elif isinstance(module, TfmLongRangeModel) and module.class_token is not None:
            init.zeros_(module.class_token)


class TfmLongRangeModel(TfmLongRangePreTrainedModel):
    """Encoder of one sequence."""

    _auto_class = "AutoModel"

    def __init__(self, config: TfmLongRangeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.pooling == "cls" else None
        self.position_embeddings = make_positions(config, config.num_hidden_layers)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(EncoderBlock(config, i) for i in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode ids (B, T), or ``inputs_embeds`` (B, T, D), with ``attention_mask`` (B, T).

        Returns:
            ``last_hidden_state`` (B, S, D), where S = T + 1 with a class token, which comes first, and T without;
            ``pooler_output`` (B, D), the class token or the mean of the tokens; on request ``hidden_states`` and
            ``attentions``, (B, H, S, S).

        Raises:
            ValueError: the input is longer than ``max_position_embeddings``.
        """
        states = embed(self.word_embeddings, input_ids, inputs_embeds)
        batch, length = states.shape[:2]
        require_mask("attention_mask", attention_mask, batch, length)
        longest = self.config.max_position_embeddings - (self.class_token is not None)
        if length > longest:
            raise ValueError(
                f"the input has {length} tokens, but the model takes {longest}, see max_position_embeddings"
            )
        if self.class_token is not None:
            states = torch.cat([self.class_token.expand(batch, -1, -1).to(states.dtype), states], dim=1)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)
        total = states.shape[1]
        positions = torch.arange(total, device=states.device)
        added = self.position_embeddings(positions, total)
        states = self.dropout(states if added is None else states + added.to(states.dtype))
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        config = eager_view(self.config) if kwargs["output_attentions"] else self.config
        mask = padding_mask(config, states, attention_mask)
        placements = self.position_embeddings.placements(positions, total) or [NOWHERE] * len(self.layers)
        for layer, placement in zip(self.layers, placements, strict=True):
            states = layer(states, mask, placement=placement, **kwargs)
        states = self.layernorm(states)
        if self.class_token is not None:
            pooled = states[:, 0]
        elif attention_mask is None:
            pooled = states.mean(dim=1)
        else:
            there = attention_mask[..., None].to(states.dtype)
            pooled = (states * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


class TfmLongRangeForSequenceClassification(TfmLongRangePreTrainedModel):
    """Classifier of sequences, or with ``config.matching`` of pairs."""

    _auto_class = "AutoModelForSequenceClassification"
    _loss_function = staticmethod(sequence_loss)

    def __init__(self, config: TfmLongRangeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = TfmLongRangeModel(config)
        self.dense = nn.Linear(config.hidden_size * (4 if config.matching else 1), config.intermediate_size)
        self.classifier = nn.Linear(config.intermediate_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify sequences (B, T), or with ``config.matching`` pairs (B, 2, T).

        Args:
            attention_mask: of the same shape as ``input_ids``.
            inputs_embeds: (B, T, D) or (B, 2, T, D), instead of ``input_ids``.
            labels: (B,), see `losses.sequence_loss`.

        Returns:
            ``loss`` scalar, ``logits`` (B, C); on request hidden states and attentions, of pairs those of 2 B
            sequences.

        Raises:
            ValueError: pairs are not of two sequences.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.config.matching:
            for name, value in given.items():
                if value is not None and (value.dim() < 3 or value.shape[1] != 2):
                    raise ValueError(f"{name} must have shape (batch, 2, tokens), got {tuple(value.shape)}")
            given = {name: None if value is None else value.flatten(0, 1) for name, value in given.items()}
        outputs = self.encoder(**given, **kwargs)
        pooled = outputs.pooler_output
        if self.config.matching:
            one, other = pooled.unflatten(0, (-1, 2)).unbind(dim=1)
            pooled = torch.cat([one, other, one * other, one - other], dim=-1)  # (B, 4 D)
        logits = self.classifier(self.dense(pooled).relu())
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
