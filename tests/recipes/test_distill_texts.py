"""Distillation of text models: every kind of term for a few steps, students, and refused options."""

import inspect

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from distill_text_recipes import (
    NAMES,
    SMALL,
    WIDE,
    command_line,
    run,
    save,
)
from recipe_helpers import ROOT, arguments_of, fresh_state, history, record
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from hf_tfm import TfmBertConfig, TfmBertForSequenceClassification
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.text_classification import TextCollator

INNER = "[{kind: embedding}, {kind: hidden_state}, {kind: attention_score}]"
TERMS = {
    "soft_and_label": "[{kind: soft_target, temperature: 2.0}, {kind: label, weight: 0.5}]",
    "inner_layers": INNER,
    "mapped": "[{kind: hidden_state, layers: {1: 1, 2: 4}}, {kind: soft_target}]",
}


@pytest.mark.parametrize("name", ["soft_and_label", "inner_layers", pytest.param("mapped", marks=pytest.mark.slow)])
def test_classifier_learns_from_its_teacher(name, data, classifier, tmp_path):
    argv = command_line(data, tmp_path / "run", teacher=classifier, terms=TERMS[name], batch_size=8)
    assert run("distill_task", *argv) == 0
    fresh_state()
    results = record(tmp_path / "run")
    assert [cost["model"] for cost in results.costs] == ["teacher", "student"]
    teacher, student = results.costs
    assert student["parameters"] == results.parameters < teacher["parameters"]
    assert student["kept"] == pytest.approx(student["score"] / teacher["score"])
    (row,) = results.metrics
    assert (
        row["name"] == "accuracy" and row["value"] == student["score"] and student["metric"] == "accuracy, validation"
    )
    assert results.distillation["teacher"] == classifier.name and not results.distillation["cached"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == NAMES["id2label"]
    assert not [name for name in load_file(tmp_path / "run" / "model.safetensors") if "projection" in name]
    assert "distillation" in history(tmp_path / "run")[-1]["evaluation"]


def test_native_teacher(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **WIDE, **NAMES)
    teacher = save(tmp_path / "teacher", BertForSequenceClassification(config), tokenizer)
    terms = "[{kind: hidden_state}, {kind: attention_probability}, {kind: soft_target}]"
    assert run("distill_task", *command_line(data, tmp_path / "run", teacher=teacher, terms=terms, costs="false")) == 0
    fresh_state()
    assert record(tmp_path / "run").costs is None


def test_inner_layer_terms_do_not_train_the_classifier(data, classifier, tmp_path):
    argv = command_line(
        data, tmp_path / "run", teacher=classifier, terms=INNER, final_weights="last", learning_rate=0.01
    )
    assert run("distill_task", *argv) == 0
    fresh_state()
    longer = command_line(data, tmp_path / "more", teacher=classifier, terms=INNER, final_weights="last", max_steps=6)
    assert run("distill_task", *longer) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "more"))
    assert torch.equal(one["classifier.weight"], other["classifier.weight"])
    name = "bert.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_student_is_saved_if_measuring_costs_fails(data, classifier, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("too large")

    argv = command_line(data, tmp_path / "run", teacher=classifier, terms="[{kind: soft_target}]", batch_size=8)
    with monkeypatch.context() as patch:
        patch.setattr("hf_tfm.tasks.distillation.measure_cost", fail)
        with pytest.raises(RuntimeError, match=r"too large.*the student is saved in .*--costs false"):
            run("distill_task", *argv)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.num_hidden_layers == 2
    assert run("distill_task", *argv, "--costs", "false") == 0
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert torch.equal(saved.classifier.weight, again.classifier.weight)


@pytest.mark.slow  # tests/distillation/test_distillation_run.py
def test_resumed_run_equals_uninterrupted_run(data, classifier, tmp_path):
    overrides = {
        "teacher": classifier,
        "terms": TERMS["mapped"],
        "lr_scheduler_type": "constant",
        "final_weights": "last",
    }
    overrides |= {"eval_steps": 2, "costs": "false"}
    assert run("distill_task", *command_line(data, tmp_path / "whole", **overrides, max_steps=4)) == 0
    assert run("distill_task", *command_line(data, tmp_path / "cut", **overrides, max_steps=2)) == 0
    assert run("distill_task", *command_line(data, tmp_path / "cut", **overrides, max_steps=4)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def pair_rows(names: list[str]) -> Dataset:
    """Pairs of similar texts labelled calm and loud in turn; ``names`` gives the order of the classes."""
    rows = {side: [f"the {side} cat number {i}" for i in range(24)] for side in ("one", "two")}
    features = {"one": Value("string"), "two": Value("string"), "label": ClassLabel(names=names)}
    return Dataset.from_dict({**rows, "label": ["calm", "loud"] * 12}, features=Features(features))


@pytest.fixture(scope="module")
def pair_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        pair_rows(["calm", "loud"]).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_teacher_keeps_its_segments_if_the_student_has_none(pair_data, classifier, tmp_path, monkeypatch):
    given = []
    forward = TfmBertForSequenceClassification.forward

    def watched(self, *args, **kwargs):
        if self.config.num_hidden_layers == 4:  # the teacher
            given.append(kwargs.get("token_type_ids"))
        return forward(self, *args, **kwargs)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(TfmBertForSequenceClassification, "forward", watched)
    model = SMALL.replace("{", "{type_vocab_size: 0, pooler: relu, ")
    overrides = {"teacher": classifier, "terms": "[{kind: soft_target}]", "model": model, "costs": "false"}
    argv = command_line(pair_data, tmp_path / "run", **overrides, text_columns="[one,two]", batch_size=8)
    assert run("distill_task", *argv) == 0
    assert given and all(segments is not None and segments.max() == 1 for segments in given)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "run").model_input_names


def test_labels_of_each_split_use_its_own_class_names(classifier, tmp_path, monkeypatch):
    """Row i has class i modulo 2 in both splits, although the validation split orders the names the other way."""
    splits = {"train": pair_rows(["calm", "loud"]), "validation": pair_rows(["loud", "calm"])}
    monkeypatch.setattr("hf_tfm.tasks.text_classification.load_texts", lambda *where: DatasetDict(splits))
    found = []
    collate = TextCollator.__call__

    def watched(self, examples, indices, *rest, **options):
        batch = collate(self, examples, indices, *rest, **options)
        found.extend(zip(indices, batch["labels"].tolist(), strict=True))
        return batch

    monkeypatch.setattr(TextCollator, "__call__", watched)
    overrides = {
        "teacher": classifier,
        "terms": "[{kind: soft_target}]",
        "costs": "false",
        "text_columns": "[one,two]",
    }
    assert run("distill_task", *command_line("nowhere", tmp_path / "run", **overrides, batch_size=8)) == 0
    assert len(found) > 24 and [(i, label) for i, label in found if label != i % 2] == []


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("distilbert_second", marks=pytest.mark.slow),
        "tinybert4_intermediate",
        pytest.param("tinybert4_prediction", marks=pytest.mark.slow),
    ],
)
def test_paper_presets_support_regression(preset, tokenizer, tmp_path):
    """STS-B: its single output is compared by squared error."""
    torch.manual_seed(0)
    rows = {
        "sentence1": [f"the cat number {i}" for i in range(16)],
        "sentence2": [f"the dog number {i}" for i in range(16)],
        "label": [i / 4 for i in range(16)],
    }
    for split in ("train", "validation"):
        folder = tmp_path / "glue-stsb"
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(str(folder / f"{split}.parquet"))
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, num_labels=1, **WIDE)
    teacher = save(tmp_path / "teacher", TfmBertForSequenceClassification(config), tokenizer)
    overrides = {"teacher": teacher, "costs": "false", "task": "stsb", "model": SMALL.replace("{", "{pooler: relu, ")}
    argv = command_line(
        tmp_path / "glue-{task}", tmp_path / "run", **overrides, num_train_epochs="null", warmup_ratio="null"
    )
    assert run("distill_task", "--config", preset, *argv) == 0
    assert {row["name"] for row in record(tmp_path / "run").metrics} == {"pearson", "spearman"}


REFUSED = {
    "no_terms": ("distill_task", {"terms": "[]"}, "terms must not be empty"),
    "field": ("distill_task", {"terms": "[{kind: label, warmth: 1}]"}, "terms[0]: a term has no warmth; it has kind"),
    "no_kind": ("distill_task", {"terms": "[{weight: 1.0}]"}, "terms[0]: a term needs a kind"),
    "kind": ("distill_task", {"terms": "[{kind: warmth}]"}, "kind must be one of label, soft_target"),
    "layers_and_init": (
        "distill_task",
        {"student_layers": "[0]", "model_name_or_path": "x"},
        "do not give student_layers with it",
    ),
    "nowhere_to_write": ("distill_task", {"write_cache": "true"}, "write_cache needs cache"),
    "pairs": ("distill_pretrain", {"sequences": "pairs"}, 'sequences must be "packed" or "rows"'),
    "tokenizer": ("distill_pretrain", {"tokenizer": "x"}, "the student has the teacher's tokenizer"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_incompatible_options_are_refused_at_once(name, tmp_path, capsys):
    recipe, overrides, message = REFUSED[name]
    given = {"teacher": "nowhere", "terms": "[{kind: soft_target}]", **overrides}
    with pytest.raises(SystemExit):
        run(recipe, *command_line(tmp_path / "nothing", tmp_path / "run", **given))
    assert message in capsys.readouterr().err


def test_terms_incompatible_with_the_models_are_refused(data, classifier, language_model, tmp_path):
    heads = SMALL.replace("num_attention_heads: 2", "num_attention_heads: 4")
    with pytest.raises(ValueError, match="term attention_score: student and teacher must have"):
        run("distill_task", *command_line(data, tmp_path / "run", teacher=classifier, terms=INNER, model=heads))
    with pytest.raises(ValueError, match=r"lacks the weights .*classifier\.bias"):
        run("distill_task", *command_line(data, tmp_path / "run", teacher=language_model, terms=INNER))
    with pytest.raises(ValueError, match=r"the teacher's accuracy is .* and should be 0.99"):
        argv = command_line(data, tmp_path / "run", teacher=classifier, terms=INNER, expected_score=0.99)
        run("distill_task", *argv)
    assert not (tmp_path / "run").exists()


def test_terms_on_the_command_line_replace_those_of_a_preset():
    recipe = ROOT / "recipes" / "distill_task.py"
    kind = arguments_of(recipe)
    preset = parse_arguments(kind, recipe, ["--config", "quickstart"])
    given = parse_arguments(
        kind, recipe, ["--config", "quickstart", "--terms", "[{kind: soft_target}, {kind: label}]"]
    )
    assert [(t.weight, t.temperature) for t in preset.terms] == [(1.0, 2.0), (0.5, 1.0)]
    assert [(t.weight, t.temperature) for t in given.terms] == [(1.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("recipe", "given", "dtype"),
    [
        ("distill_task", ["--mixed_precision", "bf16"], "bf16"),
        ("distill_task", [], "fp32"),
        ("distill_task", ["--teacher_dtype", "fp32"], "fp32"),
        ("distill_detection", [], "fp32"),
    ],
)
def test_teacher_computes_in_the_student_precision(recipe, given, dtype):
    """Except for a detector, whose boxes would be rounded."""
    path = ROOT / "recipes" / f"{recipe}.py"
    assert parse_arguments(arguments_of(path), path, ["--config", "quickstart", *given]).teacher_dtype == dtype
