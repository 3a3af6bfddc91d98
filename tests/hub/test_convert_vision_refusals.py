"""Models that cannot be converted are refused with field and value, and no output is left."""

import pytest
import timm
import torch
from convert_helpers import authors_weights, ours, save_timm, timm_vit
from safetensors.torch import load_file, save_file

from hf_tfm import (
    TfmMAEForPreTraining,
    TfmViTBackbone,
    TfmViTForImageClassification,
)
from hf_tfm.conversion import convert


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        ("vit", {"pooling": "mean"}, "vit cannot express pooling='mean': convert to timm"),
        ("vit", {"representation_layer": True}, "vit cannot express representation_layer=True"),
        ("timm", {"representation_layer": True}, "timm cannot express representation_layer=True"),
        ("timm", {"layer_norm_eps": 1e-12}, "timm cannot express layer_norm_eps=1e-12: it needs 1e-06"),
        ("timm", {"hidden_act": "gelu_new"}, "timm cannot express hidden_act='gelu_new'"),
        (
            "vit",
            {"backbone": "resnet10t", "patch_size": 1, "image_size": 64},
            "vit cannot express backbone='resnet10t'",
        ),
        ("vit_mae", {"image_size": [32, 48]}, r"vit_mae cannot express image_size=\[32, 48\]"),
        ("vit_mae", {"patch_size": [4, 8]}, r"vit_mae cannot express patch_size=\[4, 8\]"),
        ("vit_mae", {"image_size": 80, "mask_ratio": 0.9}, "vit_mae cannot express mask_ratio=0.9: it needs 0.895"),
        ("mae_authors", {"qkv_bias": False}, "mae_authors cannot express qkv_bias=False"),
        ("mae_authors", {"hidden_act": "relu"}, "mae_authors cannot express hidden_act='relu'"),
        ("mae_authors", {"decoder_intermediate_size": 32}, "cannot express decoder_intermediate_size=32: it needs 24"),
    ],
)
def test_fields_without_a_native_equivalent_are_refused(tmp_path, to, fields, message):
    ours(TfmMAEForPreTraining if "mae" in to else TfmViTForImageClassification, **fields).save_pretrained(
        tmp_path / "ours"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", to, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "has_class_token=False"),
        ({"reg_tokens": 2}, "num_reg_tokens=2"),
        ({"no_embed_class": True}, "no_embed_class=True"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": "avg", "fc_norm": False}, "fc_norm=False"),
        ({"qk_norm": True}, r"not in the table .*attn\.q_norm\.weight"),
        ({"init_values": 0.1}, r"not in the table .*ls1\.gamma"),
        ({"act_layer": "silu"}, "act_layer='SiLU'"),
    ],
)
def test_timm_fields_without_an_equivalent_here_are_refused(tmp_path, arguments, message):
    save_timm(timm_vit(**arguments), tmp_path / "timm")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "timm", "tfm", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["timm"]


def test_unsupported_sources_are_refused(tmp_path):
    ours(TfmViTBackbone).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match='no conversion of a TfmViTBackbone to "vit", only of TfmViTForImageClass'):
        convert(tmp_path / "backbone", "vit", tmp_path / "out")
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(ValueError, match="cannot express a ResNet of timm"):
        convert(tmp_path / "resnet", "tfm", tmp_path / "out")
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"is not a weights file of the masked autoencoder's authors, .* it holds \['layer"
    ):
        convert(tmp_path / "other.pth", "tfm", tmp_path / "out")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a plain weights file"):
        convert(tmp_path / "text.pth", "tfm", tmp_path / "out")
    torch.save({"model": authors_weights(ours(TfmMAEForPreTraining))}, tmp_path / "small.pth")
    with pytest.raises(ValueError, match="number of heads is not known for a hidden_size of 32"):
        convert(tmp_path / "small.pth", "tfm", tmp_path / "out")


@pytest.mark.parametrize("lost", ["blocks.1.attn.qkv.weight", "head.bias"])
def test_incomplete_timm_folder_is_refused(tmp_path, lost):
    save_timm(timm_vit(), tmp_path / "timm")
    path = tmp_path / "timm" / "model.safetensors"
    weights = load_file(path)
    weights.pop(lost)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(?s)not a complete model of timm: .*{lost}"):
        convert(tmp_path / "timm", "tfm", tmp_path / "out")


def test_different_outputs_are_refused(tmp_path, monkeypatch):
    """Swapped queries and keys have the same shapes."""
    import hf_tfm.conversion.timm_vit as table

    parts = {"self_attn.k_proj": "attn.qkv", "self_attn.q_proj": "attn.qkv", "self_attn.v_proj": "attn.qkv"}
    monkeypatch.setattr(
        table, "BLOCK_NAMES", {**parts, **{k: v for k, v in table.BLOCK_NAMES.items() if k not in parts}}
    )
    ours(hidden_act="relu").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="logits differ by"):
        convert(tmp_path / "ours", "timm", tmp_path / "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
