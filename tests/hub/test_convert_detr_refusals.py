"""DETR models that cannot be converted are refused with field and value, and no output is left."""

import argparse
from dataclasses import replace

import pytest
import torch
from detr_helpers import AUTHORS, PANOPTIC, TINY, authors_weights, drawn, ours
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import hf_tfm.conversion
from hf_tfm import TfmDetrConfig, TfmDetrForPanopticSegmentation
from hf_tfm.conversion import convert
from hf_tfm.conversion.detr import to_detr
from hf_tfm.conversion.detr_authors import DETR_AUTHORS

VIT = {"model_type": "tfm_vit", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "image_size": 32}


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        ("detr", {"norm_first": True}, "detr cannot express norm_first=True"),
        ("detr", {"backbone_norm": "group"}, "detr cannot express backbone_norm='group': it needs 'frozen'"),
        ("detr", {"layer_norm_eps": 1e-6}, "detr cannot express layer_norm_eps=1e-06"),
        ("detr", {"encoder_attention": "clustered"}, "detr cannot express encoder_attention='clustered'"),
        ("detr_authors", {"backbone_output_stride": 8}, "cannot express backbone_output_stride=8"),
        ("detr", {"class_cost": 1.5}, "detr cannot express class_cost=1.5: it needs 1"),
        ("detr", {"backbone_config": VIT}, "detr cannot express a backbone of type tfm_vit"),
        ("detr", {"backbone_kwargs": {"act_layer": "silu"}}, "detr cannot express backbone_kwargs={'act_layer'"),
        ("detr_authors", {"backbone_config": VIT}, "cannot express backbone='tfm_vit': it needs 'resnet18"),
        (
            "detr_authors",
            {"backbone": "resnet10t"},
            "cannot express backbone='resnet10t': it needs 'resnet18, resnet3",
        ),
        ("detr_authors", {"backbone_norm": "group"}, "detr_authors cannot express backbone_norm='group'"),
        ("detr_authors", {"activation_function": "gelu"}, "cannot express activation_function='gelu'"),
        ("detr_authors", {"decoder_ffn_dim": 40}, "cannot express decoder_ffn_dim=40: it needs 48"),
        ("detr_authors", {"decoder_attention_heads": 4}, "cannot express decoder_attention_heads=4: it needs 8"),
        ("detr_authors", {"num_channels": 1}, "cannot express num_channels=1: it needs 3"),
    ],
    ids=str,
)
def test_fields_without_a_native_equivalent_are_refused(tmp_path, to, fields, message):
    ours(fields=AUTHORS if to == "detr_authors" else TINY, **fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", to, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 64}, "detr_authors cannot express d_model=64: it needs 'a multiple of 128'"),
        ({"backbone": "resnet18"}, "detr_authors cannot express backbone='resnet18'"),
    ],
    ids=str,
)
def test_mask_heads_that_the_authors_cannot_build_are_refused(tmp_path, fields, message):
    ours(TfmDetrForPanopticSegmentation, PANOPTIC, **fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", "detr_authors", tmp_path / "theirs")


def test_native_fields_without_an_equivalent_here_are_refused(tmp_path):
    drawn(DetrForObjectDetection(DetrConfig(**TINY, auxiliary_loss=True))).save_pretrained(tmp_path / "auxiliary")
    with pytest.raises(ValueError, match="auxiliary_loss=True feeds layer-normed states into the next decoder layer"):
        convert(tmp_path / "auxiliary", "tfm", tmp_path / "out")
    backbone = ResNetConfig(embeddings_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=["stage4"])
    native = DetrConfig(**{**TINY, "backbone": None}, use_timm_backbone=False, backbone_config=backbone)
    DetrForObjectDetection(native).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="backbone_config must be a timm_backbone, got resnet"):
        convert(tmp_path / "resnet", "tfm", tmp_path / "out")
    weights = authors_weights(ours(fields=AUTHORS))
    torch.save({"model": weights}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="number of heads is not known for a d_model of 32, only for 256"):
        convert(tmp_path / "narrow.pth", "tfm", tmp_path / "out")
    weights.pop("class_embed.bias")
    torch.save({"model": weights, "args": argparse.Namespace(nheads=8)}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"lacks the weight class_embed\.bias"):
        convert(tmp_path / "broken.pth", "tfm", tmp_path / "out")


@pytest.mark.parametrize("backbone", ["regnetx_002", "mobilenetv3_small_050", "nasnetalarge"])
def test_backbone_with_other_norms_is_refused(backbone):
    with pytest.raises(ValueError, match=f"cannot express backbone='{backbone}': when transformers freezes its norms"):
        to_detr(TfmDetrConfig(backbone=backbone))


def test_different_outputs_are_refused(tmp_path, monkeypatch):
    """Swapped queries and keys have the same shapes."""

    def wrong(config: TfmDetrConfig) -> dict[str, str]:
        table = DETR_AUTHORS.names(config)
        return {name: table[name] for name in sorted(table, key=lambda name: name.replace("k_proj", "a_proj"))}

    monkeypatch.setattr(hf_tfm.conversion, "conversions", lambda: [replace(DETR_AUTHORS, names=wrong)])
    ours(fields=AUTHORS).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="differ by"):
        convert(tmp_path / "ours", "detr_authors", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
