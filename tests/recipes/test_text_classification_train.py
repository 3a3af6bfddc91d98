"""The text classification recipe: from scratch, from every type of model, on GLUE, resumed, and refused options."""

import json
import math
import runpy

import pytest
import torch
from datasets import ClassLabel, Value
from processes import run_ranks
from recipe_helpers import fresh_state, history, record
from safetensors.torch import load_file
from text_recipes import NAMES, RECIPE, TINY, command_line, pretrained, run_recipe, write_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_tfm.tasks.evaluation import evaluate
from hf_tfm.tasks.text_model import complete, fresh_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


def values(folder) -> dict:
    return {(row["split"], row["name"]): row["value"] for row in record(folder).metrics}


# --- from scratch


VARIANTS = {
    "bert": {"test_splits": "[test]"},
    "one_text": {"text_columns": "[en]", "bucketing": "false", "dataloader_num_workers": 1},
    "tokens": {"batch_size": "null", "batch_tokens": 1024, "micro_batch_tokens": 512},
    "gpt": {"architecture": "gpt", "language_weight": 0.5, "micro_batch_size": 5},
    "epochs": {"max_steps": "null", "num_train_epochs": 0.5, "warmup_steps": None, "warmup_ratio": 0.5, "holdout": 10},
    "bf16": {
        "mixed_precision": "bf16",
        "layer_wise_lr_decay": 0.9,
        "metrics": "[f1,matthews]",
        "max_train_samples": 40,
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("one_text", "epochs") else ()) for name in VARIANTS]
)
def test_two_steps_from_scratch(data, tmp_path, name):
    assert run_recipe(*command_line(data, tmp_path / "run", **VARIANTS[name])) == 0
    found = record(tmp_path / "run")
    assert found.task == "text-classification" and found.training["item"] == "texts"
    assert found.training["steps"] == (3 if name == "epochs" else 2)
    splits = {"bert": ["validation", "test"], "epochs": ["holdout"]}.get(name, ["validation"])
    metrics = ["f1", "matthews"] if name == "bf16" else ["accuracy"]
    assert [(row["split"], row["name"]) for row in found.metrics] == [(s, m) for s in splits for m in metrics]
    assert found.training["best"]["metric"] == metrics[0]
    assert found.data["text_column"] == ("en" if name == "one_text" else "en + de")
    assert found.data["license"] == "cc0-1.0"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.model_type == ("tfm_gpt" if name == "gpt" else "tfm_bert")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "logits.argmax(-1)" in card


def test_it_learns_and_the_saved_model_has_the_reported_score(tmp_path):
    """Even and odd numbers, for one seed, in a few seconds."""
    argv = ["--config", "quickstart", "--output_dir", str(tmp_path / "run"), "--progress", "false"]
    run_recipe(*argv, "--num_train_epochs", "3", "--max_train_samples", "3000", "--mixed_precision", "no")
    found = values(tmp_path / "run")
    assert found["test", "accuracy"] > 0.9
    fresh_state()
    again = evaluate(str(tmp_path / "run"), dataset_name="number-parity", split="test", progress=False)
    assert {row["name"]: row["value"] for row in again["metrics"]}["accuracy"] == found["test", "accuracy"]
    predictions = pipeline("text-classification", model=str(tmp_path / "run"))(
        ["two hundred and six thousand and one", "one hundred and twenty-two"]
    )
    assert [row["label"] for row in predictions] == ["odd", "even"]


def test_regression(tmp_path):
    """Predicts the number of letters of an English text."""
    data = write_pairs(tmp_path / "data", kind=Value("float32"), labels=lambda row: len(row["en"]) / 40)
    still = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = TINY[:-1] + "".join(f", {name}: {value}" for name, value in still.items()) + "}"
    overrides = {"max_steps": 100, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "holdout": 20, "model": model}
    run_recipe(*command_line(data, tmp_path / "run", **overrides))
    found = values(tmp_path / "run")
    assert found["holdout", "pearson"] > 0.5 and set(found) == {("holdout", "pearson"), ("holdout", "spearman")}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert "logits.item()" in (tmp_path / "run" / "README.md").read_text()
    fresh_state()
    options = {"dataset_name": str(data), "split": "train", "text_columns": ["en", "de"], "progress": False}
    again = evaluate(str(tmp_path / "run"), **options)
    assert {row["name"]: row["value"] for row in again["metrics"]}["pearson"] > 0.5


# --- initialization from another model


# One of ours, an encoder and a decoder of transformers; the others are read by the same code.
@pytest.mark.parametrize(
    "kind",
    [
        *("tfm_bert_student", "bert", "gpt2"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tfm_bert", "tfm_gpt", "distilbert", "openai-gpt")),
    ],
)
def test_initialization_from_any_language_model(data, tmp_path, kind):
    start = pretrained(tmp_path / "start", kind)
    weight = {"language_weight": 0.5} if "gpt" in kind else {}
    run_recipe(*command_line(data, tmp_path / "run", model_name_or_path=start, learning_rate=1e-9, **weight))
    assert record(tmp_path / "run").base_model == start.name
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    before = load_file(start / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    shared = [key for key in before if key in after and before[key].shape == after[key].shape]
    assert len(shared) > 10
    assert max((before[key] - after[key]).abs().max() for key in shared) < 1e-6
    if "gpt" in kind:  # its tokenizer has gained end-of-text and padding tokens
        ids = tokenizer("one", "two")["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 2 and ids[-1] == tokenizer.eos_token_id
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    if kind == "tfm_bert_student":
        assert model.config.pooler == "relu"
    assert model(**tokenizer("one", "two", return_tensors="pt")).logits.shape == (1, 2)
    fresh_state()
    options = {"dataset_name": str(data), "split": "validation", "text_columns": ["en", "de"], "progress": False}
    again = evaluate(str(tmp_path / "run"), metrics=["accuracy"], **options)
    assert again["metrics"][0]["value"] == values(tmp_path / "run")["validation", "accuracy"]


def test_classifier_head_is_kept_for_the_same_classes(data, tmp_path):
    """A run initialized from a run keeps the classifier; for as many other classes it is reset."""
    run_recipe(*command_line(data, tmp_path / "one"))
    other = write_pairs(tmp_path / "data", kind=ClassLabel(names=["yes", "no"]))
    for name, where in (("kept", data), ("anew", other)):
        run_recipe(*command_line(where, tmp_path / name, model_name_or_path=tmp_path / "one", learning_rate=1e-9))
    first, kept, anew = (
        load_file(tmp_path / name / "model.safetensors")["classifier.weight"] for name in ("one", "kept", "anew")
    )
    assert (first - kept).abs().max() < 1e-6 < (first - anew).abs().max()


def test_classifier_without_bias_is_reset():
    from hf_tfm import TfmGPTConfig, TfmGPTForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = TfmGPTForSequenceClassification(TfmGPTConfig(**sizes))
    before = model.score.weight.detach().clone()
    fresh_classifier(model)
    assert model.score.bias is None and not torch.equal(model.score.weight, before)


def test_tokenizers_of_other_models_are_unchanged(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pretrained(tmp_path / "bert", "bert"))
    before = tokenizer("one", "two")["input_ids"]
    assert complete(tokenizer)("one", "two")["input_ids"] == before


# --- GLUE


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local folders of three tasks, with classification, regression, and two validation splits."""
    folder = tmp_path_factory.mktemp("glue")
    write_pairs(folder / "glue-mrpc", ("sentence1", "sentence2"), ClassLabel(names=["not_equivalent", "equivalent"]))
    write_pairs(folder / "glue-stsb", ("sentence1", "sentence2"), Value("float32"), lambda row: 5.0 * row["label"])
    mnli = ClassLabel(names=["entailment", "neutral", "contradiction"])
    splits = {"train": (90, 0), "validation_matched": (20, 90), "validation_mismatched": (30, 110)}
    write_pairs(folder / "glue-mnli", ("premise", "hypothesis"), mnli, lambda row: 2 * row["label"], splits)
    return f"{folder}/glue-{{task}}"


def test_all_tasks_with_one_command(tasks, tmp_path, capsys):
    argv = command_line(tasks, tmp_path / "run", text_columns=None, tasks="glue", test_splits="[train]")
    assert run_recipe(*argv) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    found = {(row["task"], row["split"], row["name"]): row["value"] for row in result["metrics"]}
    assert list(found) == [
        ("mrpc", "validation", "accuracy"),
        ("mrpc", "validation", "f1"),
        ("stsb", "validation", "pearson"),
        ("stsb", "validation", "spearman"),
        ("mnli", "validation_matched", "accuracy"),
        ("mnli", "validation_mismatched", "accuracy"),
    ]
    means = [sum(v for key, v in found.items() if key[0] == task) / 2 for task in ("mrpc", "stsb", "mnli")]
    assert result["macro_average"] == pytest.approx(sum(means) / 3)
    assert set(result["missing"]) == {"cola", "sst2", "qqp", "qnli", "rte", "wnli"}
    printed = capsys.readouterr().out
    assert "macro average of 3 of GLUE's 9 tasks" in printed and "cola: not scored, dataset_name" in printed
    # Each task is a separate run, and its command repeats only that task.
    alone = record(tmp_path / "run" / "mnli")
    assert alone.command.endswith("--tasks null --task mnli --output_dir mnli")
    fresh_state()
    again = evaluate(str(tmp_path / "run"), dataset_name=tasks, tasks="mrpc,stsb,mnli", progress=False)
    assert again["macro_average"] == pytest.approx(result["macro_average"], abs=1e-6)


def test_no_task_has_data(tmp_path):
    with pytest.raises(ValueError, match=r"no task can be scored. sst2: dataset_name .*; rte: dataset_name"):
        run_recipe(*command_line(f"{tmp_path}/none-{{task}}", tmp_path / "run", text_columns=None, tasks="sst2,rte"))


def test_two_processes_train_several_tasks(tasks, tmp_path):
    argv = command_line(tasks, tmp_path / "run", text_columns=None, tasks="mrpc,stsb")
    done = run_ranks("-m", "hf_tfm.cli", "run", RECIPE.stem, *argv)
    assert (done.stdout + done.stderr).count("macro average of 2") == 1
    assert record(tmp_path / "run" / "stsb").hardware["count"] == 2


# --- stopping and resuming


@pytest.mark.slow  # tests/training/test_resume.py and test_language_pretrain.py resume runs
def test_stopped_run_resumes(data, tmp_path):
    argv = command_line(data, tmp_path / "whole", max_steps=8, save_steps=2, eval_steps=4, logging_steps=2)
    run_recipe(*argv)
    part = command_line(data, tmp_path / "part", max_steps=8, save_steps=2, eval_steps=4, logging_steps=2)
    recipe = runpy.run_path(str(RECIPE))["main"]

    def stop(*_):
        raise KeyboardInterrupt

    fresh_state()
    with pytest.MonkeyPatch.context() as patch:
        from hf_tfm.training.session import Session

        plain = Session.end_of_step
        patch.setattr(Session, "end_of_step", lambda s, *a: plain(s, *a) or (stop() if s.progress.step == 5 else None))
        with pytest.raises(KeyboardInterrupt):
            recipe(part)
    assert not (tmp_path / "part" / "results.json").exists()
    run_recipe(*part)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert history(tmp_path / "whole") == history(tmp_path / "part")
    with pytest.raises(ValueError, match=r"holds another run .*seed: 0 there, 1 now"):
        run_recipe(*part, "--seed", "1")


# --- refused options and data


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"task": "sst3"}, "task"),
        ({"tasks": "sst2,sst3", "text_columns": None}, 'got "sst3"'),
        ({"tasks": "glue"}, "tasks determines text_columns: set it to null"),
        ({"batch_tokens": 512}, "exactly one of batch_size and batch_tokens, got 16 and 512"),
        ({"micro_batch_tokens": 512}, "micro_batch_tokens cannot be combined with batch_size: give micro_batch_size"),
        ({"batch_size": "null", "batch_tokens": 32}, "max_length must be at most the tokens of a batch, got 64"),
        ({"holdout": 5, "validation_split": "validation"}, "one of holdout and validation_split"),
        ({"warmup_ratio": 0.5}, "one of warmup_steps and warmup_ratio, got 1 and 0.5"),
        ({"warmup_ratio": 1.5, "warmup_steps": None}, "warmup_ratio must be in [0, 1), got 1.5"),
        ({"max_length": 600}, "max_length must be at most max_position_embeddings = 512, got 600"),
        ({"language_weight": 0.5}, 'language_weight is for decoders: give architecture="gpt" or model_name_or_path'),
        ({"model": "{pad_token_id: 3}"}, "model.pad_token_id is not a field of TfmBertConfig that can be chosen"),
        ({"model_name_or_path": "x", "tokenizer": "y"}, "model_name_or_path has its own tokenizer"),
        ({"metrics": "[bleu]"}, "metrics"),
    ],
)
def test_incompatible_options_are_refused(data, tmp_path, capsys, overrides, named):
    with pytest.raises(SystemExit) as ended:
        run_recipe(*command_line(data, tmp_path / "run", **overrides))
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"text_columns": "[fr]"}, 'text_columns "fr" is not a column of the data set; it has en, de, label'),
        ({"label_column": "kind"}, 'label_column "kind" is not a column of the data set; it has en, de, label'),
        ({"validation_split": "valid"}, 'validation_split "valid" is not a split of the data set'),
        ({"task": "rte", "text_columns": None}, 'text_columns "sentence1" is not a column of the data set'),
        ({"task": "rte"}, 'label "other" is not a class of the model; it has entailment, not_entailment'),
        ({"metrics": "[pearson]"}, 'metrics of classes must be among accuracy, f1, f1_macro, matthews, got "pearson"'),
        ({"metric_for_best_model": "f1"}, 'metric_for_best_model must be loss or among metrics, accuracy, got "f1"'),
        ({"holdout": 90}, "holdout must be below the 90 rows of train, got 90"),
        ({"model": TINY[:-1] + ", pooler: none}"}, "this classifier reads the pooler"),
    ],
)
def test_incompatible_data_is_refused(data, tmp_path, overrides, named):
    with pytest.raises(ValueError) as caught:
        run_recipe(*command_line(data, tmp_path / "run", **overrides))
    assert named in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_incompatible_labels_are_refused(tmp_path):
    splits = {"train": (40, 0), "validation": (20, 40), "test": (10, 60)}
    kind = Value("int64")
    hidden = write_pairs(tmp_path / "a", kind=ClassLabel(names=NAMES), splits=splits)
    write_pairs(hidden, splits={"test": (10, 60)}, labels=lambda row: -1)
    with pytest.raises(ValueError, match='test_splits "test" has no labels, so it cannot be scored'):
        run_recipe(*command_line(hidden, tmp_path / "run", test_splits="[test]"))
    third = write_pairs(tmp_path / "b", kind=kind, splits=splits)
    write_pairs(third, kind=kind, splits={"validation": (20, 40)}, labels=lambda row: 7)
    with pytest.raises(ValueError, match='validation_split "validation": label "7" is not a class of the model'):
        run_recipe(*command_line(third, tmp_path / "run2"))
    one = write_pairs(tmp_path / "c", kind=kind, splits=splits, labels=lambda row: 1)
    with pytest.raises(ValueError, match="at least two classes of labels, got '1'"):
        run_recipe(*command_line(one, tmp_path / "run3"))


def test_incompatible_models_are_refused(data, tmp_path):
    bert = pretrained(tmp_path / "bert", "bert")
    gpt = pretrained(tmp_path / "gpt2", "gpt2")
    for start, overrides, named in (
        (bert, {"language_weight": 0.5}, "a bert model sees all tokens"),
        (bert, {"model": "{hidden: 3}"}, "model.hidden is not a field of BertConfig that can be chosen"),
        (gpt, {"max_length": 100}, "max_length must be at most max_position_embeddings = 64, got 100"),
        (bert, {"model": "{hidden_size: 32}"}, r"weights of model_name_or_path .* do not fit it: bert\.embeddings"),
    ):
        with pytest.raises(ValueError, match=named):
            run_recipe(*command_line(data, tmp_path / f"run-{named[:5]}", model_name_or_path=start, **overrides))


def test_layer_wise_lr_decay_needs_known_layers(data, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tfm.training.optim.layer_id", lambda name: math.inf)
    with pytest.raises(ValueError, match=r"layer_wise_lr_decay must be 1 for a tfm_bert model, got 0\.5"):
        run_recipe(*command_line(data, tmp_path / "run", layer_wise_lr_decay=0.5))
