"""Text classifiers and their tokenizers, new or pretrained, of any architecture.

tokenizer with padding and an end of text -> model with a classifier for these classes, named in its configuration
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import datasets
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.labelled_texts import PAIR, TEXT
from ..data.vocabulary import tokenizer_name, train_bytes, train_wordpiece
from ..families import CAUSAL_LM, Head
from ..hub.loading import check_vocabulary, load_config, load_model, load_tokenizer
from ..hub.pretrained import load_to_train
from .model_fields import build_new, fresh_head, label_fields, new_config, takes

log = logging.getLogger(__name__)

# Configuration fields that the tokenizer determines.
TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
SEGMENTS = "token_type_ids"


class ClassifierArguments(Protocol):
    """Options of a model; see `TextClassificationArguments`."""

    seed: int
    max_length: int
    architecture: str
    head: Head
    config_class: type[PreTrainedConfig]
    size: str
    model: dict[str, Any]
    model_name_or_path: str | None
    language_weight: float
    trust_remote_code: bool


class TokenizerArguments(ClassifierArguments, Protocol):
    """Options of a model and of its tokenizer."""

    tokenizer: str | None
    vocab_size: int
    lowercase: bool


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Return the inputs that a model, wrapped or not, reads: ``token_type_ids`` only if it has several segments."""
    plain = extract_model_from_parallel(model)
    plain = plain.module if isinstance(plain, AveragedModel) else plain
    segments = getattr(plain.config, "type_vocab_size", 0) > 1 and takes(plain, SEGMENTS)
    return ("input_ids", "attention_mask", *([SEGMENTS] if segments else []))


def all_texts(rows: datasets.Dataset) -> Iterator[str]:
    """Yield the texts of rows of `text_rows`, of pairs both."""
    for batch in rows.iter(1000):
        for column in (TEXT, PAIR):
            yield from batch.get(column, ())


def classifier_tokenizer(args: TokenizerArguments, rows: datasets.Dataset) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, or train one on texts; see `complete`."""
    if ready := args.tokenizer or args.model_name_or_path:
        argument = "tokenizer" if args.tokenizer else "model_name_or_path"
        return complete(load_tokenizer(ready, argument, None, args.trust_remote_code))
    train = train_bytes if args.architecture in CAUSAL_LM.families() else train_wordpiece
    return complete(train(all_texts(rows), args.vocab_size, args.lowercase))


def decoder_types() -> list[str]:
    """Return the model types with causal attention, of our families and of transformers."""
    return [*CAUSAL_LM.model_types(), "openai-gpt"]


def complete(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add a padding token, and an end token after each text, to the tokenizer of a language model.

    GPT's tokenizers have neither: a classifier would read its class from an arbitrary last word, and the texts of a
    pair would not be separated. The end token serves as delimiter and last token of Radford et al. (2018, section
    3.3). Other tokenizers are not changed.

    Raises:
        ValueError: the tokenizer adds no end token and is not of the tokenizers library.
    """
    special = {
        name: token for name, token in (("eos_token", "</s>"), ("pad_token", "<pad>")) if not getattr(tokenizer, name)
    }
    if tokenizer.num_special_tokens_to_add(pair=True) == 0:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} does not end a text with a token and cannot be changed")
        tokenizer.add_special_tokens(special)
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    elif "pad_token" in special:
        tokenizer.add_special_tokens({"pad_token": special["pad_token"]})
    return tokenizer


def class_fields(labels: Sequence[str] | None) -> dict[str, Any]:
    """Return the configuration fields of these classes; None for regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {**label_fields(labels), "problem_type": "single_label_classification"}


def build_classifier(
    args: ClassifierArguments, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None, vocab_size: int = 0
) -> PreTrainedModel:
    """Build the model to train, with weights drawn from the seed or loaded from ``model_name_or_path``.

    The tokenizer's ``model_max_length`` is set to that of the model.

    Args:
        labels: names of the classes; None for regression.
        vocab_size: minimum vocabulary size of a new model, in addition to the tokenizer's.

    Raises:
        ValueError: the model does not fit the tokenizer, ``max_length`` or ``args.model``, or lacks weights.
    """
    set_seed(args.seed)
    if args.model_name_or_path:
        model = load_classifier(args.model_name_or_path, tokenizer, labels, args.model, args.trust_remote_code)
    else:
        tokens = {name: getattr(tokenizer, name) for name in TOKEN_FIELDS[1:]}
        vocab_size = max(vocab_size, len(tokenizer))
        config = new_config(args.config_class, args, vocab_size=vocab_size, **tokens, **class_fields(labels))
        model = build_new(config, args.head)
    if args.language_weight and model.config.model_type not in decoder_types():
        raise ValueError(
            f"language_weight is for {', '.join(decoder_types())}: a {model.config.model_type} model sees all tokens"
        )
    limit = getattr(model.config, "max_position_embeddings", None) or args.max_length
    if args.max_length > limit:
        raise ValueError(f"max_length must be at most max_position_embeddings = {limit}, got {args.max_length}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return model


def keep_what_is_read(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Restrict the outputs of a tokenizer to the inputs of its model: no segments if the model has only one."""
    read = [name for name in tokenizer.model_input_names if name in input_names(model)]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = read


def head_of(model: PreTrainedModel, name: str) -> str:
    """Return the head of a weight for `load_to_train`: its module, if that is a pooler or above the base model."""
    below = name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    return "" if below else name.rpartition(".")[0]


def load_classifier(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None,
    fields: dict[str, Any],
    trust_remote_code: bool | None = None,
) -> PreTrainedModel:
    """Load a pretrained model of any architecture with a classifier for these classes, new if the classes differ.

    Args:
        fields: configuration fields to change.
        trust_remote_code: see `load_config`.

    Raises:
        ValueError: a field is unknown, or the model lacks weights below its classifier.
    """
    earlier = load_config(name, "model_name_or_path", trust_remote_code=trust_remote_code)
    if unknown := [field for field in fields if not hasattr(earlier, field) or field in TOKEN_FIELDS]:
        raise ValueError(f"model.{unknown[0]} is not a field of {type(earlier).__name__} that can be chosen")
    # A DistilBERT without pooler gets the ReLU layer below the classifier that transformers' DistilBERT has.
    pooler = {"pooler": "relu"} if getattr(earlier, "pooler", None) == "none" else {}
    model, fresh = load_to_train(
        AutoModelForSequenceClassification,
        name,
        head_of,
        fields,
        resized="",
        trust_remote_code=trust_remote_code,
        **{**pooler, **class_fields(labels)},
    )
    base = f"{model.base_model_prefix}."
    if not any(not key.startswith(base) for key in fresh) and not same_classes(earlier, model.config):
        fresh_classifier(model)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        log.info("%d tokens are new to %s", len(tokenizer) - model.get_input_embeddings().num_embeddings, name)
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def same_classes(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Return True if two models have the same classes, or both predict a number."""
    return one.num_labels == other.num_labels and (one.num_labels == 1 or one.id2label == other.id2label)


def fresh_classifier(model: PreTrainedModel) -> None:
    """Reinitialise the weights of the last layer, for as many but different classes.

    Raises:
        ValueError: no linear layer above the base model has that many outputs.
    """
    last = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.num_labels
        and not name.startswith(f"{model.base_model_prefix}.")
    ]
    if not last:
        raise ValueError(
            f"{type(model).__name__} has no linear layer of {model.num_labels} classes that could be reinitialised"
        )
    fresh_head(model, last[-1])


def load_text_classifier(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a saved text classifier, in float32 on the best available device, and its tokenizer.

    Raises:
        ValueError: weights are missing.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, **options)
    loaded = load_model(AutoModelForSequenceClassification, model, **options)
    check_vocabulary(model, loaded.config, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 needs it to find the end of a text
    return loaded.to(PartialState().device), tokenizer
