"""TfmBert <-> the files of TinyBERT's authors (Jiao et al. 2020, arXiv:1909.10351).

Theirs are a BERT's, under BERT's names, with two differences. A file also holds the projection that hidden states were
compared with the teacher's through, ``fit_dense``; we keep it beside the model, in `PROJECTION`. And their classifiers
put a ReLU on the pooler's output, so that transformers' `BertForSequenceClassification` reads such a file and computes
something else. Their program reads ``pytorch_model.bin``, a pickle; what is written here holds the same in
``model.safetensors``.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForPreTraining, BertForSequenceClassification, BertTokenizer

from ..hub.loading import read_json
from ..hub.saved_files import PROJECTION
from ..models.configuration_bert import TfmBertConfig
from ..models.modeling_bert import TfmBertForPreTraining, TfmBertForSequenceClassification
from .bert import BERT, from_bert, to_bert
from .conversion import require_fixed
from .weight_files import PICKLE, WEIGHTS, weight_names

PREFIX = "fit_dense."
ACTIVATIONS = ("gelu", "relu", "swish")  # their program knows no others
FIXED = {"layer_norm_eps": 1e-12, "pad_token_id": 0}


class TinyBertConfig(BertConfig):
    """Beside their weights; their program takes no notice of what it does not know."""

    model_type = "tinybert"


class TinyBertForPreTraining(BertForPreTraining):
    """The student of the general distillation, whose heads are BERT's."""

    config: TinyBertConfig
    _keys_to_ignore_on_load_unexpected = [r"^fit_dense\."]  # noqa: RUF012


class TinyBertForSequenceClassification(BertForSequenceClassification):
    """The student of the task distillation."""

    config: TinyBertConfig
    _keys_to_ignore_on_load_unexpected = [r"^fit_dense\."]  # noqa: RUF012

    def __init__(self, config: TinyBertConfig):
        super().__init__(config)
        self.dropout = nn.ReLU()  # in its place: between pooler and classifier they drop nothing


POOLERS = {TfmBertForPreTraining: "tanh", TfmBertForSequenceClassification: "tanh_relu"}
STOCK = {
    TfmBertForPreTraining: TinyBertForPreTraining,
    TfmBertForSequenceClassification: TinyBertForSequenceClassification,
}


def is_authors_tinybert(folder: Path) -> bool:
    """Whether ``folder`` holds a student as their program saves it, or as the Hub has it."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    if config.get("model_type", "bert") != "bert" or config.get("architectures"):
        return False
    return f"{PREFIX}weight" in weight_names(folder)


def unpack_tinybert(source: Path, folder: Path) -> Path:
    """Write the folder ``source`` of theirs as one with safetensors, a whole config.json, and a tokenizer."""
    path = source / WEIGHTS
    weights = load_file(path) if path.is_file() else torch.load(source / PICKLE, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{source / PICKLE} must hold weights by name, got a {type(weights).__name__}")
    told = read_json(source / "config.json")
    if "classifier.weight" in weights:
        told |= {"num_labels": len(weights["classifier.weight"])}
    config = TinyBertConfig(**{name: value for name, value in told.items() if name != "model_type"})
    head = TinyBertForSequenceClassification if "classifier.weight" in weights else TinyBertForPreTraining
    config.architectures = [head.__name__]
    config.save_pretrained(folder)
    save_weights({name: weight.clone() for name, weight in weights.items()}, folder / WEIGHTS)
    if (source / "vocab.txt").is_file():
        read_vocabulary(source / "vocab.txt").save_pretrained(folder)
    return folder


def read_vocabulary(path: Path) -> BertTokenizer:
    """Their tokenizer; whether it lowers letters, which they say on the command line, shows in the words."""
    words = path.read_text(encoding="utf-8").splitlines()
    lowers = all(word == word.lower() for word in words if not (word.startswith("[") and word.endswith("]")))
    return BertTokenizer({word: index for index, word in enumerate(words)}, do_lower_case=lowers)


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Save weights as transformers reads them."""
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})


def to_tinybert(config: TfmBertConfig, ours: type) -> TinyBertConfig:
    """Our architecture, of the class ``ours``, as one that their program builds.

    Raises:
        ValueError: a field has a value that it cannot express.
    """
    require_fixed("tinybert", config, FIXED)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"tinybert cannot express hidden_act={config.hidden_act!r}: it needs one of {ACTIVATIONS}")
    return to_bert(config, ours, TinyBertConfig, POOLERS[ours])


def carry_projection(source: Path, target: Path, to_ours: bool) -> None:
    """Put the projection where it belongs on the other side, and the vocabulary as their program reads it."""
    if to_ours:
        projection = {name: w for name, w in load_file(source / WEIGHTS).items() if name.startswith(PREFIX)}
        if projection:
            save_weights(projection, target / PROJECTION)
        return
    if (source / PROJECTION).is_file():
        save_weights({**load_file(target / WEIGHTS), **load_file(source / PROJECTION)}, target / WEIGHTS)
    if (source / "tokenizer_config.json").is_file():
        words = AutoTokenizer.from_pretrained(source, trust_remote_code=False).get_vocab()
        (target / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.get)), "utf-8")


TINYBERT = tuple(
    replace(
        conversion,
        name="tinybert",
        theirs=STOCK[conversion.ours],
        to_theirs=partial(to_tinybert, ours=conversion.ours),
        to_ours=partial(from_bert, ours=conversion.ours, pooler=POOLERS[conversion.ours]),
        carry_processor=carry_projection,
    )
    for conversion in BERT
    if conversion.ours in STOCK
)
CONVERSIONS = TINYBERT
