"""Cached signals of a text teacher give the same losses without the teacher; refused caches."""

import shutil

import pytest
import torch
from datasets import Dataset
from distill_text_recipes import command_line, run
from recipe_helpers import record
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

CACHED = {"terms": "[{kind: soft_target}]", "batch_size": 8}


@pytest.mark.slow  # as with the language model below, and in test_distill_images.py
def test_cached_teacher_gives_the_same_weights(data, classifier, tmp_path, capsys):
    terms = "[{kind: hidden_state}, {kind: soft_target}, {kind: label}]"
    common = {
        "teacher": classifier,
        "terms": terms,
        "mixed_precision": "no",
        "dataloader_num_workers": 1,
        "final_weights": "last",
    }
    assert run("distill_task", *command_line(data, tmp_path / "online", **common)) == 0
    cache = {**common, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_task", *command_line(data, tmp_path / "no", **cache, cache_dtype="fp32")) == 0
    assert "40 samples" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()
    assert run("distill_task", *command_line(data, tmp_path / "cached", **cache)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("online", "cached"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="is the cache of another run: preprocessing"):
        run("distill_task", *command_line(data, tmp_path / "other", **cache, max_length=4))


def own_teacher(folder, classifier):
    """A copy that a test may modify."""
    return shutil.copytree(classifier, folder)


@pytest.mark.parametrize("measured", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_cached_run_needs_no_teacher_weights(measured, data, classifier, tmp_path):
    teacher = own_teacher(tmp_path / "teacher", classifier)
    options = {**CACHED, "teacher": teacher, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_task", *command_line(data, tmp_path / "no", **options, costs=measured)) == 0
    (teacher / "model.safetensors").unlink()
    assert run("distill_task", *command_line(data, tmp_path / "run", **options)) == 0
    costs = record(tmp_path / "run").costs
    if measured == "false":
        assert [cost["model"] for cost in costs] == ["student"]
        return
    theirs, ours = costs
    assert theirs["parameters"] > ours["parameters"] and ours["kept"] == ours["score"] / theirs["score"]
    # The teacher's score on other texts is unknown.
    assert run("distill_task", *command_line(data, tmp_path / "other", **options, validation_split="train")) == 0
    theirs, ours = record(tmp_path / "other").costs
    assert "score" not in theirs and "kept" not in ours


def test_cache_of_another_teacher_is_refused(data, classifier, tmp_path):
    options = {**CACHED, "cache": tmp_path / "cache", "costs": "false"}
    assert (
        run("distill_cache", "distill_task", *command_line(data, tmp_path / "no", teacher=classifier, **options)) == 0
    )
    same = own_teacher(tmp_path / "same", classifier)
    assert run("distill_task", *command_line(data, tmp_path / "run", teacher=same, **options)) == 0
    other = own_teacher(tmp_path / "other", classifier)
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.bias[0] += 1.0
    model.save_pretrained(other)
    for change in (lambda: None, (other / "model.safetensors").unlink):
        change()
        with pytest.raises(ValueError, match=rf"of another run: teacher {classifier} there, {other} now$"):
            run(
                "distill_task",
                *command_line(data, tmp_path / "run", teacher=other, **options, overwrite_output_dir="true"),
            )


def test_a_cache_depends_on_the_options_that_affect_its_contents(data, classifier, tmp_path):
    """All texts are shorter than both values of max_length, so the samples themselves do not differ."""
    options = {**CACHED, "teacher": classifier, "cache": tmp_path / "cache", "costs": "false"}
    assert run("distill_cache", "distill_task", *command_line(data, tmp_path / "no", **options)) == 0
    with pytest.raises(ValueError, match="is the cache of another run: max_length 16 there, 18 now"):
        run("distill_task", *command_line(data, tmp_path / "run", **options, max_length=18))


def test_unusable_top_k_cache_is_refused_before_it_is_written(data, classifier, tmp_path):
    options = {"teacher": classifier, "cache": tmp_path / "cache", "cache_top_k": 1}
    argv = command_line(data, tmp_path / "no", **options, terms="[{kind: logit}]")
    with pytest.raises(ValueError, match=r"term logit needs all logits, .* has top_k=1"):
        run("distill_cache", "distill_task", *argv)
    argv = command_line(data, tmp_path / "no", **options | {"cache_top_k": 2}, terms="[{kind: soft_target}]")
    with pytest.raises(ValueError, match="top_k must be below the 2 classes, got 2"):
        run("distill_cache", "distill_task", *argv)
    assert not (tmp_path / "cache").exists()


def test_cached_language_teacher_reuses_the_masks_of_its_epochs(data, language_model, tmp_path):
    terms = "[{kind: soft_target}, {kind: label}]"
    common = {"teacher": language_model, "terms": terms, "batch_tokens": 128, "sequences": "rows"}
    common |= {"vocab_size": None, "max_steps": None, "num_train_epochs": 3, "final_weights": "last"}
    cache = {**common, "cache": tmp_path / "cache"}
    assert run("distill_cache", "distill_pretrain", *command_line(data, tmp_path / "no", **cache, cache_epochs=2)) == 0
    assert run("distill_pretrain", *command_line(data, tmp_path / "cached", **cache)) == 0
    shutil.rmtree(tmp_path / "cached")
    with pytest.raises(ValueError, match="is the cache of another run: preprocessing"):
        run("distill_pretrain", *command_line(data, tmp_path / "other", **cache, seed=1))
    # The cache covers only the training texts; validation texts may change.
    shutil.copytree(data, tmp_path / "data")
    Dataset.from_parquet(str(data / "validation.parquet")).take(5).to_parquet(
        str(tmp_path / "data" / "validation.parquet")
    )
    assert run("distill_pretrain", *command_line(tmp_path / "data", tmp_path / "cached", **cache)) == 0


def test_distill_cache_lists_its_recipes(capsys):
    assert run("distill_cache", "translation_train") == 2
    printed = capsys.readouterr().err
    assert all(
        recipe in printed.split("available: ")[1] for recipe in ("distill_pretrain", "distill_task", "distill_vision")
    )
