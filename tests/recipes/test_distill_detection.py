"""Distillation of DETR: terms, smaller students, native teachers, caches, and refused options."""

import runpy

import pytest
import torch
import yaml
from recipe_helpers import ROOT, fresh_state, history, record
from scene_recipes import MODEL, command_line, scenes, train, write_hub
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from vision_recipes import distance, weights

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.conversion import convert
from hf_tfm.data.digit_scenes import THINGS

QUERIES = "[{kind: query, temperature: 2.0}, {kind: label}]"
SHALLOW = MODEL.replace("decoder_layers: 2", "decoder_layers: 1")
NARROW = SHALLOW.replace("d_model: 32", "d_model: 16").replace("num_queries: 9", "num_queries: 6")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_hub(tmp_path_factory.mktemp("scenes") / "hub", scenes())


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """Four decoder layers, trained for one step."""
    model = MODEL.replace("decoder_layers: 2", "decoder_layers: 4")
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return train(data, folder, model=f"{{{model}}}", max_steps=1, mean="[0.5, 0.4, 0.3]", std="[0.2, 0.2, 0.3]")


def distil(data, output_dir, recipe="distill_detection", **options):
    given = {"model": f"{{{SHALLOW}}}", "terms": QUERIES, "costs": "false", "num_pictures": 0, **options}
    fresh_state()
    script = str(ROOT / "recipes" / f"{recipe.split()[0]}.py")
    assert runpy.run_path(script)["main"]([*recipe.split()[1:], *command_line(data, output_dir, **given)]) == 0
    fresh_state()
    return output_dir


INNER = """[{kind: hidden_state, stack: decoder, layers: {1: 4}}, {kind: attention_score, stack: encoder},
    {kind: feature_map, layers: {model.input_projection: model.input_projection}}, {kind: query}]"""
STUDENTS = {
    "fewer_layers": {},
    "narrower": {"model": f"{{{NARROW}}}"},
    "inner_states": {"terms": INNER.replace("\n", "")},
}


@pytest.mark.parametrize("name", [pytest.param("fewer_layers", marks=pytest.mark.slow), "narrower", "inner_states"])
def test_detector_learns_from_its_teacher(name, data, teacher, tmp_path):
    costs = "true" if name == "narrower" else "false"
    distil(data, tmp_path / "run", teacher=teacher, **STUDENTS[name], costs=costs, num_pictures=1)
    results = record(tmp_path / "run")
    assert {row["split"] for row in results.metrics} == {"validation", "test"}
    assert {"AP", "loss", "distillation"} <= history(tmp_path / "run")[-1]["evaluation"].keys()
    assert list((tmp_path / "run" / "predictions").glob("*.png"))
    if costs == "true":
        theirs, ours = results.costs
        assert ours["parameters"] == results.parameters < theirs["parameters"] and ours["gflops"] < theirs["gflops"]
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert model.config.decoder_layers == 1
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "run").image_mean) == [0.5, 0.4, 0.3]
    assert not [key for key in weights(tmp_path / "run") if "projections" in key]


@pytest.mark.parametrize("layers", [pytest.param("[3]", marks=pytest.mark.slow), "{decoder: [3], encoder: [0]}"])
def test_student_is_initialized_from_decoder_layers(layers, data, teacher, tmp_path):
    options = {"teacher": teacher, "student_layers": layers, "max_steps": 1, "learning_rate": 1e-9}
    student, source = weights(distil(data, tmp_path / "run", **options)), weights(teacher)
    assert any("decoder.layers.0." in name for name in student)
    for name, value in student.items():
        origin = name.replace("decoder.layers.0.", "decoder.layers.3.")
        torch.testing.assert_close(value, source[origin], rtol=0, atol=1e-6)


@pytest.mark.slow  # tests/evaluation/test_evaluation_detection.py has the same two limits
def test_student_is_its_teacher_with_clustered_attention(data, teacher, tmp_path):
    """It starts with the teacher's weights, and what it learns from is the difference that its clusters make."""
    losses = []
    for number, width in enumerate((1e-3, 1e6)):  # clusters of one cell, and one cluster
        attention = f"encoder_attention: clustered, encoder_attention_kwargs: {{rounds: 64, width: {width}}}"
        options = {"model": f"{{{attention}}}", "model_name_or_path": teacher, "teacher": teacher, "max_steps": 1}
        options |= {"terms": "[{kind: hidden_state, stack: encoder, layers: final}]", "learning_rate": 1e-9}
        folder = distil(data, tmp_path / str(number), **options)
        losses.append(history(folder)[-1]["evaluation"]["distillation"])
    assert 0 <= losses[0] < 1e-6 < 1e-4 < losses[1]
    student = TfmDetrForObjectDetection.from_pretrained(folder)
    assert student.config.encoder_attention == "clustered"
    assert student.config.encoder_attention_kwargs == {"rounds": 64, "width": 1e6}
    for name, value in weights(teacher).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=1e-6)


def test_native_teacher_gives_the_same_losses(data, teacher, tmp_path):
    torch.manual_seed(0)
    fields = yaml.safe_load(f"{{{MODEL}}}") | {"backbone_norm": "frozen", "num_labels": 10}
    fields |= {"id2label": dict(enumerate(THINGS)), "label2id": {name: i for i, name in enumerate(THINGS)}}
    TfmDetrForObjectDetection(TfmDetrConfig(**fields)).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "detr", tmp_path / "native")
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path / "native")).__name__ == "DetrForObjectDetection"
    found = []
    for name in ("ours", "native"):
        AutoImageProcessor.from_pretrained(teacher).save_pretrained(tmp_path / name)
        found.append(distil(data, tmp_path / f"of_{name}", teacher=tmp_path / name))
    assert distance(*found, key_biases=False) < 1e-5


@pytest.mark.slow  # tests/distillation/test_signal_cache.py, with detection's task
def test_cached_teacher_gives_the_same_weights(data, teacher, tmp_path, capsys):
    common = {"teacher": teacher, "max_steps": None, "num_train_epochs": 2, "dataloader_num_workers": 1}
    common["augmentation"] = "{scales: [64], max_size: 90, crop: 0.0, flip: 0.5}"
    distil(data, tmp_path / "online", **common)
    cache = {**common, "cache": tmp_path / "cache"}
    written = {"cache_dtype": "fp32", "cache_epochs": 2}
    distil(data, tmp_path / "no", "distill_cache distill_detection", **cache, **written)
    assert "28 samples" in capsys.readouterr().out and not (tmp_path / "no").exists()
    distil(data, tmp_path / "cached", **cache)
    assert distance(tmp_path / "online", tmp_path / "cached", key_biases=False) < 1e-5
    # After its last epoch a cache starts over with the same steps, each of which drops its own scenes.
    distil(data, tmp_path / "longer", **{**cache, "num_train_epochs": 3})
    assert record(tmp_path / "longer").training["epochs"] == 3


@pytest.mark.slow  # tests/distillation/test_distillation_run.py
def test_resumed_run_equals_uninterrupted_run(data, teacher, tmp_path):
    options = {"teacher": teacher, "lr_scheduler_type": "constant", "eval_steps": 2}
    distil(data, tmp_path / "whole", **options, max_steps=4)
    distil(data, tmp_path / "cut", **options, max_steps=2)
    distil(data, tmp_path / "cut", **options, max_steps=4)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_incompatible_options_are_refused(data, teacher, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distil(data, tmp_path / "run", teacher=teacher, metric_for_best_model="accuracy")
    assert 'metric_for_best_model must be "loss", "AP" or "AP50"' in capsys.readouterr().err
    with pytest.raises(ValueError, match="the same image_mean in their image processors"):
        distil(data, tmp_path / "run", teacher=teacher, mean="[0.1, 0.1, 0.1]")
    with pytest.raises(
        ValueError, match=r"layers of the decoder must be in \[0, 4\), the number of the teacher's layers, got 6"
    ):
        distil(data, tmp_path / "run", teacher=teacher, student_layers="[6]")
    with pytest.raises(ValueError, match="a cache needs images of one size"):
        distil(data, tmp_path / "run", teacher=teacher, cache=tmp_path / "cache", write_cache="true")
    with pytest.raises(ValueError, match='use kind "query"'):
        distil(data, tmp_path / "run", teacher=teacher, terms="[{kind: soft_target}]")
    with pytest.raises(ValueError, match=r"the teacher's AP is .* and should be 0.9"):
        distil(data, tmp_path / "run", teacher=teacher, expected_score=0.9, metric_for_best_model="AP")
    assert not (tmp_path / "run").exists()
