"""TfmBert <-> the files of TinyBERT's authors (Jiao et al. 2020, arXiv:1909.10351).

These are BERT files with BERT's weight names and two differences. They also hold ``fit_dense``, the projection of
hidden states to the teacher's width, which we store next to the model in `PROJECTION`. And their classifiers apply a
ReLU to the pooler's output, so transformers' `BertForSequenceClassification` reads such a file but computes something
else. The authors' code reads ``pytorch_model.bin``, a pickle; this module writes the same content to
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
ACTIVATIONS = ("gelu", "relu", "swish")  # supported by the authors' code
FIXED = {"layer_norm_eps": 1e-12, "pad_token_id": 0}


class TinyBertConfig(BertConfig):
    """Configuration stored with the weights; the authors' code ignores unknown fields."""

    model_type = "tinybert"


class TinyBertForPreTraining(BertForPreTraining):
    """Student of general distillation, with BERT's heads."""

    config: TinyBertConfig
    _keys_to_ignore_on_load_unexpected = [r"^fit_dense\."]  # noqa: RUF012


class TinyBertForSequenceClassification(BertForSequenceClassification):
    """Student of task-specific distillation."""

    config: TinyBertConfig
    _keys_to_ignore_on_load_unexpected = [r"^fit_dense\."]  # noqa: RUF012

    def __init__(self, config: TinyBertConfig):
        super().__init__(config)
        self.dropout = nn.ReLU()  # replaces the dropout: they apply none between pooler and classifier


POOLERS = {TfmBertForPreTraining: "tanh", TfmBertForSequenceClassification: "tanh_relu"}
STOCK = {
    TfmBertForPreTraining: TinyBertForPreTraining,
    TfmBertForSequenceClassification: TinyBertForSequenceClassification,
}


def is_authors_tinybert(folder: Path) -> bool:
    """Return True if ``folder`` holds a student as saved by the authors' code or as published on the Hub."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    if config.get("model_type", "bert") != "bert" or config.get("architectures"):
        return False
    return f"{PREFIX}weight" in weight_names(folder)


def unpack_tinybert(source: Path, folder: Path) -> Path:
    """Write the authors' folder ``source`` with safetensors, a complete config.json and a tokenizer."""
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
    """Load their tokenizer; lower-casing, which they set on the command line, is inferred from the vocabulary."""
    words = path.read_text(encoding="utf-8").splitlines()
    lowers = all(word == word.lower() for word in words if not (word.startswith("[") and word.endswith("]")))
    return BertTokenizer({word: index for index, word in enumerate(words)}, do_lower_case=lowers)


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Save weights in transformers' format."""
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})


def to_tinybert(config: TfmBertConfig, ours: type) -> TinyBertConfig:
    """Convert our configuration of the class ``ours`` to one that the authors' code can build.

    Raises:
        ValueError: a field has a value that it cannot express.
    """
    require_fixed("tinybert", config, FIXED)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"tinybert cannot express hidden_act={config.hidden_act!r}: it needs one of {ACTIVATIONS}")
    return to_bert(config, ours, TinyBertConfig, POOLERS[ours])


def carry_projection(source: Path, target: Path, to_ours: bool) -> None:
    """Move the projection to where the other side stores it, and write the vocabulary that the authors' code reads."""
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
