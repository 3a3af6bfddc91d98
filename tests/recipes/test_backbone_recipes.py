"""A masked autoencoder is pretrained on the images of a detection data set, and is then the backbone of a detector."""

import json
import shutil

import pytest
import torch
from recipe_helpers import ROOT, record
from scene_recipes import LAYOUTS, command_line, scenes, train
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from vision_recipes import pretrain, weights

from hf_tfm.options import parse_arguments
from hf_tfm.tasks.object_detection import DetectionArguments

SMALL = "num_queries: 9, d_model: 32, encoder_layers: 1, decoder_layers: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32"
FROZEN = f"{{{SMALL}, backbone_frozen_stages: 2}}"  # of two blocks: only the norm after them is trained
SCALE = {"mean": "[0.4, 0.5, 0.6]", "std": "[0.2, 0.3, 0.4]"}


@pytest.fixture(scope="module")
def splits():
    return scenes()


@pytest.fixture(scope="module", params=["coco"])
def data(request, splits, tmp_path_factory):
    return LAYOUTS[request.param](tmp_path_factory.mktemp("scenes") / request.param, splits)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """A run of mae_pretrain on the images of the scenes, without their boxes."""
    folder = tmp_path_factory.mktemp("pretrained") / "mae"
    return pretrain(data, folder, max_steps=2, **SCALE)


def test_detector_on_a_pretrained_autoencoder(data, pretrained, tmp_path):
    run = train(data, tmp_path / "run", model=FROZEN, backbone=pretrained)
    earlier, later = weights(pretrained), weights(run)
    taken = {name: value for name, value in later.items() if ".backbone." in name and ".layernorm." not in name}
    assert len(taken) > 20
    for name, value in taken.items():
        origin = name.replace("model.backbone.body.", "")
        assert torch.equal(value, earlier[origin]), name
    found = record(run)
    assert found.arguments["pretrained_backbone"] and found.arguments["backbone"] == "mae"
    assert "except for the pretrained backbone `mae`" in (run / "README.md").read_text()
    processor = AutoImageProcessor.from_pretrained(run)
    assert [*processor.image_mean, *processor.image_std] == [0.4, 0.5, 0.6, 0.2, 0.3, 0.4]
    config = json.loads((run / "config.json").read_text())
    assert config["backbone"] is None and config["backbone_config"]["model_type"] == "tfm_vit"
    model = AutoModelForObjectDetection.from_pretrained(run)
    assert model.model.backbone.frozen_stages == 2


@pytest.mark.slow  # the parts are tested one by one
def test_deformable_detector_on_a_pretrained_autoencoder(data, pretrained, tmp_path):
    """Feature maps of several sizes, trained further after the folder of the autoencoder is gone."""
    source = tmp_path / "mae"
    shutil.copytree(pretrained, source)
    model = f"{{{SMALL}, num_feature_levels: 3}}"
    first = train(data, tmp_path / "first", architecture="deformable_detr", model=model, backbone=source)
    shutil.rmtree(source)
    second = train(data, tmp_path / "second", model_name_or_path=first)
    assert weights(second).keys() == weights(first).keys()


def test_random_weights_of_a_folder(pretrained, data, tmp_path):
    """Only its architecture is read; "frozen" norms, of size "base", need no weights: the model has no batch norms."""
    words = command_line(data, tmp_path, size="base", model="{}", backbone=pretrained, pretrained_backbone="false")
    args = parse_arguments(DetectionArguments, ROOT / "recipes" / "detection_train.py", words)
    assert args.pretrained_backbone is False and args.model == {"backbone": str(pretrained)}


@pytest.mark.parametrize("layout", ["hub", "voc"])
def test_images_of_other_layouts(layout, splits, tmp_path):
    """All layouts of detection data sets are read for their images alone."""
    data = LAYOUTS[layout](tmp_path / "data", splits)
    run = pretrain(data, tmp_path / "mae", max_steps=1)
    assert record(run).data["rows"]["train"] == len(splits["train"])
