"""The recipes sft_train, reward_train and preference_train: a few steps, of our models and of transformers'."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from recipe_helpers import ROOT, fresh_state, history, record
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_tfm.data.spelled_numbers import spelled_number_preferences, spelled_number_rankings, spelled_numbers
from hf_tfm.data.vocabulary import train_bytes
from hf_tfm.tasks.evaluation import evaluate

TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 1}"
DATA = {"sft": spelled_numbers, "reward": spelled_number_rankings, "preference": spelled_number_preferences}


def run(name: str, data: Path, output_dir: Path, **options) -> int:
    fresh_state()
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "max_steps": 2,
        "batch_size": 4,
        "max_length": 160,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "progress": "false",
        **options,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return runpy.run_path(str(ROOT / "recipes" / f"{name}_train.py"))["main"](words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{recipe: folder of the embedded data, a few rows of each split}."""
    torch.set_num_threads(1)
    folders = {}
    for name, generate in DATA.items():
        folders[name] = tmp_path_factory.mktemp(name)
        for split, rows in DatasetDict(generate()).items():
            rows.select(range(24 if split == "train" else 8)).to_parquet(str(folders[name] / f"{split}.parquet"))
    return folders


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """A model of sft_train."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    model = f"{TINY[:-1]}, max_position_embeddings: 160, hidden_dropout_prob: 0.3}}"
    options = {"model": model, "vocab_size": 258, "test_splits": "[test]", "size": "tiny"}
    assert run("sft", data["sft"], folder, **options) == 0
    fresh_state()
    return folder


def scores(folder: Path) -> dict[tuple[str, str], float]:
    return {(row["split"], row["name"]): row["value"] for row in record(folder).metrics}


def native(folder: Path, kind: str) -> Path:
    """A causal language model of transformers with its tokenizer, saved."""
    tokenizer = train_bytes(["a"], 258)
    torch.manual_seed(0)
    ids = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=160, **ids))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=160, attention_dropout=0.5, **ids))
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return folder / kind


def test_fine_tuned_model_is_scored_and_saved(data, tuned):
    found = scores(tuned)
    for split in ("validation", "test"):
        assert found[split, "perplexity"] == pytest.approx(math.exp(found[split, "token_loss"]))
        assert 0 <= found[split, "token_accuracy"] <= 1
    assert record(tuned).data["completion_column"] is None
    assert AutoModelForCausalLM.from_pretrained(tuned).config.hidden_dropout_prob == 0.3
    result = evaluate(str(tuned), dataset_name=str(data["sft"]), split="test", progress=False)
    values = {row["name"]: row["value"] for row in result["metrics"]}
    assert values["token_loss"] == pytest.approx(found["test", "token_loss"], rel=1e-5) and result["prompts"] == 8


def test_reward_model(data, tuned, tmp_path):
    demonstrations = json.dumps({"dataset_name": str(data["sft"])})
    options = {"model_name_or_path": tuned, "demonstrations": demonstrations, "test_splits": "[test]"}
    assert run("reward", data["reward"], tmp_path / "run", **options) == 0
    fresh_state()
    found = scores(tmp_path / "run")
    assert {name for _, name in found} == {"loss", "accuracy", "margin", "mean_reward"}
    result = evaluate(str(tmp_path / "run"), dataset_name=str(data["reward"]), split="test", progress=False)
    for row in result["metrics"]:
        assert row["value"] == pytest.approx(found["test", row["name"]], rel=1e-4, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    rows = Dataset.from_parquet(str(data["sft"] / "train.parquet"))
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    with torch.no_grad():
        rewards = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert "inputs = tokenizer(text, add_special_tokens=False" in (tmp_path / "run" / "README.md").read_text()
    assert sum(rewards) / len(rewards) == pytest.approx(0, abs=1e-3)


def test_preferences_start_at_log_2_and_are_scored(data, tuned, tmp_path):
    options = {"model_name_or_path": tuned, "test_splits": "[test]", "logging_steps": 1, "learning_rate": 1e-2}
    assert run("preference", data["preference"], tmp_path / "run", **options) == 0
    fresh_state()
    losses = [row["loss"] for row in history(tmp_path / "run") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[1] != losses[0]
    found = scores(tmp_path / "run")
    given = {"dataset_name": str(data["preference"]), "split": "test", "progress": False}
    result = evaluate(str(tmp_path / "run"), reference_model=str(tuned), **given)
    for row in result["metrics"]:
        assert row["value"] == pytest.approx(found["test", row["name"]], rel=1e-4, abs=1e-4)
    fresh_state()
    names = {row["name"] for row in evaluate(str(tmp_path / "run"), **given)["metrics"]}
    assert names == {"log_prob_accuracy", "chosen_log_prob", "rejected_log_prob"}


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if name == "reward" else ()) for name in DATA]
)
def test_micro_batches_and_resuming_do_not_change_a_run(recipe, data, tuned, tmp_path):
    options = {"model_name_or_path": tuned, "max_steps": 4, "eval_steps": 2, "lr_scheduler_type": "constant"}
    options["model"] = "{hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"  # masks differ by micro-batch
    assert run(recipe, data[recipe], tmp_path / "whole", **options) == 0
    assert run(recipe, data[recipe], tmp_path / "cut", **{**options, "max_steps": 2}) == 0
    assert run(recipe, data[recipe], tmp_path / "cut", **options) == 0
    assert run(recipe, data[recipe], tmp_path / "micro", micro_batch_size=1, **options) == 0
    whole, cut, micro = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut", "micro"))
    for name, value in whole.items():
        assert torch.equal(value, cut[name])
        torch.testing.assert_close(value, micro[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", DATA)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers(kind, recipe, data, tmp_path):
    source = native(tmp_path, kind)
    assert run(recipe, data[recipe], tmp_path / "run", model_name_or_path=source) == 0
    fresh_state()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    if kind == "llama":
        assert saved["model_type"] == "llama" and saved["attention_dropout"] == 0.5


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("sft", {"prompt_loss_weight": 2}, r"prompt_loss_weight must be in \[0, 1\], got 2"),
        ("sft", {"model": "{no_field: 1}"}, "model.no_field is not a field of TfmGPTConfig that can be chosen"),
        ("sft", {"max_length": 161}, "max_length must be at most the model's max_position_embeddings = 160, got 161"),
        ("sft", {"min_lr_rate": 0.1}, 'min_lr_rate is for lr_scheduler_type "cosine", got "linear"'),
        ("reward", {"demonstrations": "{dataset_name: none}"}, 'demonstrations: dataset_name "none" cannot'),
        ("reward", {"metric_for_best_model": "margin"}, "metric_for_best_model must be loss or accuracy"),
        ("preference", {"beta": 0}, "beta must be above 0, got 0"),
        ("preference", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ("preference", {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing is for loss_type"),
        ("preference", {"dataset_name": "spelled-numbers"}, "chosen_column must be given: chosen is not a column"),
    ],
)
def test_bad_options_are_refused(recipe, options, message, data, tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, SystemExit)) as error:
        run(recipe, options.pop("dataset_name", data[recipe]), tmp_path / "run", model_name_or_path=tuned, **options)
    assert re.search(message, capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value))
