"""Deformable DETR to transformers' and back, with certificates; what transformers cannot express is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeformableDetrForObjectDetection

from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrForObjectDetection, TfmDeformableDetrModel
from hf_tfm.conversion import convert

TINY = {
    **{"backbone": "test_resnet", "num_queries": 5, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_labels": 3},
}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
VARIANTS = {
    "single-scale": {"num_feature_levels": 1},
    "DC5": {"num_feature_levels": 1, "dilation": True},
    "batch norm": {"backbone_norm": "batch", "num_feature_levels": 2},
    "one layer": {"decoder_layers": 1, "num_feature_levels": 2},
    "refinement": {"with_box_refine": True},
    "groups of queries": {"query_groups": 3, "num_feature_levels": 1},
    "two-stage": TWO_STAGE,
}


@torch.no_grad()
def saved(folder, kind=TfmDeformableDetrForObjectDetection, **fields):
    torch.manual_seed(0)
    model = kind(TfmDeformableDetrConfig(**{**TINY, **fields}))
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


# The two with the least in common; the others are slow.
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=() if name in ("single-scale", "two-stage") else pytest.mark.slow)
        for name, fields in VARIANTS.items()
    ],
)
def test_there_and_back(fields, tmp_path):
    source = saved(tmp_path / "ours", class_loss_coefficient=3, **fields)
    certificate = convert(source, "deformable_detr", tmp_path / "theirs")
    assert certificate["target"]["class"] == "DeformableDetrForObjectDetection"
    assert {"logits", "pred_boxes", "last_hidden_state"} <= certificate["differences"].keys()
    assert "class_loss_coefficient" in certificate["remarks"][0]
    back = convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert back["target"]["class"] == "TfmDeformableDetrForObjectDetection"
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "back"))
    changed = {"backbone_norm", "query_groups", "dtype", "transformers_version", "architectures"}
    for name in (TfmDeformableDetrConfig.__dataclass_fields__.keys() & first.keys()) - changed:
        assert again.get(name) == first[name], name
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_shared_class_head_becomes_one_for_each_layer(tmp_path):
    """transformers ties them by default, which the authors do not."""
    convert(saved(tmp_path / "ours", with_box_refine=True), "deformable_detr", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    theirs = DeformableDetrForObjectDetection(DeformableDetrForObjectDetection.config_class(**config))
    theirs.save_pretrained(tmp_path / "tied")
    assert "class_embed.1.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    convert(tmp_path / "tied", "tfm", tmp_path / "back")
    weights = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(weights["class_embed.0.weight"], weights["class_embed.1.weight"])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (TfmDeformableDetrForObjectDetection, {"backbone_norm": "group"}, "cannot express backbone_norm='group'"),
        (TfmDeformableDetrForObjectDetection, {"class_cost": 1.5}, "cannot express class_cost=1.5: it needs 1"),
        (
            TfmDeformableDetrForObjectDetection,
            {"decoder_layers": 1, "with_box_refine": True},
            "cannot express decoder_layers=1 with with_box_refine=True",
        ),
        (TfmDeformableDetrModel, {"with_box_refine": True}, "cannot express with_box_refine=True: it needs False"),
    ],
    ids=["norm", "cost", "one layer", "base"],
)
def test_refusals(kind, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(saved(tmp_path / "ours", kind, **fields), "deformable_detr", tmp_path / "theirs")
