"""The recipe of detection with Faster R-CNN: training, evaluation, fine-tuning and pictures, as for DETR."""

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from matplotlib.image import imread
from recipe_helpers import record
from safetensors.torch import load_file
from scene_recipes import command_line, scenes, train, write_hub
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
from vision_recipes import scores

from hf_tfm import cli
from hf_tfm.hub.results import read_history
from hf_tfm.tasks.evaluation import evaluate

MODEL = "backbone: test_resnet, backbone_norm: group, d_model: 16, representation_size: 32, score_threshold: 0.0"
FAMILY = {"architecture": "faster_rcnn", "model": f"{{{MODEL}}}"}
OPTIONS = {**FAMILY, "max_steps": 2, "adam_epsilon": 1e-4, "logging_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_hub(tmp_path_factory.mktemp("scenes") / "hub", scenes())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(data, folder, **OPTIONS)


def test_the_run_is_scored_and_loaded(trained, data):
    found = record(trained)
    assert (found.task, found.model_type) == ("object-detection", "tfm_faster_rcnn")
    card = (trained / "README.md").read_text()
    assert "AutoModelForObjectDetection.from_pretrained" in card
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    result = evaluate(str(trained), dataset_name=str(data), split="test", batch_size=4, progress=False)
    again = {row["name"]: row["value"] for row in result["metrics"]}
    for name, value in scores(trained, "test").items():
        assert again[name] == pytest.approx(value, abs=1e-6), name


def test_the_pipeline_returns_detections(trained):
    found = pipeline("object-detection", model=str(trained), threshold=0.05)(scenes()["test"][0]["image"])
    assert 0 < len(found) <= 100 and {"score", "label", "box"} == found[0].keys()


@pytest.mark.slow  # tests/models/test_faster_rcnn.py and test_detection_train.py
def test_micro_batches_give_the_same_loss(trained, data, tmp_path):
    """Up to rounding, which may change the proposals that are sampled; see tests/models/test_faster_rcnn.py."""
    single = train(data, tmp_path / "single", micro_batch_size=1, **OPTIONS)
    whole, parts = ([row["loss"] for row in read_history(folder) if "loss" in row] for folder in (trained, single))
    assert len(whole) == 2 and parts == pytest.approx(whole, rel=0.02)


def test_other_classes_get_a_new_box_predictor(trained, data, tmp_path, caplog):
    other = save_with_classes(trained, tmp_path / "other", [f"kind {i}" for i in range(10)])
    again = train(data, tmp_path / "run", model_name_or_path=other, max_steps=1, model="{num_queries: 7}")
    logged = next(r.getMessage() for r in caplog.records if "initialised randomly" in r.getMessage())
    assert "box_predictor.cls_score" in logged and "pyramid" not in logged
    model = AutoModelForObjectDetection.from_pretrained(again)
    assert model.config.num_queries == 7 and "kind 0" not in model.config.label2id
    output = model.eval()(torch.zeros(1, 3, 64, 64))
    assert output.logits.shape[1] <= 7


def save_with_classes(source, folder, names) -> str:
    """A copy of a model with other names of its classes."""
    model, processor = AutoModelForObjectDetection.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_backbone_starts_from_a_folder(data, tmp_path):
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", pretrained=False)
    timm.models.save_for_hf(network, tmp_path / "backbone", safe_serialization=True)
    model = MODEL.replace("backbone: test_resnet, ", "").replace("norm: group", "norm: frozen")
    options = {"architecture": "faster_rcnn", "model": f"{{{model}}}", "backbone": tmp_path / "backbone"}
    run = train(data, tmp_path / "run", **options, max_steps=1, learning_rate=1e-9)
    saved = load_file(run / "model.safetensors")
    torch.testing.assert_close(saved["model.backbone.body.conv1.0.weight"], network.state_dict()["conv1.0.weight"])


def test_pictures_of_detections(trained, data, tmp_path):
    cli.main(["show", "detections", str(trained), f"{data}:test:0", "--output", str(tmp_path / "a.png")])
    assert imread(tmp_path / "a.png").shape[0] > 100


def test_limit_of_time_ends_evaluates_and_saves_the_run(data, tmp_path):
    run = train(data, tmp_path / "run", **FAMILY, max_steps=50, max_minutes=1e-6)
    assert record(run).training["steps"] == 1 and "AP" in scores(run, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "/no/where"}, "/no/where"),
        ({"model": "{backbone_norm: frozen}"}, 'model.backbone_norm "frozen" is for pretrained weights'),
        ({"model": "{backbone: test_resnet, encoder_layers: 1}"}, "encoder_layers is not a field of TfmFasterRCNN"),
    ],
)
def test_bad_input_is_refused(options, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "detection_train", *command_line(data, tmp_path / "run", **{**FAMILY, **options})])
    assert message in capsys.readouterr().err
