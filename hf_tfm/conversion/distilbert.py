"""TfmBert <-> transformers' DistilBERT (Sanh et al. 2019, arXiv:1910.01108): a BERT without segments and pooler.

Its ``pre_classifier`` is our pooler with ReLU. DistilBERT applies no dropout to the attention output, which matters
only in training.
"""

import re
from functools import partial

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedModel,
)

from ..models.configuration_bert import TfmBertConfig
from ..models.modeling_bert import (
    TfmBertForMaskedLM,
    TfmBertForMultipleChoice,
    TfmBertForQuestionAnswering,
    TfmBertForSequenceClassification,
    TfmBertForTokenClassification,
    TfmBertModel,
)
from .bert import POOLED, carry_vocabulary, require_table, with_learned_positions
from .conversion import Conversion, carried, refuse, require_fixed
from .vit import LABELS

STOCK = {
    TfmBertModel: DistilBertModel,
    TfmBertForMaskedLM: DistilBertForMaskedLM,
    TfmBertForSequenceClassification: DistilBertForSequenceClassification,
    TfmBertForTokenClassification: DistilBertForTokenClassification,
    TfmBertForMultipleChoice: DistilBertForMultipleChoice,
    TfmBertForQuestionAnswering: DistilBertForQuestionAnswering,
}
EPS = 1e-12  # of every norm; not a field of DistilBertConfig

# {ours: theirs}
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    **{field: field for field in LABELS},
}
# Fields that do not affect the outputs are carried along; this includes the pooler if no head reads it.
OURS_CARRIED = ("activation_dropout", "classifier_dropout", "pooler", "training_logits")
THEIRS_CARRIED = ("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout")  # the first affects only initialisation

# (our name, their name), applied in order.
RENAMES = (
    (r"^bert\.pooler\.dense\.", "pre_classifier."),
    (r"^bert\.", "distilbert."),
    (r"embeddings\.norm\.", "embeddings.LayerNorm."),
    (r"layers\.(\d+)\.", r"transformer.layer.\1."),
    (r"self_attn\.([qkv])_proj\.", r"attention.\1_lin."),
    (r"self_attn\.out_proj\.", "attention.out_lin."),
    (r"self_attn_residual\.norm\.", "sa_layer_norm."),
    (r"feed_forward\.up_proj\.", "ffn.lin1."),
    (r"feed_forward\.down_proj\.", "ffn.lin2."),
    (r"feed_forward_residual\.norm\.", "output_layer_norm."),
    (r"lm_head\.dense\.", "vocab_transform."),
    (r"lm_head\.norm\.", "vocab_layer_norm."),
    (r"lm_head\.decoder\.", "vocab_projector."),
)


def names(config: TfmBertConfig, ours: type[PreTrainedModel]) -> dict[str, str]:
    """Map every weight of the class ``ours``: {ours: theirs}."""
    with torch.device("meta"):
        table = {name: name for name in ours(config).state_dict()}
    for pattern, theirs in RENAMES:
        table = {name: re.sub(pattern, theirs, renamed) for name, renamed in table.items()}
    return table


def to_distilbert(config: TfmBertConfig, ours: type[PreTrainedModel]) -> DistilBertConfig:
    """Convert our configuration of the class ``ours`` to transformers'.

    Raises:
        ValueError: a field has a value that transformers' class cannot express.
    """
    require_table("distilbert", config)
    if config.type_vocab_size:
        refuse("distilbert", "type_vocab_size", config.type_vocab_size, "0; bert has segments")
    require_fixed("distilbert", config, {"layer_norm_eps": EPS})
    if ours in (*POOLED, TfmBertModel):
        require_fixed("distilbert", config, {"pooler": "none" if ours is TfmBertModel else "relu"})
    if ours is TfmBertForQuestionAnswering:
        require_fixed("distilbert", config, {"num_labels": 2})
    fields = {theirs: getattr(config, name) for name, theirs in FIELDS.items()}
    fields |= carried(config, (*OURS_CARRIED, *THEIRS_CARRIED))
    if ours in POOLED:
        rate = config.classifier_dropout
        fields["seq_classif_dropout"] = config.hidden_dropout_prob if rate is None else rate
    return DistilBertConfig(**fields)


def from_distilbert(model: PreTrainedModel, ours: type[PreTrainedModel]) -> TfmBertConfig:
    """Convert the configuration of transformers' ``model`` to that of this package's class ``ours``."""
    config = model.config
    fields = {name: getattr(config, theirs) for name, theirs in FIELDS.items()}
    fields |= {"pooler": "none", "type_vocab_size": 0, "layer_norm_eps": EPS}
    fields |= carried(config, (*OURS_CARRIED, *THEIRS_CARRIED))
    if ours in POOLED:
        fields |= {"pooler": "relu", "classifier_dropout": config.seq_classif_dropout}
    return TfmBertConfig(**fields)


DISTILBERT = tuple(
    Conversion(
        name="distilbert",
        ours=ours,
        theirs=theirs,
        to_theirs=partial(to_distilbert, ours=ours),
        to_ours=partial(from_distilbert, ours=ours),
        names=partial(names, ours=ours),
        prepare=with_learned_positions,
        carry_processor=carry_vocabulary,
    )
    for ours, theirs in STOCK.items()
)
CONVERSIONS = DISTILBERT
