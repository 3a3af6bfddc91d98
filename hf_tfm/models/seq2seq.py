"""Parts that all encoder-decoder language models share: decoder inputs, the forward pass without head, the token loss.

    source ids (B, S) -> encoder -> memory (B, S, D);  target ids (B, T) -> decoder over the memory -> (B, T, D)

Shapes: B sentences; S source, T target positions; D hidden size; V vocabulary size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_names import CACHE_NAME, cache_of, takes_cache
from .cross_entropy import IGNORE_INDEX, head_cross_entropy, label_smoothed_cross_entropy
from .input_checks import require_tensor
from .losses import labelled, per_item


def shift_right(labels: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return teacher-forcing decoder inputs: the start token, then all labels but the last; (B, T) -> (B, T)."""
    start = labels.new_full((labels.shape[0], 1), decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, pad_token_id)], dim=1)


def target_loss(
    head: nn.Module,
    hidden: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """Compute the label-smoothed cross-entropy of target tokens.

    Args:
        head: output layer, (..., D) -> (..., V).
        hidden: (B, T, D) input of the head.
        logits: (B, T, V) output of the head; None computes the loss without materialising it.
        labels: (B, T), `IGNORE_INDEX` at positions excluded from the loss.
        num_items_in_batch: divisor of the sum, see `losses`; default: the number of labels.

    Raises:
        TypeError, ValueError: labels have a wrong shape.
    """
    require_tensor("labels", labels, tuple(hidden.shape[:2]))
    labels = labels.reshape(-1)
    if logits is None:
        total = head_cross_entropy(head, hidden.flatten(0, 1), labels, label_smoothing)
    else:
        total = label_smoothed_cross_entropy(logits.flatten(0, 1), labels, label_smoothing)
    return per_item(total, labelled(labels).sum(), num_items_in_batch)


@dataclass
class TokenLossOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with the loss of the target tokens.

    Args:
        token_loss: scalar cross-entropy of the target tokens; equal to ``loss`` for an autoregressive model.
    """

    token_loss: Tensor | None = None


class EncoderDecoderMixin:
    """Embedding access and forward pass of a base model with the modules ``encoder``, ``decoder`` and ``shared``, the
    embeddings of both if they are tied, else None.
    """

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings() if self.shared is None else self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.set_input_embeddings(value)
        if self.shared is not None:
            self.shared = value
            self.decoder.set_input_embeddings(value)
        elif value.num_embeddings != self.decoder.get_input_embeddings().num_embeddings:
            # Source and target share one vocabulary, so the separate decoder table is resized with the encoder's.
            self.decoder.resize_token_embeddings(value.num_embeddings)

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
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Run the encoder, then the decoder.

        Args:
            input_ids: (B, S), or ``inputs_embeds`` (B, S, D).
            attention_mask: (B, S).
            decoder_input_ids: (B, T), or ``decoder_inputs_embeds`` (B, T, D).
            decoder_attention_mask: (B, cached + T).
            encoder_outputs: output of an earlier encoder call, used instead of the source.
            cache: see the decoder's forward.

        Returns:
            ``last_hidden_state`` (B, T, D), ``encoder_last_hidden_state`` (B, S, D); on request hidden states,
            attentions and cache.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **{CACHE_NAME: cache_of(decoded)},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def output_of(outputs: Seq2SeqModelOutput, kind: type[TokenLossOutput] = TokenLossOutput, **own) -> TokenLossOutput:
    """Return the output of a model with a head: that of its base model, and loss and logits as ``own``."""
    return kind(
        **own,
        **{CACHE_NAME: cache_of(outputs)},
        decoder_hidden_states=outputs.decoder_hidden_states,
        decoder_attentions=outputs.decoder_attentions,
        cross_attentions=outputs.cross_attentions,
        encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        encoder_hidden_states=outputs.encoder_hidden_states,
        encoder_attentions=outputs.encoder_attentions,
    )
