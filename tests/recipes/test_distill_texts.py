"""Distillation of text models: every kind of term for a few steps, caches, students, and what is refused at once."""

import inspect
import runpy
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from recipe_helpers import ROOT, arguments_of, fresh_state, history, record
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.models import TfmBertConfig, TfmBertForMaskedLM, TfmBertForSequenceClassification
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training.arguments import parse_arguments

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 2}"
NAMES = {"id2label": {0: "calm", 1: "loud"}, "label2id": {"calm": 0, "loud": 1}}
INNER = "[{kind: embedding}, {kind: hidden_state}, {kind: attention_score}]"


def run(recipe: str, *argv: str) -> int:
    fresh_state()
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](list(argv))


def words(data, output_dir, **knobs) -> list[str]:
    """The command line of a short run; a knob that is None is left out."""
    given = {
        "dataset": data,
        "output_dir": output_dir,
        "num_steps": 3,
        "warmup_steps": 1,
        "max_length": 16,
        "size": "tiny",
        "progress": "false",
        **({} if "init_from" in knobs else {"model": SMALL}),
        **knobs,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("texts")
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["calm", "loud"])})
    for split, (start, end) in {"train": (0, 40), "validation": (40, 52)}.items():
        texts = [
            f"the {'dog' if i % 2 else 'cat'} number {i} {'barks' if i % 2 else 'sleeps'}" for i in range(start, end)
        ]
        rows = {"sentence": texts, "label": [i % 2 for i in range(start, end)]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_wordpiece(Dataset.from_parquet(str(data / "train.parquet"))["sentence"], 90)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tokenizer, tmp_path_factory):
    """A teacher of 4 layers with random weights."""
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE, **NAMES)
    return save(tmp_path_factory.mktemp("classifier"), TfmBertForSequenceClassification(config), tokenizer)


@pytest.fixture(scope="module")
def language_model(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE)
    return save(tmp_path_factory.mktemp("language"), TfmBertForMaskedLM(config), tokenizer)


TERMS = {
    "soft_and_label": "[{kind: soft_target, temperature: 2.0}, {kind: label, weight: 0.5}]",
    "inner_layers": INNER,
    "mapped": "[{kind: hidden_state, layers: {1: 1, 2: 4}}, {kind: soft_target}]",
}


@pytest.mark.parametrize("name", list(TERMS))
def test_a_classifier_learns_from_its_teacher(name, data, classifier, tmp_path):
    argv = words(data, tmp_path / "run", teacher=classifier, terms=TERMS[name], batch_size=8)
    assert run("distill_task", *argv) == 0
    fresh_state()
    results = record(tmp_path / "run")
    assert [cost["model"] for cost in results.costs] == ["teacher", "student"]
    teacher, student = results.costs
    assert student["parameters"] == results.parameters < teacher["parameters"]
    assert student["kept"] == pytest.approx(student["score"] / teacher["score"])
    (row,) = results.metrics
    assert row["name"] == "accuracy" and row["value"] == student["score"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == NAMES["id2label"]
    assert not [name for name in load_file(tmp_path / "run" / "model.safetensors") if "projection" in name]
    assert "distillation" in history(tmp_path / "run")[-1]["evaluation"]


def test_a_teacher_of_transformers_own(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **WIDE, **NAMES)
    teacher = save(tmp_path / "teacher", BertForSequenceClassification(config), tokenizer)
    terms = "[{kind: hidden_state}, {kind: attention_probability}, {kind: soft_target}]"
    assert run("distill_task", *words(data, tmp_path / "run", teacher=teacher, terms=terms, costs="false")) == 0
    fresh_state()
    assert record(tmp_path / "run").costs is None


def test_inner_layers_leave_the_classifier_alone(data, classifier, tmp_path):
    argv = words(data, tmp_path / "run", teacher=classifier, terms=INNER, final_weights="last", learning_rate=0.01)
    assert run("distill_task", *argv) == 0
    fresh_state()
    longer = words(data, tmp_path / "more", teacher=classifier, terms=INNER, final_weights="last", num_steps=6)
    assert run("distill_task", *longer) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "more"))
    assert torch.equal(one["classifier.weight"], other["classifier.weight"])
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one[name], other[name])


def test_a_cached_teacher_teaches_the_same(data, classifier, tmp_path, capsys):
    terms = "[{kind: hidden_state}, {kind: soft_target}, {kind: label}]"
    common = {"teacher": classifier, "terms": terms, "precision": "no", "num_workers": 1, "final_weights": "last"}
    assert run("distill_task", *words(data, tmp_path / "online", **common)) == 0
    cache = {**common, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_task", *words(data, tmp_path / "no", **cache, cache_dtype="fp32")) == 0
    assert "40 samples" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()
    assert run("distill_task", *words(data, tmp_path / "cached", **cache)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("online", "cached"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="is the cache of another run: preprocessing"):
        run("distill_task", *words(data, tmp_path / "other", **cache, max_length=4))


CACHED = {"terms": "[{kind: soft_target}]", "batch_size": 8}


def own_teacher(folder, classifier):
    """A copy that a test may change."""
    return shutil.copytree(classifier, folder)


@pytest.mark.parametrize("measured", ["true", "false"])
def test_a_run_from_a_cache_needs_no_weights_of_its_teacher(measured, data, classifier, tmp_path):
    teacher = own_teacher(tmp_path / "teacher", classifier)
    knobs = {**CACHED, "teacher": teacher, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_task", *words(data, tmp_path / "no", **knobs, costs=measured)) == 0
    (teacher / "model.safetensors").unlink()
    assert run("distill_task", *words(data, tmp_path / "run", **knobs)) == 0
    costs = record(tmp_path / "run").costs
    if measured == "false":
        assert [cost["model"] for cost in costs] == ["student"]
        return
    theirs, ours = costs
    assert theirs["parameters"] > ours["parameters"] and ours["kept"] == ours["score"] / theirs["score"]
    # What the teacher scores on other texts is not known.
    assert run("distill_task", *words(data, tmp_path / "other", **knobs, validation_split="train")) == 0
    theirs, ours = record(tmp_path / "other").costs
    assert "score" not in theirs and "kept" not in ours


def test_the_cache_of_another_teacher_is_refused(data, classifier, tmp_path):
    knobs = {**CACHED, "cache": tmp_path / "cache", "costs": "false"}
    assert run("distill_cache", "distill_task", *words(data, tmp_path / "no", teacher=classifier, **knobs)) == 0
    same = own_teacher(tmp_path / "same", classifier)
    assert run("distill_task", *words(data, tmp_path / "run", teacher=same, **knobs)) == 0
    other = own_teacher(tmp_path / "other", classifier)
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.bias[0] += 1.0
    model.save_pretrained(other)
    for change in (lambda: None, (other / "model.safetensors").unlink):
        change()
        with pytest.raises(ValueError, match=rf"of another run: teacher {classifier} there, {other} now$"):
            run("distill_task", *words(data, tmp_path / "run", teacher=other, **knobs, overwrite_output_dir="true"))


def test_a_cache_is_of_the_knobs_that_decide_what_is_read(data, classifier, tmp_path):
    """All texts are shorter than either length: the samples themselves do not tell."""
    knobs = {**CACHED, "teacher": classifier, "cache": tmp_path / "cache", "costs": "false"}
    assert run("distill_cache", "distill_task", *words(data, tmp_path / "no", **knobs)) == 0
    with pytest.raises(ValueError, match="is the cache of another run: max_length 16 there, 18 now"):
        run("distill_task", *words(data, tmp_path / "run", **knobs, max_length=18))


def test_what_the_largest_logits_cannot_teach_is_refused_before_they_are_written(data, classifier, tmp_path):
    knobs = {"teacher": classifier, "cache": tmp_path / "cache", "cache_top_k": 1}
    argv = words(data, tmp_path / "no", **knobs, terms="[{kind: logit}]")
    with pytest.raises(ValueError, match=r"term logit needs all logits, .* has top_k=1"):
        run("distill_cache", "distill_task", *argv)
    argv = words(data, tmp_path / "no", **knobs | {"cache_top_k": 2}, terms="[{kind: soft_target}]")
    with pytest.raises(ValueError, match="top_k must be below the 2 classes, got 2"):
        run("distill_cache", "distill_task", *argv)
    assert not (tmp_path / "cache").exists()


def test_costs_that_cannot_be_measured_do_not_lose_the_student(data, classifier, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("too large")

    argv = words(data, tmp_path / "run", **CACHED, teacher=classifier)
    with monkeypatch.context() as patch:
        patch.setattr("hf_tfm.training.distill_cache.measure_cost", fail)
        with pytest.raises(RuntimeError, match=r"too large.*the student is saved in .*--costs false"):
            run("distill_task", *argv)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.num_hidden_layers == 2
    assert run("distill_task", *argv, "--costs", "false") == 0
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert torch.equal(saved.classifier.weight, again.classifier.weight)


def test_a_stopped_run_goes_on_as_if_it_had_not(data, classifier, tmp_path):
    knobs = {"teacher": classifier, "terms": TERMS["mapped"], "schedule": "constant", "final_weights": "last"}
    knobs |= {"eval_steps": 2, "costs": "false"}
    assert run("distill_task", *words(data, tmp_path / "whole", **knobs, num_steps=4)) == 0
    assert run("distill_task", *words(data, tmp_path / "cut", **knobs, num_steps=2)) == 0
    assert run("distill_task", *words(data, tmp_path / "cut", **knobs, num_steps=4)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_language_model_begins_with_the_teachers_layers(data, language_model, tmp_path):
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "type_vocab_size: 0, pooler: none, max_position_embeddings: 64}"
    terms = "[{kind: soft_target, weight: 5, temperature: 2}, {kind: label, weight: 2}, {kind: cosine}]"
    common = {"teacher": language_model, "terms": terms, "model": model, "batch_tokens": 128, "vocab_size": None}
    argv = words(data, tmp_path / "run", **common, student_layers="[1, 3]", num_steps=1, learning_rate=1e-9)
    assert run("distill_pretrain", *argv) == 0
    fresh_state()
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    teacher = AutoModelForMaskedLM.from_pretrained(language_model)
    for mine, theirs in zip(student.bert.layers, [teacher.bert.layers[1], teacher.bert.layers[3]], strict=True):
        for own, given in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, given, rtol=0, atol=1e-6)
    assert {row["name"] for row in record(tmp_path / "run").metrics} == {"perplexity", "token_loss"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == student.config.vocab_size


def pair_rows(names: list[str]) -> Dataset:
    """Pairs of like texts with labels by turns calm and loud, whichever number ``names`` give these."""
    rows = {side: [f"the {side} cat number {i}" for i in range(24)] for side in ("one", "two")}
    features = {"one": Value("string"), "two": Value("string"), "label": ClassLabel(names=names)}
    return Dataset.from_dict({**rows, "label": ["calm", "loud"] * 12}, features=Features(features))


@pytest.fixture(scope="module")
def pair_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        pair_rows(["calm", "loud"]).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_a_student_without_segments_leaves_the_teacher_its_own(pair_data, classifier, tmp_path, monkeypatch):
    given = []
    forward = TfmBertForSequenceClassification.forward

    def watched(self, *args, **kwargs):
        if self.config.num_hidden_layers == 4:  # the teacher
            given.append(kwargs.get("token_type_ids"))
        return forward(self, *args, **kwargs)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(TfmBertForSequenceClassification, "forward", watched)
    model = SMALL.replace("{", "{type_vocab_size: 0, pooler: relu, ")
    knobs = {"teacher": classifier, "terms": "[{kind: soft_target}]", "model": model, "costs": "false"}
    argv = words(pair_data, tmp_path / "run", **knobs, text_columns="[one,two]", batch_size=8)
    assert run("distill_task", *argv) == 0
    assert given and all(segments is not None and segments.max() == 1 for segments in given)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "run").model_input_names


def test_labels_of_a_split_are_read_by_its_own_names(classifier, tmp_path, monkeypatch):
    """Row i is of class i modulo 2 in both splits, though the validation split numbers the names the other way."""
    splits = {"train": pair_rows(["calm", "loud"]), "validation": pair_rows(["loud", "calm"])}
    monkeypatch.setattr("hf_tfm.training.text_run.load_texts", lambda *where: DatasetDict(splits))
    found = []
    collate = TextClassificationTask.collate

    def watched(self, examples, indices, *rest, **options):
        batch = collate(self, examples, indices, *rest, **options)
        found.extend(zip(indices, batch["labels"].tolist(), strict=True))
        return batch

    monkeypatch.setattr(TextClassificationTask, "collate", watched)
    knobs = {"teacher": classifier, "terms": "[{kind: soft_target}]", "costs": "false", "text_columns": "[one,two]"}
    assert run("distill_task", *words("nowhere", tmp_path / "run", **knobs, batch_size=8)) == 0
    assert len(found) > 24 and [(i, label) for i, label in found if label != i % 2] == []


def test_a_student_begins_with_the_layers_of_transformers_own_teacher(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    native = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE))
    teacher = save(tmp_path / "teacher", native, tokenizer)
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "type_vocab_size: 0, pooler: none, max_position_embeddings: 64}"
    knobs = {"teacher": teacher, "terms": "[{kind: soft_target}]", "model": model, "costs": "false"}
    knobs |= {"batch_tokens": 128, "vocab_size": None, "student_layers": "[1, 3]", "num_steps": 1}
    assert run("distill_pretrain", *words(data, tmp_path / "run", **knobs, learning_rate=1e-9)) == 0
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    for mine, number in zip(student.bert.layers, (1, 3), strict=True):
        own = mine.state_dict()["feed_forward.up_proj.weight"]
        given = native.bert.encoder.layer[number].intermediate.dense.weight
        torch.testing.assert_close(own, given, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", ["[]", "[1, 3]"])
def test_a_teacher_may_have_more_words_than_its_tokenizer(layers, data, tokenizer, tmp_path):
    config = TfmBertConfig(vocab_size=128, num_hidden_layers=4, **WIDE)
    teacher = save(tmp_path / "teacher", TfmBertForMaskedLM(config), tokenizer)
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "max_position_embeddings: 64}"
    knobs = {"teacher": teacher, "terms": "[{kind: soft_target}]", "costs": "false", "batch_tokens": 128}
    argv = words(data, tmp_path / "run", **knobs, model=model, student_layers=layers, num_steps=1)
    assert run("distill_pretrain", *argv) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.vocab_size == 128 > len(tokenizer)


@pytest.mark.parametrize("preset", ["distilbert_second", "tinybert4_intermediate", "tinybert4_prediction"])
def test_papers_presets_learn_numbers_too(preset, tokenizer, tmp_path):
    """STS-B, whose one output is compared by its squared error."""
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
    knobs = {"teacher": teacher, "costs": "false", "task": "stsb", "model": SMALL.replace("{", "{pooler: relu, ")}
    argv = words(tmp_path / "glue-{task}", tmp_path / "run", **knobs, num_epochs="null", warmup_ratio="null")
    assert run("distill_task", "--config", preset, *argv) == 0
    assert {row["name"] for row in record(tmp_path / "run").metrics} == {"pearson", "spearman"}


def test_a_cached_language_teacher_knows_the_masks_of_its_epochs(data, language_model, tmp_path):
    terms = "[{kind: soft_target}, {kind: label}]"
    common = {"teacher": language_model, "terms": terms, "batch_tokens": 128, "sequences": "rows"}
    common |= {"vocab_size": None, "num_steps": None, "num_epochs": 3, "final_weights": "last"}
    cache = {**common, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_pretrain", *words(data, tmp_path / "no", **cache, cache_epochs=2)) == 0
    assert run("distill_pretrain", *words(data, tmp_path / "cached", **cache)) == 0
    shutil.rmtree(tmp_path / "cached")
    with pytest.raises(ValueError, match="is the cache of another run: preprocessing"):
        run("distill_pretrain", *words(data, tmp_path / "other", **cache, seed=1))
    # A cache is of the texts that are learned from; others may score.
    shutil.copytree(data, tmp_path / "data")
    Dataset.from_parquet(str(data / "validation.parquet")).take(5).to_parquet(
        str(tmp_path / "data" / "validation.parquet")
    )
    assert run("distill_pretrain", *words(tmp_path / "data", tmp_path / "cached", **cache)) == 0


REFUSED = {
    "no_terms": ("distill_task", {"terms": "[]"}, "terms must have at least one"),
    "field": ("distill_task", {"terms": "[{kind: label, warmth: 1}]"}, "terms[0]: a term has no warmth; it has kind"),
    "no_kind": ("distill_task", {"terms": "[{weight: 1.0}]"}, "terms[0]: a term needs a kind"),
    "kind": ("distill_task", {"terms": "[{kind: warmth}]"}, "kind must be one of label, soft_target"),
    "layers_and_init": (
        "distill_task",
        {"student_layers": "[0]", "init_from": "x"},
        "give no student_layers beside it",
    ),
    "nowhere_to_write": ("distill_task", {"write_cache": "true"}, "write_cache needs cache"),
    "pairs": ("distill_pretrain", {"sequences": "pairs"}, 'sequences must be "packed" or "rows"'),
    "tokenizer": ("distill_pretrain", {"tokenizer": "x"}, "the tokenizer is the teacher's"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_knobs_that_do_not_fit_are_refused_at_once(name, tmp_path, capsys):
    recipe, knobs, message = REFUSED[name]
    given = {"teacher": "nowhere", "terms": "[{kind: soft_target}]", **knobs}
    with pytest.raises(SystemExit):
        run(recipe, *words(tmp_path / "nothing", tmp_path / "run", **given))
    assert message in capsys.readouterr().err


def test_terms_that_do_not_fit_the_models_are_refused(data, classifier, language_model, tmp_path):
    heads = SMALL.replace("num_attention_heads: 2", "num_attention_heads: 4")
    with pytest.raises(ValueError, match="term attention_score: student and teacher must have"):
        run("distill_task", *words(data, tmp_path / "run", teacher=classifier, terms=INNER, model=heads))
    with pytest.raises(ValueError, match=r"lacks the weights .*classifier\.bias"):
        run("distill_task", *words(data, tmp_path / "run", teacher=language_model, terms=INNER))
    with pytest.raises(ValueError, match=r"the teacher's accuracy is .* and should be 0.99"):
        argv = words(data, tmp_path / "run", teacher=classifier, terms=INNER, expected_score=0.99)
        run("distill_task", *argv)
    assert not (tmp_path / "run").exists()


def test_terms_of_a_command_line_take_the_place_of_a_presets():
    recipe = ROOT / "recipes" / "distill_task.py"
    kind = arguments_of(recipe)
    preset = parse_arguments(kind, recipe, ["--config", "quickstart"])
    given = parse_arguments(
        kind, recipe, ["--config", "quickstart", "--terms", "[{kind: soft_target}, {kind: label}]"]
    )
    assert [(t.weight, t.temperature) for t in preset.terms] == [(1.0, 2.0), (0.5, 1.0)]
    assert [(t.weight, t.temperature) for t in given.terms] == [(1.0, 1.0), (1.0, 1.0)]


def test_the_cache_names_its_recipes(capsys):
    assert run("distill_cache", "translation_train") == 2
    said = capsys.readouterr().err
    assert all(
        recipe in said.split("recipes: ")[1] for recipe in ("distill_pretrain", "distill_task", "distill_vision")
    )
