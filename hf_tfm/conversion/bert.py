"""TfmBert <-> transformers' BERT: one architecture, two sets of names.

Our classes read files of transformers' BERT, and ``save_original_format=True`` writes them (`NATIVE_NAMES` in
bert_parts.py), so what is left to convert is the configuration.
"""

from functools import partial
from pathlib import Path

from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from ..models.configuration_bert import TfmBertConfig
from ..models.modeling_bert import (
    TfmBertForMaskedLM,
    TfmBertForMultipleChoice,
    TfmBertForPreTraining,
    TfmBertForQuestionAnswering,
    TfmBertForSequenceClassification,
    TfmBertForTokenClassification,
    TfmBertModel,
)
from .conversion import Conversion, refuse, require_fixed
from .vit import translated
from .weight_files import weight_names

STOCK = {
    TfmBertModel: BertModel,
    TfmBertForPreTraining: BertForPreTraining,
    TfmBertForMaskedLM: BertForMaskedLM,
    TfmBertForSequenceClassification: BertForSequenceClassification,
    TfmBertForTokenClassification: BertForTokenClassification,
    TfmBertForMultipleChoice: BertForMultipleChoice,
    TfmBertForQuestionAnswering: BertForQuestionAnswering,
}
# Heads that read the pooler's output, and heads with a language model's output layer.
POOLED = (TfmBertForPreTraining, TfmBertForSequenceClassification, TfmBertForMultipleChoice)
LANGUAGE = (TfmBertForPreTraining, TfmBertForMaskedLM)

# Fields of the same name and meaning on both sides.
FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Fields that say nothing about the outputs: they ride along. The pooler does where no head reads it.
OURS_CARRIED = ("activation_dropout", "pooler")
THEIRS_CARRIED = ("use_cache",)
# What files of older versions hold and a class without a pooler never reads.
POOLER_WEIGHTS = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def require_head(target: str, config: TfmBertConfig | BertConfig, ours: type[PreTrainedModel]) -> None:
    """Refuse what the head of the class ``ours`` has in one library alone.

    The two count answers' labels otherwise, and keep the bias of a language head that is not tied in two places.
    """
    if ours in LANGUAGE:
        require_fixed(target, config, {"tie_word_embeddings": True})
    if ours is TfmBertForQuestionAnswering:
        require_fixed(target, config, {"num_labels": 2})


def to_bert(
    config: TfmBertConfig, ours: type[PreTrainedModel], theirs: type[BertConfig] = BertConfig, pooler: str = "tanh"
) -> BertConfig:
    """Our architecture, of the class ``ours``, as a configuration of the class ``theirs``.

    Args:
        pooler: the one that their head reads.

    Raises:
        ValueError: a field has a value that their model cannot express.
    """
    target = theirs.model_type
    if not config.type_vocab_size:
        refuse(target, "type_vocab_size", 0, "segments; distilbert has none")
    if ours in POOLED:
        require_fixed(target, config, {"pooler": pooler})
    if ours is TfmBertModel and config.pooler not in (pooler, "none"):
        refuse(target, "pooler", config.pooler, pooler)
    require_head(target, config, ours)
    return translated(config, theirs, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


def from_bert(model: PreTrainedModel, ours: type[PreTrainedModel], pooler: str = "tanh") -> TfmBertConfig:
    """The architecture of transformers' ``model`` as the configuration of our class ``ours``.

    Raises:
        ValueError: a field has a value that `TfmBertConfig` cannot express.
    """
    target = TfmBertConfig.__name__
    require_fixed(target, model.config, {"is_decoder": False, "add_cross_attention": False})
    require_head(target, model.config, ours)
    new = {"pooler": pooler} if ours in POOLED else {}
    if ours is TfmBertModel and model.pooler is None:
        new = {"pooler": "none"}
    return translated(model.config, TfmBertConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED), **new)


def whole_head(folder: Path, class_name: str | None) -> str | None:
    """The class whose heads are all in ``folder``; files of the first BERTs name the smaller of two.

    Args:
        class_name: what config.json says.
    """
    if class_name == "BertForMaskedLM" and "cls.seq_relationship.weight" in weight_names(folder):
        return "BertForPreTraining"
    return class_name


def carry_vocabulary(source: Path, target: Path, to_ours: bool) -> None:
    """Write the tokenizer of a folder that holds no more than vocab.txt; of our model type none would be guessed."""
    if to_ours and (source / "vocab.txt").is_file() and not (source / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)


BERT = tuple(
    Conversion(
        name="bert",
        ours=ours,
        theirs=theirs,
        to_theirs=partial(to_bert, ours=ours),
        to_ours=partial(from_bert, ours=ours),
        unread_by_theirs=() if ours in (*POOLED, TfmBertModel) else POOLER_WEIGHTS,
        carry_processor=carry_vocabulary,
    )
    for ours, theirs in STOCK.items()
)
CONVERSIONS = BERT
