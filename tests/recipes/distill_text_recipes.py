"""Shared helpers of the text distillation tests: small data, teachers with random weights, short runs."""

import runpy
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from recipe_helpers import ROOT, fresh_state

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM, TfmBertForSequenceClassification
from hf_tfm.data.vocabulary import train_wordpiece

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 2}"
NAMES = {"id2label": {0: "calm", 1: "loud"}, "label2id": {"calm": 0, "loud": 1}}


def run(recipe: str, *argv: str) -> int:
    fresh_state()
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](list(argv))


def command_line(data, output_dir, **options) -> list[str]:
    """Command-line arguments of a short run; options that are None are omitted."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "max_steps": 3,
        "warmup_steps": 1,
        "max_length": 16,
        "size": "tiny",
        "progress": "false",
        **({} if "model_name_or_path" in options else {"model": SMALL}),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def write_texts(folder: Path) -> Path:
    """Write 40 training and 12 validation texts of two classes as parquet."""
    torch.set_num_threads(1)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["calm", "loud"])})
    for split, (start, end) in {"train": (0, 40), "validation": (40, 52)}.items():
        texts = [
            f"the {'dog' if i % 2 else 'cat'} number {i} {'barks' if i % 2 else 'sleeps'}" for i in range(start, end)
        ]
        rows = {"sentence": texts, "label": [i % 2 for i in range(start, end)]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def train_tokenizer(data: Path):
    return train_wordpiece(Dataset.from_parquet(str(data / "train.parquet"))["sentence"], 90)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(folder: Path, tokenizer) -> Path:
    """A classifier teacher with 4 layers and random weights."""
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE, **NAMES)
    return save(folder, TfmBertForSequenceClassification(config), tokenizer)


def save_language_model(folder: Path, tokenizer) -> Path:
    """A masked language model teacher with 4 layers and random weights."""
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE)
    return save(folder, TfmBertForMaskedLM(config), tokenizer)
