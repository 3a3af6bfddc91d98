"""Shared helpers of the text classification recipe tests: small data, tiny models of several types, short runs."""

import json
import runpy
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from recipe_helpers import ROOT, fresh_state
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM, TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.number_words import spell
from hf_tfm.data.text import train_tokenizer
from hf_tfm.data.vocabulary import train_wordpiece

RECIPE = ROOT / "recipes" / "text_classification_train.py"
TINY = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
NAMES = ["other", "same"]


def pairs(count: int, start: int, labels: list | None = None) -> list[dict]:
    """English and German number words; label 1 if they are the same number."""
    rows = []
    for i in range(start, start + count):
        same = i % 2
        rows.append({"en": spell(7 * i + 1)["en"], "de": spell(7 * i + 1 + (1 - same) * 5)["de"], "label": same})
    return rows


def write_pairs(
    folder: Path, columns: tuple[str, str] = ("en", "de"), kind=None, labels=lambda row: row["label"], splits=None
) -> Path:
    """Write 90 training, 20 validation and 10 test rows as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = kind or ClassLabel(names=NAMES)
    features = Features({columns[0]: Value("string"), columns[1]: Value("string"), "label": kind})
    for name, (count, start) in (splits or {"train": (90, 0), "validation": (20, 90), "test": (10, 110)}).items():
        rows = pairs(count, start)
        table = {columns[0]: [row["en"] for row in rows], columns[1]: [row["de"] for row in rows]}
        table["label"] = [labels(row) for row in rows]
        Dataset.from_dict(table, features).to_parquet(str(folder / f"{name}.parquet"))
    files = [{"split": path.stem, "path": path.name} for path in sorted(folder.glob("*.parquet"))]
    configs = [{"config_name": "default", "data_files": files}]
    (folder / "README.md").write_text(f"---\nlicense: cc0-1.0\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


def command_line(data: Path | str, output_dir: Path, **options) -> list[str]:
    """Command-line arguments of a short run."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "text_columns": "[en,de]",
        "max_steps": 2,
        "batch_size": 16,
        "max_length": 64,
        "warmup_steps": 1,
        "progress": "false",
        **({} if "model_name_or_path" in options else {"model": TINY, "vocab_size": 300}),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def run_recipe(*argv: str) -> int:
    """Run the recipe in this process; returns its exit status."""
    fresh_state()
    return runpy.run_path(str(RECIPE))["main"](list(argv))


TEXTS = [row[side] for row in pairs(60, 0) for side in ("en", "de")]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NATIVE = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def bare_tokenizer():
    """Like GPT-2's: no padding token and no end-of-text after a text."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer._special_tokens_map["pad_token"] = None
    return tokenizer


def pretrained(folder: Path, kind: str) -> Path:
    """A tiny random language model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = bare_tokenizer() if "gpt" in kind else train_wordpiece(TEXTS, 300)
    size = len(tokenizer)
    make = {
        "tfm_bert": lambda: TfmBertForMaskedLM(TfmBertConfig(vocab_size=size, intermediate_size=32, **SIZES)),
        "tfm_bert_student": lambda: TfmBertForMaskedLM(
            TfmBertConfig(vocab_size=size, intermediate_size=32, type_vocab_size=0, pooler="none", **SIZES)
        ),
        "tfm_gpt": lambda: TfmGPTForCausalLM(TfmGPTConfig(vocab_size=size, max_position_embeddings=64, **SIZES)),
        "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=size, intermediate_size=32, **SIZES)),
        "distilbert": lambda: DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=size, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=size, bos_token_id=2, eos_token_id=2, **NATIVE)),
        "openai-gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=size, **NATIVE)),
    }[kind]
    make().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
