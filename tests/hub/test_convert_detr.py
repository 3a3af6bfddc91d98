"""DETR converts to transformers' classes and to its authors' names, and back."""

import argparse
import json

import pytest
import torch
from convert_helpers import config_of
from detr_helpers import AUTHORS, PANOPTIC, STOCK, TINY, assert_same_outputs, authors_weights, drawn, ours, outputs_of
from hub_helpers import run_python
from PIL import Image
from safetensors.torch import load_file
from test_convert import assert_same_weights
from transformers import DetrConfig, DetrImageProcessor, pipeline

from hf_tfm import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.conversion import convert

FIELDS = [
    {"dropout": 0.3, "backbone_frozen_stages": 2, "backbone_output_stride": 8},
    {"position_embedding_type": "learned", "activation_function": "gelu", "num_channels": 1},
    {"backbone": "resnet14t", "dilation": True, "auxiliary_loss": False, "bbox_cost": 4.0},
    {"backbone": "convnext_atto"},  # four feature maps without a stem
]


# Both heads, and the configurations of a detector; the others are slow, and so is the largest backbone.
@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        pytest.param(
            *(model_class, fields),
            id=f"{model_class.__name__}-{fields}",
            marks=()
            if (model_class is TfmDetrForPanopticSegmentation and fields is FIELDS[0])
            or (model_class is TfmDetrForObjectDetection and fields is not FIELDS[3])
            else pytest.mark.slow,
        )
        for model_class in STOCK
        for fields in FIELDS
    ],
)
def test_ours_to_native_and_back(tmp_path, model_class, fields):
    model = ours(model_class, **fields)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "detr", tmp_path / "detr")
    their_class, channels = STOCK[model_class], model.config.num_channels
    stock = their_class.from_pretrained(tmp_path / "detr")
    assert config_of(tmp_path / "detr")["architectures"] == [their_class.__name__]
    assert "auto_map" not in config_of(tmp_path / "detr") and not list((tmp_path / "detr").glob("*.py"))
    expected = outputs_of(model, channels)
    assert_same_outputs(outputs_of(stock, channels), expected)
    assert certificate["differences"].keys() == expected.keys()
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate["inputs"]["pixel_values"] == [3, channels, 160, 224]
    assert certificate["target"]["class"] == their_class.__name__

    convert(tmp_path / "detr", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    before, after = config_of(tmp_path / "ours"), config_of(tmp_path / "back")
    for field in ("encoder_layerdrop", "decoder_layerdrop", "init_std"):
        after.pop(field)  # native fields without effect here
    assert before == after


@pytest.mark.parametrize("to", ["detr", pytest.param("detr_authors", marks=pytest.mark.slow)])
def test_batch_norms_are_converted_to_frozen_ones(to, tmp_path):
    """They are equal in evaluation mode; converted back they stay frozen."""
    model = ours(fields=AUTHORS, backbone_norm="batch")
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    convert(tmp_path / to, "tfm", tmp_path / "back")
    back = TfmDetrForObjectDetection.from_pretrained(tmp_path / "back")
    assert back.config.backbone_norm == "frozen"
    assert_same_outputs(outputs_of(back), outputs_of(model))


@pytest.mark.parametrize(
    "model_class",
    [pytest.param(c, marks=pytest.mark.slow if c is TfmDetrForObjectDetection else (), id=c.__name__) for c in STOCK],
)
def test_native_to_ours_and_back(tmp_path, model_class):
    """A native model has none of our fields: they get the paper's training settings."""
    their_class = STOCK[model_class]
    model = drawn(their_class(DetrConfig(**TINY, encoder_layerdrop=0.1)))
    model.save_pretrained(tmp_path / "detr")
    convert(tmp_path / "detr", "tfm", tmp_path / "ours")
    converted = model_class.from_pretrained(tmp_path / "ours")
    assert_same_outputs(outputs_of(converted), outputs_of(model))
    assert converted.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert converted.config.auxiliary_loss and converted.config.attention_dropout == 0.0
    frozen = [name for name, parameter in converted.named_parameters() if not parameter.requires_grad]
    assert frozen and all(".backbone." in f".{name}" for name in frozen)
    convert(tmp_path / "ours", "detr", tmp_path / "back")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "detr"))
    expected = {name: value for name, value in expected.items() if not name.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    after = config_of(tmp_path / "back")
    before = config_of(tmp_path / "detr")
    assert after["encoder_layerdrop"] == 0.1 and after["backbone_config"]["backbone"] == "test_resnet"
    for field in ("d_model", "num_queries", "decoder_layers", "bbox_cost", "dropout", "dilation", "auxiliary_loss"):
        assert after[field] == before[field], field


def test_native_model_works_in_pipelines_without_the_package(tmp_path):
    """In both of transformers' pipelines, with the image processor saved by us."""
    for name, model_class in (("detector", TfmDetrForObjectDetection), ("panoptic", TfmDetrForPanopticSegmentation)):
        ours(model_class).save_pretrained(tmp_path / f"{name}-ours")
        DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / f"{name}-ours")
        convert(tmp_path / f"{name}-ours", "detr", tmp_path / name)
    code = """
import json
from PIL import Image
from transformers import pipeline

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
image = Image.radial_gradient("L").convert("RGB").resize((80, 60))
found = pipeline("object-detection", "detector")(image, threshold=0.0)
segments = pipeline("image-segmentation", "panoptic")(image, subtask="semantic")
print(json.dumps({"objects": found, "segments": [[s["label"], list(s["mask"].size)] for s in segments]}))
"""
    found = run_python(code, tmp_path, without_package=True)
    assert len(found["objects"]) == 7 and {each["label"] for each in found["objects"]} <= {"cat", "dog", "owl"}
    assert found["objects"][0]["box"].keys() == {"xmin", "ymin", "xmax", "ymax"}
    assert found["segments"] and all(size == [80, 60] for _, size in found["segments"])
    # Our model with the same processor gives the same detections.
    image = Image.radial_gradient("L").convert("RGB").resize((80, 60))
    own = pipeline("object-detection", str(tmp_path / "detector-ours"))(image, threshold=0.0)
    assert [(each["label"], each["box"]) for each in own] == [(e["label"], e["box"]) for e in found["objects"]]


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (TfmDetrForObjectDetection, AUTHORS),
        pytest.param(TfmDetrForPanopticSegmentation, PANOPTIC, marks=pytest.mark.slow),
    ],
    ids=["detection", "panoptic"],
)
def test_ours_to_the_authors_names_and_back(tmp_path, model_class, fields):
    model = ours(model_class, fields)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "detr_authors", tmp_path / "theirs")
    assert {"logits", "pred_boxes"} <= certificate["differences"].keys()
    assert ("pred_masks" in certificate["differences"]) == (fields is PANOPTIC)
    found, expected = load_file(tmp_path / "theirs" / "model.safetensors"), authors_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "back")
    # As a pickle next to a config.json that gives the number of heads.
    torch.save({"model": found}, tmp_path / "theirs" / "checkpoint.pth")
    convert(tmp_path / "theirs" / "checkpoint.pth", "tfm", tmp_path / "again")
    assert_same_weights(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_first": True},
        pytest.param({"position_embedding_type": "learned"}, marks=pytest.mark.slow),
        pytest.param({"backbone": "resnet50", "dilation": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options_supported_only_by_the_authors(tmp_path, fields):
    model = ours(fields=AUTHORS, **fields)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "detr_authors", tmp_path / "theirs")
    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "back")


@pytest.mark.parametrize(
    ("published", "model_class", "fields"),
    [
        pytest.param(True, TfmDetrForObjectDetection, AUTHORS, id="True-detection", marks=pytest.mark.slow),
        pytest.param(True, TfmDetrForPanopticSegmentation, PANOPTIC, id="True-panoptic"),
        pytest.param(False, TfmDetrForObjectDetection, AUTHORS, id="False-detection"),
        pytest.param(False, TfmDetrForPanopticSegmentation, PANOPTIC, id="False-panoptic", marks=pytest.mark.slow),
    ],
)
def test_file_of_the_authors(tmp_path, model_class, fields, published):
    """Published files hold only weights, those of a training run also the command-line arguments."""
    fields = {**fields, "d_model": 256, "encoder_layers": 1, "decoder_layers": 2, "dilation": fields is PANOPTIC}
    heads = 8 if published else 16
    model = ours(model_class, fields, encoder_attention_heads=heads, decoder_attention_heads=heads)
    held = {"model": authors_weights(model)}
    name = "detr-r50-dc5-0123.pth" if fields["dilation"] else "detr-r18.pth"
    if not published:
        held |= {"args": argparse.Namespace(nheads=16, dilation=fields["dilation"], lr=1e-4), "epoch": 3}
        name = "checkpoint.pth"
    torch.save(held, tmp_path / name)
    certificate = convert(tmp_path / name, "tfm", tmp_path / "ours")
    assert certificate["source"]["model"] == name and list(certificate["source"]["weights"]) == [name]
    converted = model_class.from_pretrained(tmp_path / "ours")
    assert converted.config.dilation is fields["dilation"] and converted.config.num_labels == 3
    assert converted.config.encoder_attention_heads == heads
    assert_same_outputs(outputs_of(converted), outputs_of(model))


def test_certificates_state_the_checks(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "detr", tmp_path / "detr")
    certificate = json.loads((tmp_path / "detr" / "parity_certificate.json").read_text())
    assert certificate["inputs"] == {
        "seed": 0,
        "pixel_values": [3, 3, 160, 224],
        "pixel_mask": [3, 160, 224],
        "dtype": "float32",
        "device": "cpu",
    }
    assert certificate["source"]["class"] == "TfmDetrForObjectDetection" and certificate["tokenizer_equal"] is None
    assert str(tmp_path) not in json.dumps(certificate)
