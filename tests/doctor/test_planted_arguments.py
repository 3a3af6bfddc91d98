"""Arguments and models that cannot work are found before a run; unusual ones give a warning."""

import pytest
import torch
from planted import MODEL, OPTIONS, as_splits, examine, healthy, only
from safetensors.torch import load_file, save_file

from hf_tfm import TfmDetrForObjectDetection
from hf_tfm.doctor import detection, weights
from hf_tfm.doctor.splits import Case

ARGUMENT_FAULTS = {
    "too many queries": (
        {"model": MODEL.replace("num_queries: 10", "num_queries: 40") + "}"},
        "box_count",
        "warning",
        "40 quer",
    ),
    "very high learning rate": (
        {"learning_rate": 0.05},
        "learning_rate",
        "failed",
        "0.05 for the Transformer, 0.05 for the backbone, 8 im",
    ),
    "high learning rate": ({"learning_rate": 0.005}, "learning_rate", "warning", "(limits: 1.3e-06 to 0.004)"),
    "very low learning rate": (
        {"learning_rate": 1e-8},
        "learning_rate",
        "failed",
        "1.3e-05 and 1.3e-06 by linear scaling",
    ),
    "very high base learning rate": (
        {"learning_rate": "null", "base_learning_rate": 4},
        "learning_rate",
        "failed",
        "0.12 for the T",
    ),
    "sgd": ({"optimizer": "sgd"}, "learning_rate", "warning", "per step, sgd"),
    "slow random backbone": (
        {"rate_factors": "{backbone: 0.1}"},
        "learning_rate",
        "warning",
        "has random weights",
    ),
    "unknown parameter name": (
        {"rate_factors": "{backbon_: 0.1}"},
        "learning_rate",
        "failed",
        "no trained weight has backbon_ in",
    ),
    "long warm-up": (
        {"warmup_steps": 6000},
        "schedule",
        "failed",
        "6000 steps, 2000 epochs of 24 images; warm-up 6000",
    ),
    "short run": ({"num_train_epochs": 20, "warmup_steps": 0}, "schedule", "warning", "60 steps"),
    "no clipping": ({"max_grad_norm": 0}, "gradient_clipping", "warning", "gradients are not clipped"),
    "loose clipping": ({"max_grad_norm": 2.0}, "gradient_clipping", "warning", "max_grad_norm 2 (limit: at most 1)"),
    "no auxiliary losses": (
        {"model": MODEL + ", auxiliary_loss: false}"},
        "auxiliary_loss",
        "warning",
        "only the last decoder layer",
    ),
}


# Further limits and levels of a check of which another fault is tested.
SLOW = ("high learning rate", "very high base learning rate", "very low learning rate", "short run", "loose clipping")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ARGUMENT_FAULTS]
)
def test_planted_argument_is_found(name, monkeypatch):
    options, check, level, message = ARGUMENT_FAULTS[name]
    found = only(examine(monkeypatch, as_splits(healthy()), **options), check, level)
    assert message in found.message
    assert found.remedy


def test_random_model_with_frozen_norms_is_refused_as_in_the_recipe(capsys):
    with pytest.raises(SystemExit) as ended:
        detection.main(["--config", "digits", "--model.backbone_norm", "frozen"])
    assert ended.value.code == 2
    assert 'model.backbone_norm "frozen" is for pretrained weights' in capsys.readouterr().err


def test_large_random_backbone_gives_a_warning(monkeypatch):
    monkeypatch.setattr(weights, "LARGE_BACKBONE", 1000)
    found = only(examine(monkeypatch, as_splits(healthy())), "fresh_weights", "warning")
    assert "of them in the backbone (limit: 0.001 million)" in found.message
    pretrained = examine(monkeypatch, as_splits(healthy()), pretrained_backbone="true", model=frozen())
    assert "in timm's pretrained backbone, the rest random" in only(pretrained, "fresh_weights", "ok").message
    assert "with timm's statistics" in only(pretrained, "frozen_norms", "ok").message


def test_source_of_a_pretrained_backbone(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    found = examine(monkeypatch, as_splits(healthy()), backbone=tmp_path, model=frozen())
    assert f"in {tmp_path}'s pretrained backbone" in only(found, "fresh_weights", "ok").message
    assert f"with {tmp_path}'s statistics" in only(found, "frozen_norms", "ok").message


# --- a model to fine-tune


def frozen() -> str:
    return MODEL + ", backbone_norm: frozen}"


def case_of(data, monkeypatch, **options) -> Case:
    """The examined case with its model."""
    examine(monkeypatch, data, **options)
    _, args, _ = detection.parse([word for k, v in (OPTIONS | options).items() for word in (f"--{k}", str(v))])
    case = Case(args, detection.read_splits(args))
    weights.add_model(case)
    return case


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A saved model with the classes of the healthy data."""
    model = case_of(as_splits(healthy()), monkeypatch).model
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fine_tuning(monkeypatch, folder, names=None, **options):
    """Findings for a run that fine-tunes a saved model."""
    data = as_splits(healthy(), names=names)
    return examine(monkeypatch, data, **{"model": "{}", "model_name_or_path": str(folder), **options})


def test_model_of_the_same_classes_passes(trained, monkeypatch):
    found = fine_tuning(monkeypatch, trained, **{"rate_factors": "{backbone: 0.1}"})
    assert {finding.level for finding in found} == {"ok"}
    assert "3 classes of the data, in the same order" in only(found, "model_classes", "ok").message
    assert " come from " in only(found, "fresh_weights", "ok").message


def test_model_with_another_class_order_is_found(trained, monkeypatch):
    names = ["green", "red", "blue"]
    found = only(fine_tuning(monkeypatch, trained, {"train": names, "validation": names}), "model_classes")
    assert 'class 0 is "red" in the model and "green" in the data' in found.message
    assert found.sample.image_id == 100


def test_model_of_other_classes_gives_a_warning(trained, monkeypatch):
    found = fine_tuning(monkeypatch, trained, {"train": ["ant", "bee", "cat"], "validation": ["ant", "bee", "cat"]})
    assert "the class layer is initialised randomly" in only(found, "model_classes", "warning").message
    assert "are randomly initialised: class_labels_classifier" in only(found, "fresh_weights", "ok").message
    assert not [finding for finding in found if finding.level == "failed"]


def test_additional_queries_are_reported_as_random(trained, monkeypatch):
    found = fine_tuning(monkeypatch, trained, model="{num_queries: 12}")
    assert "are randomly initialised: model.query_position_embeddings" in only(found, "fresh_weights", "ok").message
    found = fine_tuning(monkeypatch, trained, model="{num_queries: 8}")
    assert "randomly initialised" not in only(found, "fresh_weights", "ok").message


def keep(folder, prefix):
    """Drop the weights of a saved model whose names do not start with ``prefix``."""
    file = folder / "model.safetensors"
    values = {name: value for name, value in load_file(file).items() if name.startswith(prefix)}
    save_file(values, file, metadata={"format": "pt"})


def test_model_without_heads_is_found(trained, monkeypatch):
    keep(trained, "model.")
    found = only(fine_tuning(monkeypatch, trained), "fresh_weights", "warning")
    assert "bbox_predictor" in found.message and "randomly initialised" in found.message


def test_backbone_without_decoder_is_found(trained, monkeypatch):
    """A run from it is refused, so the doctor fails too."""
    keep(trained, "model.backbone.")
    found = only(fine_tuning(monkeypatch, trained), "model")
    assert "it has no weights for model.decoder" in found.message and "they would be random" in found.message


def test_untrained_frozen_norms_are_found(tmp_path, monkeypatch, trained):
    model = TfmDetrForObjectDetection.from_pretrained(trained, backbone_norm="frozen", ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "idle")
    assert "have mean 0 and variance 1" in only(fine_tuning(monkeypatch, tmp_path / "idle"), "frozen_norms").message
    norms = [module for module in model.modules() if isinstance(module, weights.FrozenBatchNorm)]
    with torch.no_grad():
        norms[0].running_mean.normal_()
    model.save_pretrained(tmp_path / "used")
    assert "with statistics" in only(fine_tuning(monkeypatch, tmp_path / "used"), "frozen_norms", "ok").message


def test_high_learning_rate_of_a_pretrained_backbone_gives_a_warning(trained, monkeypatch):
    found = only(fine_tuning(monkeypatch, trained), "learning_rate", "warning")
    assert "the backbone is pretrained but has the same learning rate" in found.message


def test_missing_model_is_one_failed_check(tmp_path, monkeypatch):
    found = fine_tuning(monkeypatch, tmp_path / "nowhere")[-1]
    assert (found.check, found.level) == ("model", "failed")
    assert "nowhere" in found.message


def test_incompatible_model_is_found(trained, monkeypatch):
    found = only(fine_tuning(monkeypatch, trained, model="{d_model: 32}"), "model")
    assert "do not fit" in found.message


def test_table_of_faults_is_current():
    from fault_table import FILE, text

    assert FILE.read_text(encoding="utf-8") == text()
