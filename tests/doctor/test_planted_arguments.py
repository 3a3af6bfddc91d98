"""Arguments and models that cannot work are found before a run; unusual ones get a warning."""

import pytest
import torch
from planted import MODEL, OPTIONS, as_splits, examine, healthy, only
from safetensors.torch import load_file, save_file

from hf_tfm import TfmDetrForObjectDetection
from hf_tfm.doctor import detection, weights
from hf_tfm.doctor.splits import Case

ARGUMENT_FAULTS = {
    "queries": (
        {"model": MODEL.replace("num_queries: 10", "num_queries: 40") + "}"},
        "box_count",
        "warning",
        "40 quer",
    ),
    "rate": (
        {"learning_rate": 0.05},
        "learning_rate",
        "failed",
        "0.05 for the Transformer, 0.05 for the backbone, 8 im",
    ),
    "high rate": ({"learning_rate": 0.005}, "learning_rate", "warning", "(limits: 1.3e-06 to 0.004)"),
    "tiny rate": (
        {"learning_rate": 1e-8},
        "learning_rate",
        "failed",
        "1.3e-05 and 1.3e-06 by linear scaling",
    ),
    "rate of a batch": (
        {"learning_rate": "null", "base_learning_rate": 4},
        "learning_rate",
        "failed",
        "0.12 for the T",
    ),
    "sgd": ({"optimizer": "sgd"}, "learning_rate", "warning", "per step, sgd"),
    "slow backbone": (
        {"rate_factors": "{backbone: 0.1}"},
        "learning_rate",
        "warning",
        "has random weights",
    ),
    "part": ({"rate_factors": "{backbon_: 0.1}"}, "learning_rate", "failed", "no trained weight has backbon_ in"),
    "warm-up": ({"warmup_steps": 6000}, "schedule", "failed", "6000 steps, 2000 epochs of 24 images; warm-up 6000"),
    "brief": ({"num_train_epochs": 20, "warmup_steps": 0}, "schedule", "warning", "60 steps"),
    "no clipping": ({"max_grad_norm": 0}, "gradient_clipping", "warning", "gradients are not clipped"),
    "loose clipping": ({"max_grad_norm": 2.0}, "gradient_clipping", "warning", "max_grad_norm 2 (limit: at most 1)"),
    "last layer": (
        {"model": MODEL + ", auxiliary_loss: false}"},
        "auxiliary_loss",
        "warning",
        "only the last decoder layer",
    ),
}


@pytest.mark.parametrize("name", ARGUMENT_FAULTS)
def test_a_planted_argument_is_found(name, monkeypatch):
    options, check, level, said = ARGUMENT_FAULTS[name]
    found = only(examine(monkeypatch, as_splits(healthy()), **options), check, level)
    assert said in found.message
    assert found.remedy


def test_a_random_model_with_frozen_norms_is_refused_as_the_recipe_does(capsys):
    with pytest.raises(SystemExit) as ended:
        detection.main(["--config", "digits", "--model.backbone_norm", "frozen"])
    assert ended.value.code == 2
    assert 'model.backbone_norm "frozen" is for pretrained weights' in capsys.readouterr().err


def test_a_large_backbone_without_a_training_is_told(monkeypatch):
    monkeypatch.setattr(weights, "LARGE_BACKBONE", 1000)
    found = only(examine(monkeypatch, as_splits(healthy())), "fresh_weights", "warning")
    assert "of them in the backbone (limit: 0.001 million)" in found.message
    pretrained = examine(monkeypatch, as_splits(healthy()), pretrained_backbone="true", model=frozen())
    assert "in timm's pretrained backbone, the rest random" in only(pretrained, "fresh_weights", "ok").message
    assert "with timm's statistics" in only(pretrained, "frozen_norms", "ok").message


# --- a model to go on from


def frozen() -> str:
    return MODEL + ", backbone_norm: frozen}"


def case_of(data, monkeypatch, **options) -> Case:
    """What is examined, with its model."""
    examine(monkeypatch, data, **options)
    _, args, _ = detection.parse([word for k, v in (OPTIONS | options).items() for word in (f"--{k}", str(v))])
    case = Case(args, detection.read_splits(args))
    weights.add_model(case)
    return case


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A saved model of the planted data's classes."""
    model = case_of(as_splits(healthy()), monkeypatch).model
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def go_on(monkeypatch, folder, names=None, **options):
    """What is found where a run goes on from a model."""
    data = as_splits(healthy(), names=names)
    return examine(monkeypatch, data, **{"model": "{}", "model_name_or_path": str(folder), **options})


def test_a_model_of_the_same_classes_passes(trained, monkeypatch):
    found = go_on(monkeypatch, trained, **{"rate_factors": "{backbone: 0.1}"})
    assert {finding.level for finding in found} == {"ok"}
    assert "3 classes of the data, in the same order" in only(found, "model_classes", "ok").message
    assert " come from " in only(found, "fresh_weights", "ok").message


def test_a_model_with_another_order_of_classes_is_found(trained, monkeypatch):
    names = ["green", "red", "blue"]
    found = only(go_on(monkeypatch, trained, {"train": names, "validation": names}), "model_classes")
    assert 'class 0 is "red" in the model and "green" in the data' in found.message
    assert found.sample.image_id == 100


def test_a_model_of_other_classes_is_told(trained, monkeypatch):
    found = go_on(monkeypatch, trained, {"train": ["ant", "bee", "cat"], "validation": ["ant", "bee", "cat"]})
    assert "the class layer is initialised randomly" in only(found, "model_classes", "warning").message
    assert "are randomly initialised: class_labels_classifier" in only(found, "fresh_weights", "ok").message
    assert not [finding for finding in found if finding.level == "failed"]


def test_more_queries_start_anew_and_fewer_are_the_first(trained, monkeypatch):
    found = go_on(monkeypatch, trained, model="{num_queries: 12}")
    assert "are randomly initialised: model.query_position_embeddings" in only(found, "fresh_weights", "ok").message
    found = go_on(monkeypatch, trained, model="{num_queries: 8}")
    assert "randomly initialised" not in only(found, "fresh_weights", "ok").message


def keep(folder, prefix):
    """Leave in a model's file the weights whose names begin with ``prefix``."""
    file = folder / "model.safetensors"
    values = {name: value for name, value in load_file(file).items() if name.startswith(prefix)}
    save_file(values, file, metadata={"format": "pt"})


def test_a_model_without_heads_is_found(trained, monkeypatch):
    keep(trained, "model.")
    found = only(go_on(monkeypatch, trained), "fresh_weights", "warning")
    assert "bbox_predictor" in found.message and "randomly initialised" in found.message


def test_a_model_that_is_a_backbone_alone_is_found(trained, monkeypatch):
    """A run of it is refused, so the doctor fails too."""
    keep(trained, "model.backbone.")
    found = only(go_on(monkeypatch, trained), "model")
    assert "it has no weights for model.decoder" in found.message and "they would be random" in found.message


def test_frozen_norms_of_no_training_are_found(tmp_path, monkeypatch, trained):
    model = TfmDetrForObjectDetection.from_pretrained(trained, backbone_norm="frozen", ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "idle")
    assert "have mean 0 and variance 1" in only(go_on(monkeypatch, tmp_path / "idle"), "frozen_norms").message
    norms = [module for module in model.modules() if isinstance(module, weights.FrozenBatchNorm)]
    with torch.no_grad():
        norms[0].running_mean.normal_()
    model.save_pretrained(tmp_path / "used")
    assert "with statistics" in only(go_on(monkeypatch, tmp_path / "used"), "frozen_norms", "ok").message


def test_a_trained_backbone_that_learns_fast_is_told(trained, monkeypatch):
    found = only(go_on(monkeypatch, trained), "learning_rate", "warning")
    assert "the backbone is pretrained but has the same learning rate" in found.message


def test_a_model_that_is_not_there_is_one_failed_check(tmp_path, monkeypatch):
    found = go_on(monkeypatch, tmp_path / "nowhere")[-1]
    assert (found.check, found.level) == ("model", "failed")
    assert "nowhere" in found.message


def test_a_model_that_does_not_fit_is_found(trained, monkeypatch):
    found = only(go_on(monkeypatch, trained, model="{d_model: 32}"), "model")
    assert "do not fit" in found.message


def test_the_table_of_faults_is_that_of_the_tests():
    from fault_table import FILE, text

    assert FILE.read_text(encoding="utf-8") == text()
