"""TfmBert <-> transformers' BERT: the same architecture with other weight names.

Our classes read files of transformers' BERT, and ``save_original_format=True`` writes them (`NATIVE_NAMES` in
bert_parts.py), so only the configuration is converted.
"""

import copy
from functools import partial
from pathlib import Path

import torch
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
from ..models.sequence_positions import LearnedPositions
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
# Heads that read the pooler's output, and heads with the output layer of a language model.
POOLED = (TfmBertForPreTraining, TfmBertForSequenceClassification, TfmBertForMultipleChoice)
LANGUAGE = (TfmBertForPreTraining, TfmBertForMaskedLM)

# Fields with the same name and meaning in both configurations.
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
# Fields that do not affect the outputs are carried along; this includes the pooler if no head reads it.
OURS_CARRIED = ("activation_dropout", "pooler", "training_logits")
THEIRS_CARRIED = ("use_cache",)
# Weights in files of older versions that a class without a pooler never reads.
POOLER_WEIGHTS = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def require_head(target: str, config: TfmBertConfig | BertConfig, ours: type[PreTrainedModel]) -> None:
    """Refuse head settings of the class ``ours`` that only one library supports.

    The two define the labels of question answering differently, and store the bias of an untied language model head in
    different places.
    """
    if ours in LANGUAGE:
        require_fixed(target, config, {"tie_word_embeddings": True})
    if ours is TfmBertForQuestionAnswering:
        require_fixed(target, config, {"num_labels": 2})


@torch.no_grad()
def with_learned_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Replace positions that are added to the embeddings with an equal learned table; leave other kinds."""
    embeddings, config = model.base_model.embeddings, model.config
    if config.position_embedding_type == "learned" or not embeddings.position_embeddings.only_embeds:
        return model
    model = copy.deepcopy(model)
    embeddings, config = model.base_model.embeddings, model.config
    length = config.max_position_embeddings
    learned = LearnedPositions(config, config.num_hidden_layers).to(embeddings.word_embeddings.weight.dtype)
    learned.weight.copy_(embeddings.position_embeddings(torch.arange(length), length))
    embeddings.position_embeddings, config.position_embedding_type = learned, "learned"
    return model


def require_table(target: str, config: TfmBertConfig) -> None:
    """Refuse positions that `with_learned_positions` cannot replace."""
    if config.position_embedding_type != "learned":
        needed = "positions that are only added to the embeddings"
        refuse(target, "position_embedding_type", config.position_embedding_type, needed)


def to_bert(
    config: TfmBertConfig, ours: type[PreTrainedModel], theirs: type[BertConfig] = BertConfig, pooler: str = "tanh"
) -> BertConfig:
    """Convert our configuration of the class ``ours`` to the class ``theirs``.

    Args:
        pooler: the pooler that their head reads.

    Raises:
        ValueError: a field has a value that their model cannot express.
    """
    target = theirs.model_type
    require_table(target, config)
    if not config.type_vocab_size:
        refuse(target, "type_vocab_size", 0, "segments; distilbert has none")
    if ours in POOLED:
        require_fixed(target, config, {"pooler": pooler})
    if ours is TfmBertModel and config.pooler not in (pooler, "none"):
        refuse(target, "pooler", config.pooler, pooler)
    require_head(target, config, ours)
    return translated(config, theirs, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


def from_bert(model: PreTrainedModel, ours: type[PreTrainedModel], pooler: str = "tanh") -> TfmBertConfig:
    """Convert the configuration of transformers' ``model`` to that of this package's class ``ours``.

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
    """Return the class with all heads stored in ``folder``; early BERT files name a class with fewer heads.

    Args:
        class_name: the class in config.json.
    """
    if class_name == "BertForMaskedLM" and "cls.seq_relationship.weight" in weight_names(folder):
        return "BertForPreTraining"
    return class_name


def carry_vocabulary(source: Path, target: Path, to_ours: bool) -> None:
    """Write a full tokenizer for a folder with only vocab.txt, because none is inferred from our model type."""
    if to_ours and (source / "vocab.txt").is_file() and not (source / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)


BERT = tuple(
    Conversion(
        name="bert",
        ours=ours,
        theirs=theirs,
        to_theirs=partial(to_bert, ours=ours),
        to_ours=partial(from_bert, ours=ours),
        prepare=with_learned_positions,
        unread_by_theirs=() if ours in (*POOLED, TfmBertModel) else POOLER_WEIGHTS,
        carry_processor=carry_vocabulary,
    )
    for ours, theirs in STOCK.items()
)
CONVERSIONS = BERT
