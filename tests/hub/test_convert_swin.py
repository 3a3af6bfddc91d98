"""Swin classifiers ship as those of transformers, timm and torchvision; certificates tell what may differ."""

import json

import pytest
import timm
import torch
from convert_helpers import LABELS, assert_same_outputs, config_of, outputs_of, save_timm, timm_reads
from hub_helpers import randomize
from safetensors.torch import load_file
from test_convert import assert_same_weights
from torchvision.models import SwinTransformer
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from hf_tfm import TfmSwinConfig, TfmSwinForImageClassification, TfmSwinModel
from hf_tfm.conversion import convert

SHAPE = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32}


def ours(model_class=TfmSwinForImageClassification, **fields):
    return randomize(model_class(TfmSwinConfig(**{**SHAPE, **LABELS, **fields})), std=0.3)


def reads_torchvision(folder):
    """The folder as torchvision's users read it, without us."""
    model = SwinTransformer(**config_of(folder)["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


READERS = {
    "swin": SwinForImageClassification.from_pretrained,
    "timm": timm_reads,
    "torchvision": reads_torchvision,
}


@pytest.mark.parametrize("to", READERS)
def test_ours_to_theirs_and_back(tmp_path, to):
    model = ours(drop_path_rate=0.2)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    expected = outputs_of(model, (3, 32, 32))
    assert_same_outputs(outputs_of(READERS[to](tmp_path / to), (3, 32, 32)), expected)
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate == json.loads((tmp_path / to / "parity_certificate.json").read_text())
    if to == "swin":
        assert certificate["remarks"] == []
    else:
        (remark,) = certificate["remarks"]
        assert f'window_fit was "transformers" and is "{to}"' in remark and "32 x 32 pixels" in remark
    assert convert(tmp_path / to, "tfm", tmp_path / "back")["remarks"] == []
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    before, after = config_of(tmp_path / "ours"), config_of(tmp_path / "back")
    for field in ("window_fit", "encoder_stride"):
        before.pop(field, None), after.pop(field, None)
    assert before == after
    back = TfmSwinForImageClassification.from_pretrained(tmp_path / "back")
    assert back.config.window_fit == ("transformers" if to == "swin" else to)
    assert_same_outputs(outputs_of(back, (3, 32, 32)), expected)


@pytest.mark.parametrize("to", READERS)
def test_dtype_and_bits_are_kept(tmp_path, to):
    ours().bfloat16().save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", to, tmp_path / to)["inputs"]["dtype"] == "float32"
    weights = load_file(tmp_path / to / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.bfloat16}
    convert(tmp_path / to, "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


def test_a_weights_file_of_torchvision(tmp_path):
    """As its releases are: a pickle of the weights alone."""
    model = randomize(SwinTransformer([4, 4], 8, [2, 2, 1], [1, 2, 4], [7, 7], num_classes=3), std=0.3)
    torch.save(model.state_dict(), tmp_path / "swin_t.pth")
    convert(tmp_path / "swin_t.pth", "tfm", tmp_path / "ours")
    converted = TfmSwinForImageClassification.from_pretrained(tmp_path / "ours").eval()
    expected = {"embed_dim": 8, "depths": [2, 2, 1], "num_heads": [1, 2, 4], "window_size": 7, "mlp_ratio": 4.0}
    expected |= {"patch_size": 4, "image_size": 224, "num_labels": 3, "window_fit": "torchvision"}
    assert {name: getattr(converted.config, name) for name in expected} == expected
    images = torch.randn(1, 3, 64, 64)  # smaller than its windows
    with torch.no_grad():
        torch.testing.assert_close(converted(images).logits, model.eval()(images), rtol=0, atol=1e-5)


def test_a_weights_file_of_the_authors(tmp_path):
    """Their names from timm's, which moves merging to the next stage."""
    fields = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = randomize(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **fields), std=0.3)
    renames = (("layers.1.downsample", "layers.0.downsample"), ("head.fc", "head"))
    weights = {}
    for name, weight in model.state_dict().items():
        for theirs, authors in renames:
            name = name.replace(theirs, authors)
        weights[name] = weight
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    weights["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    torch.save({"model": weights}, tmp_path / "swin.pth")
    convert(tmp_path / "swin.pth", "tfm", tmp_path / "ours")
    converted = TfmSwinForImageClassification.from_pretrained(tmp_path / "ours")
    assert converted.config.image_size == 32 and converted.config.window_fit == "transformers"
    assert_same_outputs(outputs_of(converted, (3, 32, 32)), outputs_of(model, (3, 32, 32)))


def test_base_models_of_transformers(tmp_path):
    native = randomize(SwinModel(SwinConfig(**SHAPE, qkv_bias=False, hidden_act="relu")), std=0.3)
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", "tfm", tmp_path / "ours")
    model = TfmSwinModel.from_pretrained(tmp_path / "ours")
    assert_same_outputs(outputs_of(model, (3, 32, 32)), outputs_of(native, (3, 32, 32)))
    convert(tmp_path / "ours", "swin", tmp_path / "back")
    assert_same_weights(tmp_path / "native", tmp_path / "back")


@pytest.mark.parametrize("arguments", [{}, {"img_size": (8, 24), "window_size": 6}], ids=["plain", "small"])
def test_timm_to_ours_and_back(tmp_path, arguments):
    """Also a model whose last windows timm made smaller when it was built."""
    fields = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    arguments = {**fields, **arguments}
    model = randomize(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **arguments), std=0.3)
    model.arguments = arguments
    save_timm(model, tmp_path / "timm")
    size = (3, *model.patch_embed.img_size)
    if arguments["img_size"] != 32:  # transformers' processors cannot crop so
        with pytest.warns(UserWarning, match="crop_mode"):
            convert(tmp_path / "timm", "tfm", tmp_path / "ours")
    else:
        convert(tmp_path / "timm", "tfm", tmp_path / "ours")
    converted = TfmSwinForImageClassification.from_pretrained(tmp_path / "ours")
    assert converted.config.window_fit == "timm" and converted.config.drop_path_rate == pytest.approx(0.1)
    expected = outputs_of(model, size)
    assert_same_outputs(outputs_of(converted, size), expected)
    convert(tmp_path / "ours", "timm", tmp_path / "back")
    assert_same_weights(tmp_path / "timm", tmp_path / "back")
    assert_same_outputs(outputs_of(timm_reads(tmp_path / "back"), size), expected)


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        ("timm", {"image_size": 36}, "timm cannot express window_fit='transformers' for images of 36 x 36 pixels"),
        ("swin", {"image_size": 36, "window_fit": "timm"}, "swin cannot express window_fit='timm' .* 'transformers'"),
        ("swin", {"image_size": 12}, "transformers fails on feature maps smaller than a window, here 3"),
        ("torchvision", {"image_size": 12}, "torchvision cannot express window_fit='transformers' .* 12 x 12 pixels"),
        ("torchvision", {"num_channels": 1}, "torchvision cannot express num_channels=1: it needs 3"),
        ("timm", {"use_shift": False}, "timm cannot express use_shift=False: it needs True"),
        ("swin", {"use_relative_position_bias": False}, "swin cannot express use_relative_position_bias=False"),
        ("timm", {"hidden_act": "relu"}, "timm cannot express hidden_act='relu': it needs 'gelu'"),
        ("vit", {}, 'no conversion of a model of type "tfm_swin" to "vit"'),
    ],
    ids=str,
)
def test_refusals(tmp_path, to, fields, message):
    ours(**fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", to, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_other_models_of_transformers_and_timm_are_refused(tmp_path):
    native = SwinForImageClassification(SwinConfig(**SHAPE, use_absolute_embeddings=True))
    native.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="cannot express use_absolute_embeddings=True: it needs False"):
        convert(tmp_path / "native", "tfm", tmp_path / "ours")
    fields = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    for number, (arguments, message) in enumerate(
        [
            ({"always_partition": True}, "cannot express always_partition=True: it needs False"),
            ({"window_size": ((4, 4), (2, 2))}, "cannot express window_size="),
        ]
    ):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **{**fields, **arguments})
        model.arguments = {**fields, **arguments}
        save_timm(model, tmp_path / f"timm{number}")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"timm{number}", "tfm", tmp_path / "ours")


@torch.no_grad()
def test_a_vision_transformer_of_timm_is_still_converted_as_one(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    model.arguments = {"depth": 1, "img_size": 32}
    save_timm(model, tmp_path / "timm")
    assert convert(tmp_path / "timm", "tfm", tmp_path / "ours")["target"]["class"] == "TfmViTForImageClassification"
