"""BERT, a masked language model (Devlin et al. 2019, arXiv:1810.04805, figures 1, 2).

    ids (B, T) -> token + position + segment embeddings -> norm -> post-norm blocks -> (B, T, D) -> heads

Shapes: B sequences; T tokens; D = config.hidden_size; H heads; V = config.vocab_size; C = config.num_labels. An
attention mask is 1 for tokens and 0 for padding.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import eager_view, padding_mask, wants_maps
from .bert_parts import (
    HEAD_NAMES,
    NATIVE_NAMES,
    NSP_NAMES,
    MaskedLMHead,
    Pooler,
    TfmBertEmbeddings,
    TfmBertPreTrainedModel,
    masked_lm_loss,
    positions_of,
)
from .blocks import EncoderBlock
from .configuration_bert import TfmBertConfig
from .dropout import Dropout
from .losses import choice_loss, class_loss, labelled, sequence_loss, span_loss, token_loss, weights_of_rows
from .native_names import register_native_names
from .sequence_positions import NOWHERE

# Entries of transformers' checkpoints that models with a language-modelling head do not use.
UNREAD = [r"embeddings\.position_ids", r"cls\.predictions\.decoder\.bias"]


class TfmBertModel(TfmBertPreTrainedModel):
    """BERT encoder.

    Args:
        add_pooling_layer: add the pooler over the first token, unless the configuration disables it.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TfmBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = TfmBertEmbeddings(config)
        self.layers = nn.ModuleList(EncoderBlock(config, i) for i in range(config.num_hidden_layers))
        self.pooler = Pooler(config) if add_pooling_layer and config.pooler != "none" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode ids (B, T), or ``inputs_embeds`` (B, T, D), with ``attention_mask`` (B, T).

        Returns:
            ``last_hidden_state`` (B, T, D); ``pooler_output`` (B, D) or None; on request ``hidden_states``, L + 1
            tensors (B, T, D), and ``attentions``, L tensors (B, H, T, T).
        """
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        kwargs["output_attentions"] = wants_maps(self.config, kwargs)
        config = eager_view(self.config) if kwargs["output_attentions"] else self.config
        mask = padding_mask(config, hidden_states, attention_mask)
        kind, (positions, end) = self.embeddings.position_embeddings, positions_of(position_ids, hidden_states)
        mask = kind.mask(mask, positions, positions, hidden_states.dtype)
        placements = kind.placements(positions, end) or [NOWHERE] * len(self.layers)
        for layer, placement in zip(self.layers, placements, strict=True):
            hidden_states = layer(hidden_states, mask, placement=placement, **kwargs)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class TfmBertForMaskedLM(TfmBertPreTrainedModel):
    """BERT with a masked language modelling head."""

    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys = {"lm_head.decoder.weight": "bert.embeddings.word_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head.decoder": "colwise_gather_output"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [*UNREAD, r"seq_relationship\.", r"pooler\."]  # noqa: RUF012

    def __init__(self, config: TfmBertConfig):
        super().__init__(config)
        self.bert = TfmBertModel(config, add_pooling_layer=False)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool | None = None,
        masked_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Predict masked tokens; with ``labels``, also compute the loss.

        Args:
            labels: (B, T), `IGNORE_INDEX` at positions excluded from the loss.
            num_items_in_batch: divisor of the summed loss, see `losses`; default: the number of labels.
            return_logits: if False, compute the loss of the labelled tokens only, without materialising the logits;
                default: True, except in training where the configuration says ``training_logits=False``.
            masked_positions: (n,) int64 indices of the labelled tokens among the B T, for ``return_logits=False``;
                avoids a GPU synchronisation to find them.

        Returns:
            ``loss`` scalar, ``logits`` (B, T, V) or None; on request hidden states and attentions.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = self.returns_logits(labels)
        loss, logits = masked_lm_loss(
            self.lm_head, self.config.vocab_size, states, labels, num_items_in_batch, return_logits, masked_positions
        )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TfmBertForPreTraining(TfmBertPreTrainedModel):
    """BERT with both pre-training heads: masked language modelling and next sentence prediction."""

    _auto_class = "AutoModelForPreTraining"
    _tied_weights_keys = {"lm_head.decoder.weight": "bert.embeddings.word_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head.decoder": "colwise_gather_output"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = UNREAD

    def __init__(self, config: TfmBertConfig):
        super().__init__(config)
        if config.pooler == "none":
            raise ValueError('next sentence prediction needs a pooler, got pooler="none": use TfmBertForMaskedLM')
        self.bert = TfmBertModel(config)
        self.lm_head = MaskedLMHead(config)
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: int | Tensor | Mapping[str, int | Tensor] | None = None,
        return_logits: bool | None = None,
        masked_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BertForPreTrainingOutput:
        """Predict masked tokens and whether the second segment follows the first.

        Args:
            labels: (B, T), `IGNORE_INDEX` at positions excluded from the loss.
            next_sentence_label: (B,), 0 if the second segment follows the first, 1 if it is random, `IGNORE_INDEX` if
                there is no pair.
            num_items_in_batch: number of labels of each kind in the whole step, {"labels": tokens,
                "next_sentence_label": pairs}, see `count_items`. A single number is the token count, as Trainer passes
                it; each pair is then weighted by its share of those tokens, so that micro-batches still add up to the
                step.
            return_logits, masked_positions: see `TfmBertForMaskedLM.forward`.

        To evaluate a data set without ``next_sentence_label``, Trainer needs ``label_names=["labels"]``, as with
        transformers' `BertForPreTraining`.

        Returns:
            ``loss`` scalar, the sum of the token and pair losses for which there are labels; ``prediction_logits``
            (B, T, V) or None; ``seq_relationship_logits`` (B, 2); on request hidden states and attentions.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        states = outputs.last_hidden_state
        counts = num_items_in_batch if isinstance(num_items_in_batch, Mapping) else {"labels": num_items_in_batch}
        if return_logits is None:
            return_logits = self.returns_logits(labels)
        loss, logits = masked_lm_loss(
            self.lm_head, self.config.vocab_size, states, labels, counts["labels"], return_logits, masked_positions
        )
        follows = self.nsp_head(outputs.pooler_output)  # (B, 2)
        if next_sentence_label is not None:
            pair_loss = self.pair_loss(follows, next_sentence_label, labels, counts)
            loss = pair_loss if loss is None else loss + pair_loss
        return BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=follows,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def pair_loss(
        self,
        logits: Tensor,
        next_sentence_label: Tensor,
        labels: Tensor | None,
        counts: Mapping[str, int | Tensor | None],
    ) -> Tensor:
        """Return the next sentence prediction loss of logits (B, 2); see `forward` for ``counts``."""
        name = "next_sentence_label"
        if counts.get("labels") is None or name in counts or labels is None:
            return class_loss(logits, next_sentence_label, counts.get(name), name)
        weights = weights_of_rows(labels, counts["labels"])  # (B,)
        return class_loss(logits, next_sentence_label, name=name, weights=weights)

    def count_items(self, labels: Tensor | None = None, next_sentence_label: Tensor | None = None, **batch) -> dict:
        """Return the ``num_items_in_batch`` of a batch; counts of micro-batches add up to that of the step."""
        given = {"labels": labels, "next_sentence_label": next_sentence_label}
        return {name: labelled(values).sum() for name, values in given.items() if values is not None}


class TfmBertClassifier(TfmBertPreTrainedModel):
    """Base class of BERT classifiers: dropout, then a linear layer.

    Args:
        outputs: output size of the classifier.
        pooled: classify the pooler output instead of the state of every token.
    """

    def __init__(self, config: TfmBertConfig, outputs: int, pooled: bool):
        super().__init__(config)
        if pooled and config.pooler == "none":
            raise ValueError('this classifier reads the pooler: give pooler="tanh" or "relu", got "none"')
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.num_labels = config.num_labels
        self.bert = TfmBertModel(config, add_pooling_layer=pooled)
        self.dropout = Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, outputs)
        self.post_init()


class TfmBertForSequenceClassification(TfmBertClassifier):
    """BERT for classification, or regression with one label, of a sequence or sentence pair (section 4.1)."""

    _auto_class = "AutoModelForSequenceClassification"
    _loss_function = staticmethod(sequence_loss)

    def __init__(self, config: TfmBertConfig):
        super().__init__(config, config.num_labels, pooled=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify sequences (B, T); ``labels`` (B,) are those of transformers' `BertForSequenceClassification`.

        Returns:
            ``loss`` scalar, ``logits`` (B, C); on request hidden states and attentions.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TfmBertForTokenClassification(TfmBertClassifier):
    """BERT for token classification (section 5.3)."""

    _auto_class = "AutoModelForTokenClassification"
    _loss_function = staticmethod(token_loss)

    def __init__(self, config: TfmBertConfig):
        super().__init__(config, config.num_labels, pooled=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Classify tokens (B, T); ``labels`` (B, T), `IGNORE_INDEX` where a token has no label.

        Returns:
            ``loss`` scalar, ``logits`` (B, T, C); on request hidden states and attentions.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TfmBertForMultipleChoice(TfmBertClassifier):
    """BERT for multiple choice (section 4.4)."""

    _auto_class = "AutoModelForMultipleChoice"
    _loss_function = staticmethod(choice_loss)

    def __init__(self, config: TfmBertConfig):
        super().__init__(config, 1, pooled=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """Score n choices; inputs are (B, n, T), embeddings (B, n, T, D), ``labels`` (B,) the correct choice.

        Returns:
            ``loss`` scalar, ``logits`` (B, n); on request hidden states and attentions of the B n sequences.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        choices = given.shape[1]

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.flatten(0, 1)

        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.bert(*map(flat, inputs), **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TfmBertForQuestionAnswering(TfmBertPreTrainedModel):
    """BERT for extractive question answering (section 4.2)."""

    _auto_class = "AutoModelForQuestionAnswering"
    _loss_function = staticmethod(span_loss)

    def __init__(self, config: TfmBertConfig):
        super().__init__(config)
        self.bert = TfmBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Predict answer spans in sequences (B, T).

        Args:
            start_positions, end_positions: (B,); positions of T or more (the answer was truncated) and `IGNORE_INDEX`
                are ignored.

        Returns:
            ``loss`` scalar, ``start_logits`` and ``end_logits`` (B, T); on request hidden states and attentions.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give start_positions and end_positions, or neither")
        if start_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def count_items(self, start_positions: Tensor, end_positions: Tensor, input_ids: Tensor, **batch) -> Tensor:
        """Return the ``num_items_in_batch`` of a batch: the number of texts with a start or end position."""
        length = input_ids.shape[1]
        known = [labelled(positions) & (positions < length) for positions in (start_positions, end_positions)]
        return (known[0] | known[1]).sum()


register_native_names("TfmBertModel", NATIVE_NAMES)
register_native_names("TfmBertForMaskedLM", HEAD_NAMES)
register_native_names("TfmBertForPreTraining", (*HEAD_NAMES, *NSP_NAMES))
