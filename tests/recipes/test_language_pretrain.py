"""The language modeling recipe: every kind of model and data for a few steps, resuming, and refused options."""

import json
import math
import runpy

import pytest
import torch
from datasets import Dataset
from recipe_helpers import ROOT, fresh_state, history, record
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline

RECIPE = ROOT / "recipes" / "language_pretrain.py"
TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 1}"


def run_recipe(*argv: str) -> int:
    fresh_state()
    return runpy.run_path(str(RECIPE))["main"](list(argv))


def command_line(data, output_dir, **options) -> list[str]:
    """Command-line arguments of a short run; options that are None are omitted."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "max_steps": 3,
        "batch_tokens": 256,
        "max_length": 32,
        "vocab_size": 320,
        "warmup_steps": 1,
        "size": "tiny",
        "progress": "false",
        **({} if "model_name_or_path" in options else {"model": TINY}),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences, a few of them empty; and a second corpus with another column name."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("texts")
    sentence = "the {} {} saw a {} near the {} and went home"
    sizes, animals, landmarks = ("big", "small", "old"), ("cat", "dog", "fox", "owl"), ("river", "house", "hill")
    texts = [sentence.format(s, a, b, p) for s in sizes for a in animals for b in animals for p in landmarks]
    for split, part in {"train": [*texts[::2], ""], "validation": texts[1:40:2], "test": texts[41:80:2]}.items():
        Dataset.from_dict({"text": part, "number": range(len(part))}).to_parquet(str(folder / f"{split}.parquet"))
    other = tmp_path_factory.mktemp("other")
    Dataset.from_dict({"sentence": texts[80:90], "label": [0] * 10}).to_parquet(str(other / "train.parquet"))
    return folder, other


KINDS = {
    "packed": ({}, AutoModelForMaskedLM),
    "rows_whole_words": ({"sequences": "rows", "whole_words": "true", "micro_batch_tokens": 64}, AutoModelForMaskedLM),
    "pairs": ({"sequences": "pairs", "dataloader_num_workers": 1, "documents": "false"}, AutoModelForPreTraining),
    "causal": ({"objective": "causal", "lowercase": "false"}, AutoModelForCausalLM),
    "causal_rows": ({"objective": "causal", "sequences": "rows", "mixed_precision": "bf16"}, AutoModelForCausalLM),
    "streaming": ({"streaming": "true", "tokenizer_rows": 30}, AutoModelForMaskedLM),
    "holdout": ({"validation_split": "null", "holdout": 9, "max_train_samples": 40}, AutoModelForMaskedLM),
}


SLOW = ("rows_whole_words", "causal_rows", "holdout")  # tests of the data and of other recipes have these options


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in KINDS]
)
def test_a_few_steps(name, data, tmp_path):
    options, auto_class = KINDS[name]
    assert run_recipe(*command_line(data[0], tmp_path / "run", test_splits="[test]", **options)) == 0
    results = record(tmp_path / "run")
    scores = {(row["split"], row["name"]): row["value"] for row in results.metrics}
    held_out = "holdout" if "holdout" in options else "validation"
    assert {split for split, _ in scores} == {held_out, "test"}
    for split in (held_out, "test"):
        assert scores[split, "perplexity"] == pytest.approx(math.exp(scores[split, "token_loss"]))
        assert ((split, "next_sentence_loss") in scores) == (name == "pairs")
    assert results.data["rows"]["train"] == (None if name == "streaming" else 40 if name == "holdout" else 72)
    fresh_state()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = auto_class.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == 32
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"import {', '.join(sorted((auto_class.__name__, 'AutoTokenizer')))}" in card
    assert "- perplexity" in card


def test_bert_learns_to_fill_masks(data, tmp_path):
    """Where the text is unambiguous, the pipeline predicts the right word."""
    options = {"max_steps": 150, "learning_rate": 0.01, "sequences": "rows", "batch_tokens": 512, "eval_steps": 50}
    assert run_recipe(*command_line(data[0], tmp_path / "run", **options)) == 0
    fresh_state()
    scores = {row["name"]: row["value"] for row in record(tmp_path / "run").metrics}
    assert scores["token_loss"] < 1.6  # a third of the words is random, one of 3 or 4: at least 0.45
    fill = pipeline("fill-mask", str(tmp_path / "run"))
    assert fill("the big dog saw a cat near the hill and [MASK] home")[0]["token_str"] == "went"


def test_gpt_learns_to_continue(data, tmp_path):
    options = {"max_steps": 150, "learning_rate": 0.01, "objective": "causal", "batch_tokens": 512, "eval_steps": 50}
    assert run_recipe(*command_line(data[0], tmp_path / "run", sequences="rows", **options)) == 0
    fresh_state()
    write = pipeline("text-generation", str(tmp_path / "run"))
    (generated,) = write(
        "the big dog saw a cat near the hill and", max_new_tokens=2, do_sample=False, add_special_tokens=False
    )
    assert generated["generated_text"].endswith("and went home")


def test_more_texts_are_trained_on(data, tmp_path):
    more = json.dumps([{"dataset_name": str(data[1])}])
    assert run_recipe(*command_line(data[0], tmp_path / "run", more_texts=more)) == 0
    results = record(tmp_path / "run")
    assert results.data["rows"][f"{data[1].name}, train"] == 10
    assert results.arguments["more_texts"] == [
        {
            "dataset_name": data[1].name,
            "dataset_config": None,
            "dataset_revision": None,
            "split": "train",
            "text_column": None,
        }
    ]


def test_resumed_run_equals_uninterrupted_run(data, tmp_path):
    options = {"max_steps": 6, "eval_steps": 2, "lr_scheduler_type": "constant"}
    assert run_recipe(*command_line(data[0], tmp_path / "whole", **options)) == 0
    assert run_recipe(*command_line(data[0], tmp_path / "cut", **{**options, "max_steps": 4})) == 0
    assert run_recipe(*command_line(data[0], tmp_path / "cut", **options)) == 0
    cut, whole = ([row for row in history(tmp_path / name) if "evaluation" in row] for name in ("cut", "whole"))
    assert cut == whole and [row["step"] for row in cut] == [2, 4, 6]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_initialization_from_a_saved_model(data, tmp_path):
    assert run_recipe(*command_line(data[0], tmp_path / "first")) == 0
    again = command_line(data[0], tmp_path / "second", model_name_or_path=tmp_path / "first", max_steps=1)
    assert run_recipe(*again) == 0
    assert record(tmp_path / "second").base_model == "first"
    with pytest.raises(
        ValueError, match="max_length must be at most the model's max_position_embeddings = 512, got 600"
    ):
        run_recipe(
            *command_line(
                data[0], tmp_path / "third", model_name_or_path=tmp_path / "first", max_length=600, batch_tokens=600
            )
        )


REFUSED = {
    "pairs_of_a_decoder": ({"objective": "causal", "sequences": "pairs"}, 'are for objective="masked"'),
    "too_long": ({"max_length": 600}, "max_length must be at most model.max_position_embeddings = 512, got 600"),
    "field": ({"model": "{vocab_size: 7}"}, "model.vocab_size is not a field of TfmBertConfig that can be chosen"),
    "size": ({"size": "huge"}, "size must be one of tiny, mini, small"),
    "share": ({"mlm_probability": 1.5}, "mlm_probability must be in (0, 1), got 1.5"),
    "part_of_stream": (
        {"streaming": "true", "holdout": 3, "validation_split": "null"},
        "streaming reads the whole training split",
    ),
    "stream_of_two": (
        {"streaming": "true", "more_texts": '[{"dataset_name": "x"}]'},
        "streaming reads one split: give no more_texts",
    ),
    "stream_without_end": (
        {"streaming": "true", "max_steps": "null", "num_train_epochs": 1},
        "streaming needs max_steps",
    ),
    "no_validation": ({"validation_split": "null"}, "give exactly one of validation_split and holdout"),
    "corpus": ({"more_texts": '[{"datasets": "x"}]'}, "datasets"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_incompatible_options_are_refused_at_once(name, tmp_path, capsys):
    options, message = REFUSED[name]
    fresh_state()
    with pytest.raises(SystemExit):
        run_recipe(*command_line(tmp_path / "nowhere", tmp_path / "run", **options))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
