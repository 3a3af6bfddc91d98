"""A classifier of texts and its tokenizer, new or from a pretrained model of any kind.

tokenizer with padding and an end of text -> model with a classifier of so many classes, its names in the configuration
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import datasets
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.vocabulary import tokenizer_name, train_bytes, train_wordpiece
from ..hub.loading import load_config, load_tokenizer
from ..hub.pretrained import load_to_train
from ..memory import new_model
from ..models.configuration_bert import TfmBertConfig
from ..models.configuration_gpt import TfmGPTConfig
from ..tasks.model_fields import fresh_head, label_fields, new_config
from ..tasks.text_classification import input_names
from .optim import height

log = logging.getLogger(__name__)

# By architecture: the configuration of a new model, and how its tokenizer is learned.
ARCHITECTURES = {"bert": (TfmBertConfig, train_wordpiece), "gpt": (TfmGPTConfig, train_bytes)}
TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration; a tokenizer's word
DECODERS = ("tfm_gpt", "gpt2", "openai-gpt")  # model types that read a text from left to right


class ModelArguments(Protocol):
    """Knobs of a model, see the recipe's."""

    seed: int
    max_length: int
    layer_wise_lr_decay: float
    architecture: str
    tokenizer: str | None
    vocab_size: int
    lowercase: bool
    size: str
    model: dict[str, Any]
    model_name_or_path: str | None
    language_weight: float
    trust_remote_code: bool


def all_texts(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[str]:
    """The texts of several columns."""
    for batch in rows.iter(1000):
        for column in columns:
            yield from batch[column]


def classifier_tokenizer(
    args: ModelArguments, rows: datasets.Dataset, columns: Sequence[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one trained on texts, with an end of text and padding; see `complete`."""
    if ready := args.tokenizer or args.model_name_or_path:
        return complete(
            load_tokenizer(
                ready, "tokenizer" if args.tokenizer else "model_name_or_path", None, args.trust_remote_code
            )
        )
    _, learn = ARCHITECTURES[args.architecture]
    return complete(learn(all_texts(rows, columns), args.vocab_size, args.lowercase))


def complete(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a language model's tokenizer what a classifier needs: a padding token, and an end after each text.

    GPT's tokenizers have neither, so a classifier would read its class off whatever word comes last, and the two texts
    of a pair would run into each other. The end stands for Radford et al.'s delimiter and last token (2018, section
    3.3). Other tokenizers stay as they are.

    Raises:
        ValueError: the tokenizer has no end, and is not one of the tokenizers library.
    """
    special = {
        name: token for name, token in (("eos_token", "</s>"), ("pad_token", "<pad>")) if not getattr(tokenizer, name)
    }
    if tokenizer.num_special_tokens_to_add(pair=True) == 0:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} ends no text, and cannot be taught to")
        tokenizer.add_special_tokens(special)
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    elif "pad_token" in special:
        tokenizer.add_special_tokens({"pad_token": special["pad_token"]})
    return tokenizer


def class_fields(labels: Sequence[str] | None) -> dict[str, Any]:
    """What a configuration says of the classes; None where a number is predicted."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {**label_fields(labels), "problem_type": "single_label_classification"}


def build_classifier(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None, vocab_size: int = 0
) -> PreTrainedModel:
    """The model to train, with weights drawn from the seed or taken from ``model_name_or_path``.

    The tokenizer learns the model's longest input; what else of its outputs the model reads, `keep_what_is_read` says.

    Args:
        labels: names of the classes; None where a number is predicted.
        vocab_size: words of a new model are at least so many, and the tokenizer's.

    Raises:
        ValueError: the model does not fit the tokenizer, ``max_length`` or ``args.model``, or lacks weights.
    """
    set_seed(args.seed)
    if args.model_name_or_path:
        model = load_classifier(args.model_name_or_path, tokenizer, labels, args.model, args.trust_remote_code)
    else:
        config_class, _ = ARCHITECTURES[args.architecture]
        tokens = {name: getattr(tokenizer, name) for name in TOKEN_FIELDS[1:]}
        config = new_config(
            config_class, args, vocab_size=max(vocab_size, len(tokenizer)), **tokens, **class_fields(labels)
        )
        new = partial(AutoModelForSequenceClassification.from_config, trust_remote_code=False)
        model = new_model(new, config)
    if args.language_weight and model.config.model_type not in DECODERS:
        raise ValueError(
            f"language_weight is for {', '.join(DECODERS)}: a {model.config.model_type} model sees all tokens"
        )
    limit = getattr(model.config, "max_position_embeddings", None) or args.max_length
    if args.max_length > limit:
        raise ValueError(f"max_length must be at most max_position_embeddings = {limit}, got {args.max_length}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return model


def keep_what_is_read(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Have a tokenizer give what its model reads: no segments where it tells none apart."""
    read = [name for name in tokenizer.model_input_names if name in input_names(model)]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = read


def head_of(model: PreTrainedModel, name: str) -> str:
    """Head of a weight, for `load_to_train`: its module, where that is a pooler or above the base model."""
    below = name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    return "" if below else name.rpartition(".")[0]


def load_classifier(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None,
    fields: dict[str, Any],
    trust_remote_code: bool | None = None,
) -> PreTrainedModel:
    """A pretrained model of any kind with a classifier for these classes, fresh unless it is of the same.

    Args:
        fields: of its configuration that are to differ.
        trust_remote_code: see `load_config`.

    Raises:
        ValueError: a field is unknown, or the model lacks weights below its classifier.
    """
    earlier = load_config(name, "model_name_or_path", trust_remote_code=trust_remote_code)
    if unknown := [field for field in fields if not hasattr(earlier, field) or field in TOKEN_FIELDS]:
        raise ValueError(f"model.{unknown[0]} is not a field of {type(earlier).__name__} that can be chosen")
    # A DistilBERT, whose classifier has a layer with ReLU below it.
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
    """Whether two classifiers have the same classes, or both predict a number."""
    return one.num_labels == other.num_labels and (one.num_labels == 1 or one.id2label == other.id2label)


def fresh_classifier(model: PreTrainedModel) -> None:
    """Draw the weights of the last layer anew: its classes are others, though as many.

    Raises:
        ValueError: no linear layer above the base model gives that many numbers.
    """
    last = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.num_labels
        and not name.startswith(f"{model.base_model_prefix}.")
    ]
    if not last:
        raise ValueError(f"{type(model).__name__} has no linear layer of {model.num_labels} classes to draw anew")
    fresh_head(model, last[-1])


def check_height(args: ModelArguments, model: PreTrainedModel) -> None:
    """Refuse ``layer_wise_lr_decay`` for a model whose layers `optim.height` cannot tell from the names of its
    weights.

    Raises:
        ValueError: it cannot.
    """
    if args.layer_wise_lr_decay == 1.0:
        return
    words = model.get_input_embeddings().weight
    heights = [(parameter is words, height(name)) for name, parameter in model.named_parameters()]
    blocks = any(0 < place < float("inf") for _, place in heights)
    if not blocks or any(place != 0 for embedded, place in heights if embedded):
        raise ValueError(
            f"layer_wise_lr_decay must be 1 for a {model.config.model_type} model, got {args.layer_wise_lr_decay}"
        )
