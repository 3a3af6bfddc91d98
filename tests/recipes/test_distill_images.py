"""Distillation of image models: teachers and terms for a few steps, caches, and refused options."""

import runpy

import pytest
import torch
from recipe_helpers import ROOT, fresh_state, history, record
from timm import create_model
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from vision_recipes import CLASSES, distance, weights, write_images

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.data.pixels import image_processor

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
SMALL = "patch_size: 4, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
SCALE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}


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
        "lr_scheduler_type": "cosine",
        "batch_size": 8,
        "learning_rate": 0.01,
        "augmentation": "{crop: pad, padding: 2, flip: 0.5}",
        "size": "tiny",
        "terms": "[{kind: soft_target, temperature: 2.0}, {kind: label, weight: 0.5}]",
        "progress": "false",
        "final_weights": "last",
        **({} if "model_name_or_path" in options else {"model": f"{{{SMALL}}}"}),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def distil(data, output_dir, **options):
    assert run("distill_vision", *command_line(data, output_dir, **options)) == 0
    fresh_state()
    return output_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_images(tmp_path_factory.mktemp("images"))


def save(folder, model, **fields):
    model.save_pretrained(folder)
    image_processor(16, **(SCALE | fields)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One of our models with 4 layers and random weights."""
    torch.manual_seed(0)
    model = TfmViTForImageClassification(TfmViTConfig(num_hidden_layers=4, initializer_range=0.2, **WIDE, **NAMES))
    return save(tmp_path_factory.mktemp("teacher"), model)


TERMS = {
    "soft_and_label": "[{kind: soft_target, temperature: 2.0}, {kind: label, weight: 0.5}]",
    "inner_layers": "[{kind: embedding}, {kind: hidden_state}, {kind: attention_score}, {kind: soft_target}]",
    "hard": "[{kind: hard_target, weight: 0.5}, {kind: label, weight: 0.5}]",
}


@pytest.mark.parametrize("name", ["soft_and_label", "inner_layers", pytest.param("hard", marks=pytest.mark.slow)])
def test_classifier_learns_from_its_teacher(name, data, teacher, tmp_path):
    distil(data, tmp_path / "run", teacher=teacher, terms=TERMS[name], test_splits="[test]")
    results = record(tmp_path / "run")
    assert [cost["model"] for cost in results.costs] == ["teacher", "student"]
    ours = results.costs[1]
    assert ours["parameters"] == results.parameters < results.costs[0]["parameters"]
    rows = {(row["split"], row["name"]): row["value"] for row in results.metrics}
    assert set(rows) == {("validation", "accuracy"), ("test", "accuracy")}
    assert rows["validation", "accuracy"] == ours["score"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == NAMES["id2label"] and model.config.image_size in (16, [16, 16], (16, 16))
    assert not [key for key in weights(tmp_path / "run") if "projection" in key and "patch" not in key]
    assert "distillation" in history(tmp_path / "run")[-1]["evaluation"]


def test_student_agrees_with_its_teacher(data, teacher, tmp_path):
    options = {"teacher": teacher, "terms": "[{kind: soft_target}]", "costs": "false", "eval_steps": 5}
    options |= {
        "max_steps": 30,
        "lr_scheduler_type": "constant",
        "augmentation": "{crop: none, flip: 0}",
        "learning_rate": 0.003,
    }
    distil(data, tmp_path / "run", **options, validation_split="train", batch_size=24)
    losses = [row["evaluation"]["distillation"] for row in history(tmp_path / "run") if "evaluation" in row]
    assert losses[-1] < losses[0] / 2


def test_half_precision_teacher_is_scored_before_and_after(data, teacher, tmp_path):
    distil(data, tmp_path / "run", teacher=teacher, teacher_dtype="bf16", expected_score=9.0, teacher_device="cpu")
    assert [cost["model"] for cost in record(tmp_path / "run").costs] == ["teacher", "student"]


def test_deit_heads_learn_from_labels_and_teacher(data, teacher, tmp_path):
    """Each head has its own term and is unchanged without it (Touvron et al. 2021, equation 3)."""
    label, hard = "{kind: label, output: cls_logits, weight: 0.5}", "{kind: hard_target, output: distillation_logits}"
    soft = "{kind: soft_target, output: cls_logits}"
    model = {
        "model": f"{{{SMALL}, distillation_token: true}}",
        "costs": "false",
        "max_steps": 2,
        "lr_scheduler_type": "constant",
    }
    begun = distil(data, tmp_path / "begun", teacher=teacher, terms=f"[{label}, {hard}]", **model, learning_rate=1e-12)
    both = distil(data, tmp_path / "both", teacher=teacher, terms=f"[{label}, {hard}]", **model)
    one = distil(data, tmp_path / "one", teacher=teacher, terms=f"[{soft}]", **model)
    start, joint, single = (weights(folder) for folder in (begun, both, one))
    assert not torch.allclose(joint["classifier.weight"], start["classifier.weight"], atol=1e-4)
    assert not torch.allclose(
        joint["distillation_classifier.weight"], start["distillation_classifier.weight"], atol=1e-4
    )
    assert torch.allclose(single["distillation_classifier.weight"], start["distillation_classifier.weight"], atol=1e-6)
    assert AutoModelForImageClassification.from_pretrained(both).config.distillation_token
    with pytest.raises(ValueError, match="gives no distillation_logits"):
        distil(data, tmp_path / "none", teacher=teacher, terms=f"[{hard}]", costs="false")


def test_timm_teacher(data, tmp_path):
    """The student's processor adopts the normalization of timm's configuration."""
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="test_resnet", **NAMES)
    wrapped = TimmWrapperForImageClassification(config)
    config.pretrained_cfg = {**create_model("test_resnet").pretrained_cfg, "input_size": [3, 32, 32]}
    config.pretrained_cfg |= {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    wrapped.save_pretrained(tmp_path / "teacher")
    distil(data, tmp_path / "run", teacher=tmp_path / "teacher", mixing="{mixup: 0.8, cutmix: 1.0}")
    saved = image_processor(32).from_pretrained(tmp_path / "run")
    assert (list(saved.image_mean), saved.size.height) == ([0.1, 0.2, 0.3], 32)


def test_student_is_initialized_from_native_layers(data, tmp_path):
    torch.manual_seed(0)
    teacher = ViTForImageClassification(ViTConfig(num_hidden_layers=4, **WIDE, **NAMES)).eval()
    save(tmp_path / "teacher", teacher)
    model = "{patch_size: 4, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2}"
    options = {"student_layers": "[1, 3]", "model": model, "max_steps": 1, "learning_rate": 1e-9, "costs": "false"}
    distil(data, tmp_path / "run", teacher=tmp_path / "teacher", **options)
    source = TfmViTForImageClassification.from_pretrained(tmp_path / "teacher").state_dict()
    student, moved = weights(tmp_path / "run"), {"layers.0.": "layers.1.", "layers.1.": "layers.3."}
    for name, value in student.items():
        origin = next((name.replace(own, given) for own, given in moved.items() if own in name), name)
        torch.testing.assert_close(value, source[origin], rtol=0, atol=1e-6)


def test_cached_teacher_gives_the_same_weights(data, teacher, tmp_path, capsys):
    terms = "[{kind: hidden_state}, {kind: soft_target}, {kind: label}]"
    common = {
        "teacher": teacher,
        "terms": terms,
        "max_steps": None,
        "num_train_epochs": 2,
    }
    distil(data, tmp_path / "online", **common)
    cache = {**common, "cache": tmp_path / "cache"}
    written = command_line(data, tmp_path / "no", **cache, cache_dtype="fp32", cache_epochs=2)
    assert run("distill_cache", "distill_vision", *written) == 0
    assert "48 samples" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()
    distil(data, tmp_path / "cached", **cache, dataloader_num_workers=1)
    assert distance(tmp_path / "online", tmp_path / "cached", key_biases=False) < 1e-5
    with pytest.raises(ValueError, match="is the cache of another run: preprocessing"):
        run("distill_vision", *command_line(data, tmp_path / "other", **cache, seed=1))


def test_streaming(data, teacher, tmp_path):
    distil(data, tmp_path / "run", teacher=teacher, streaming="true", costs="false")
    assert record(tmp_path / "run").training["steps"] == 3


@pytest.mark.slow  # test_distill_mae.py and tests/distillation/test_distillation_run.py
def test_resumed_run_equals_uninterrupted_run(data, teacher, tmp_path):
    options = {"teacher": teacher, "terms": TERMS["inner_layers"], "lr_scheduler_type": "constant", "eval_steps": 2}
    options |= {"costs": "false", "mixing": "{mixup: 0.8}"}
    distil(data, tmp_path / "whole", **options, max_steps=4)
    distil(data, tmp_path / "cut", **options, max_steps=2)
    distil(data, tmp_path / "cut", **options, max_steps=4)
    assert distance(tmp_path / "whole", tmp_path / "cut") == 0.0


REFUSED = {
    "no_terms": ({"terms": "[]"}, "terms must not be empty"),
    "mixing": (
        {"cache": "x", "mixing": "{mixup: 0.8}"},
        "cache keeps one view of each image in an epoch: turn mixing",
    ),
    "repeats": ({"cache": "x", "repeats": 2}, "turn repeats off"),
    "field": ({"model": "{image_size: 8}"}, "model.image_size is not a field"),
    "metric": ({"metric_for_best_model": "AP"}, 'metric_for_best_model must be "loss" or "accuracy"'),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_incompatible_options_are_refused_at_once(name, tmp_path, capsys):
    options, message = REFUSED[name]
    with pytest.raises(SystemExit):
        run("distill_vision", *command_line(tmp_path / "nothing", tmp_path / "run", teacher="nowhere", **options))
    assert message in capsys.readouterr().err


def test_options_incompatible_with_the_teacher_are_refused(data, teacher, tmp_path):
    def attempt(**options):
        run("distill_vision", *command_line(data, tmp_path / "run", **{"teacher": teacher, **options}))

    with pytest.raises(ValueError, match="the same size in their image processors"):
        attempt(image_size=32)
    with pytest.raises(ValueError, match="the same image_mean in their image processors"):
        attempt(mean="[0.1, 0.1, 0.1]", std="[0.2, 0.2, 0.3]")
    with pytest.raises(ValueError, match="the same image_std in their image processors"):
        other = save(tmp_path / "other", AutoModelForImageClassification.from_pretrained(teacher), std=(0.1, 0.1, 0.1))
        attempt(model_name_or_path=other)
    with pytest.raises(ValueError, match=r"the teacher's accuracy is .* and should be 0.99"):
        attempt(expected_score=0.99, metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match=r'label maps differ: class 0 is "ant" for the student, "bee" for the teach'):
        config = TfmViTConfig(num_hidden_layers=1, id2label={0: "bee", 1: "ant", 2: "cat"}, **WIDE)
        attempt(teacher=save(tmp_path / "turned", TfmViTForImageClassification(config)))
    with pytest.raises(ValueError, match="has no image processor"):
        AutoModelForImageClassification.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
        attempt(teacher=tmp_path / "bare")
    assert not (tmp_path / "run").exists()
