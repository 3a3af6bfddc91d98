"""Distillation of masked autoencoders: our own and native teachers, caches, resuming, and refused options."""

import json
import runpy

import pytest
import torch
from recipe_helpers import ROOT, fresh_state, history, record
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining
from vision_recipes import MAE, classify, command_line, distance, run, weights, write_images

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTForImageClassification
from hf_tfm.data.pixels import image_processor

FIELDS = {
    **{"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_intermediate_size": 32},
    **{"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "initializer_range": 0.2},
}
TERMS = "[{kind: hidden_state}, {kind: label}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_images(tmp_path_factory.mktemp("images"))


def save(folder, model):
    model.save_pretrained(folder)
    image_processor(16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)).save_pretrained(folder)
    return folder


OURS = pytest.mark.parametrize(
    "teacher", ["ours", pytest.param("transformers", marks=pytest.mark.slow)], indirect=True
)
NATIVE = pytest.mark.parametrize(
    "teacher", [pytest.param("ours", marks=pytest.mark.slow), "transformers"], indirect=True
)
BOTH = pytest.mark.parametrize("teacher", ["ours", "transformers"], indirect=True)


@pytest.fixture(scope="module")
def teacher(request, tmp_path_factory):
    """A model of 4 layers with random weights."""
    torch.manual_seed(0)
    if request.param == "ours":
        model = TfmMAEForPreTraining(TfmMAEConfig(**FIELDS))
    else:
        model = ViTMAEForPreTraining(ViTMAEConfig(**FIELDS))
    return save(tmp_path_factory.mktemp("teacher"), model)


def distil(data, output_dir, **options):
    return run("distill_mae", data, output_dir, **{"terms": TERMS, "costs": "false", **options})


@NATIVE
def test_autoencoder_learns_from_its_teacher(data, teacher, tmp_path):
    distil(data, tmp_path / "run", teacher=teacher, max_steps=20, eval_steps=5, costs="true", image_size=None)
    results = record(tmp_path / "run")
    assert [cost["model"] for cost in results.costs] == ["teacher", "student"]
    (row,) = results.metrics
    assert (row["split"], row["name"], row["value"]) == (
        "validation",
        "reconstruction_loss",
        results.costs[1]["score"],
    )
    found = [row["evaluation"] for row in history(tmp_path / "run") if "evaluation" in row]
    assert {"hidden_state", "patch", "loss", "reconstruction"} <= set(found[0])
    assert found[-1]["hidden_state"] < 0.8 * found[0]["hidden_state"]
    assert found[-1]["reconstruction"] == pytest.approx(found[-1]["patch"], rel=1e-5)
    assert not any("projections" in name for name in weights(tmp_path / "run"))


@BOTH
def test_student_and_teacher_see_the_same_patches(data, teacher, tmp_path):
    """A teacher with the student's weights gives a loss of zero."""
    same = {name: value for name, value in FIELDS.items() if name not in ("image_size", "initializer_range")}
    options = {"teacher": teacher, "student_layers": "[0, 1, 2, 3]", "model": json.dumps(same), "learning_rate": 1e-12}
    distil(data, tmp_path / "run", **options, terms="[{kind: hidden_state}]")
    (row,) = [row["evaluation"] for row in history(tmp_path / "run") if "evaluation" in row]
    assert row["loss"] < 1e-9


@OURS
def test_student_can_initialize_a_classifier(data, teacher, tmp_path):
    distil(data, tmp_path / "student", teacher=teacher)
    classify(data, tmp_path / "run", model_name_or_path=tmp_path / "student")
    model = TfmViTForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_hidden_layers == 2


@OURS
def test_cached_teacher_gives_the_same_weights(data, teacher, tmp_path, capsys):
    common = {"teacher": teacher, "max_steps": None, "num_train_epochs": 2, "terms": TERMS}
    distil(data, tmp_path / "online", **common)
    cache = {**common, "cache": tmp_path / "cache", "costs": "false"}
    written = command_line("distill_mae", data, tmp_path / "no", **cache, cache_dtype="fp32", cache_epochs=2)
    fresh_state()
    assert runpy.run_path(str(ROOT / "recipes" / "distill_cache.py"))["main"](["distill_mae", *written]) == 0
    assert "48 samples" in capsys.readouterr().out
    distil(data, tmp_path / "cached", **cache)
    assert distance(tmp_path / "online", tmp_path / "cached", key_biases=False) < 1e-5


@OURS
def test_resumed_run_equals_uninterrupted_run(data, teacher, tmp_path):
    options = {"teacher": teacher, "lr_scheduler_type": "constant", "eval_steps": 2}
    distil(data, tmp_path / "whole", **options, max_steps=4)
    distil(data, tmp_path / "cut", **options, max_steps=2)
    distil(data, tmp_path / "cut", **options, max_steps=4)
    assert distance(tmp_path / "whole", tmp_path / "cut") == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "[{kind: soft_target}]"}, "terms must not have soft_target: a masked autoencoder predicts pixels"),
        ({"metric_for_best_model": "accuracy"}, 'metric_for_best_model must be "loss"'),
        ({"cache": "x", "repeats": 2}, "turn repeats off"),
        ({"model": "{image_size: 8}"}, "model.image_size is not a field"),
    ],
)
def test_incompatible_options_are_refused_at_once(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distil(tmp_path / "nothing", tmp_path / "run", teacher="nowhere", **options)
    assert message in capsys.readouterr().err


@OURS
def test_options_incompatible_with_the_teacher_are_refused(data, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"model.mask_ratio must be the teacher's, 0.75, got 0.5"):
        distil(data, tmp_path / "run", teacher=teacher, model=MAE.replace("}", ", mask_ratio: 0.5}"))
    with pytest.raises(ValueError, match=r"model.patch_size must be the teacher's, 4, got 8"):
        distil(data, tmp_path / "run", teacher=teacher, model=MAE.replace("patch_size: 4", "patch_size: 8"))
    with pytest.raises(ValueError, match=r"the teacher's loss is .* and should be 0.001"):
        distil(data, tmp_path / "run", teacher=teacher, expected_score=0.001)
    classifier = save(tmp_path / "vit", ViTForImageClassification(ViTConfig(image_size=16, patch_size=4)))
    with pytest.raises(
        ValueError, match=r"is a vit model; distilling a masked autoencoder needs one of tfm_mae, vit_mae"
    ):
        distil(data, tmp_path / "run", teacher=classifier)
    assert not (tmp_path / "run").exists()
