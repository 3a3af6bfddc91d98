"""Encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762, figure 1).

    source ids (B, S) -> embed + positions -> encoder blocks -> memory (B, S, D)
    target ids (B, T) -> embed + positions -> decoder blocks over the memory -> (B, T, D) -> logits (B, T, V)

Shapes: B sentences; S source, T target positions; D = config.hidden_size; V = config.vocab_size; H heads.
Attention masks passed by the user are (B, S) or (B, T), 1 for tokens and 0 for padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_names import takes_cache
from .configuration_transformer import TfmTransformerConfig
from .generation import SharedMemoryGenerationMixin
from .input_checks import require_tensor
from .linear import project
from .losses import require_labels, weights_of_rows
from .mask_predict import LengthHead, mask_predict, mask_targets, masked_labels
from .seq2seq import EncoderDecoderMixin, TokenLossOutput, output_of, shift_right, target_loss
from .transformer_stacks import TfmTransformerDecoder, TfmTransformerEncoder, TfmTransformerPreTrainedModel


@dataclass
class TfmTransformerLMOutput(TokenLossOutput):
    """`TokenLossOutput` with the loss of the target length.

    Args:
        length_loss: scalar cross-entropy of the target length (``decoding="mask_predict"``).
    """

    length_loss: Tensor | None = None


class TfmTransformerModel(EncoderDecoderMixin, TfmTransformerPreTrainedModel):
    """Encoder and decoder without an output layer."""

    _auto_class = "AutoModel"
    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embedding.tokens.weight": "shared.weight",
        "decoder.embedding.tokens.weight": "shared.weight",
    }

    def __init__(self, config: TfmTransformerConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size) if config.tie_word_embeddings else None
        self.encoder = TfmTransformerEncoder(config)
        self.decoder = TfmTransformerDecoder(config)
        self.post_init()


class TfmTransformerForConditionalGeneration(TfmTransformerPreTrainedModel, SharedMemoryGenerationMixin):
    """Transformer with a language-modelling head, for translation and other text-to-text tasks."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "model.encoder.embedding.tokens.weight": "model.shared.weight",
        "model.decoder.embedding.tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    }

    def __init__(self, config: TfmTransformerConfig):
        super().__init__(config)
        self.model = TfmTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.output_bias)
        self.length_head = LengthHead(config) if config.decoding == "mask_predict" else None
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> TfmTransformerEncoder:
        return self.model.encoder

    def get_decoder(self) -> TfmTransformerDecoder:
        return self.model.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return decoder inputs (B, T) for labels (B, T); called by transformers' data collators.

        For an autoregressive model these are the labels shifted right by one. For a mask-predict model they are the
        labels with a random share masked, drawn from torch's global generator.
        """
        if self.config.decoding == "mask_predict":
            return mask_targets(labels, self.config)[0]
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
    ) -> TfmTransformerLMOutput:
        """Predict target tokens; with ``labels``, also compute the label-smoothed loss.

        Args:
            labels: (B, T), `IGNORE_INDEX` at positions excluded from the loss. Without decoder inputs,
                `prepare_decoder_input_ids_from_labels` provides them. A mask-predict model is trained only on labels
                where ``decoder_input_ids`` is ``mask_token_id``.
            num_items_in_batch: divisor of the summed token loss, see `losses`; default: the number of labels used for
                training. ``length_loss`` is the mean over sentences by default and their sum otherwise; in ``loss``
                each sentence is then weighted by its share of the labels of the step.
            return_logits: if False, compute the loss without materialising the logits (see `linear_cross_entropy`).

        Returns:
            ``loss`` scalar and its components, ``logits`` (B, T, V) or None, and the outputs of `TfmTransformerModel`.

        Raises:
            TypeError, ValueError: labels are empty, have a different shape from the decoder inputs or, on a CPU,
                contain values outside the vocabulary; or no label of a mask-predict model is masked.
        """
        if labels is not None:
            use_cache = False
            targets = labels
            require_labels(labels, self.config.vocab_size)
            if decoder_input_ids is not None and self.config.decoding == "mask_predict":
                require_tensor("decoder_input_ids", decoder_input_ids, tuple(labels.shape))
                labels, decoder_attention_mask = masked_labels(
                    labels, decoder_input_ids, decoder_attention_mask, self.config
                )
            elif decoder_input_ids is None and decoder_inputs_embeds is None:
                if self.config.decoding == "mask_predict":
                    decoder_input_ids, labels, decoder_attention_mask = mask_targets(labels, self.config)
                else:
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
        hidden = outputs.last_hidden_state  # (B, T, D)
        logits = project(self.lm_head, hidden) if return_logits else None  # (B, T, V)
        loss = token_loss = length_loss = None
        if labels is not None:
            smoothing = self.config.label_smoothing
            loss = token_loss = target_loss(self.lm_head, hidden, logits, labels, smoothing, num_items_in_batch)
            if self.length_head is not None:
                each = self.length_head.loss(
                    outputs.encoder_last_hidden_state, attention_mask, hidden, decoder_attention_mask
                )  # (B,)
                length_loss = each.mean() if num_items_in_batch is None else each.sum()
                if num_items_in_batch is None:
                    loss = token_loss + length_loss
                else:  # weighted by each sentence's share of the tokens of the step, so that micro-batches add up
                    loss = token_loss + (each * weights_of_rows(targets, num_items_in_batch)).sum()
        return output_of(
            outputs,
            TfmTransformerLMOutput,
            loss=loss,
            logits=logits,
            token_loss=token_loss,
            length_loss=length_loss,
        )

    def most_positions(self) -> int | None:
        """See `GreedyGenerationMixin.most_positions`."""
        return self.config.max_position_embeddings if self.config.position_embedding_type == "learned" else None

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """Generate as in transformers; a mask-predict model decodes with `mask_predict` and takes its arguments."""
        if self.config.decoding == "mask_predict":
            if args:
                raise ValueError(
                    "a mask-predict model takes only inputs and generation_config as positional arguments"
                )
            return mask_predict(self, inputs, generation_config=generation_config, **kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)
