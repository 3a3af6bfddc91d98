"""Classifiers convert to timm models and back."""

from contextlib import nullcontext

import pytest
import timm
import torch
from convert_helpers import TINY, assert_same_outputs, config_of, ours, outputs_of, save_timm, timm_reads, timm_vit
from test_convert import assert_same_weights
from torchvision.transforms.functional import to_pil_image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTImageProcessor,
)

from hf_tfm import (
    TfmViTConfig,
    TfmViTForImageClassification,
)
from hf_tfm.conversion import convert
from hf_tfm.conversion.timm_vit import TIMM


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"global_pool": "avg", "num_classes": 3},
        {"qkv_bias": False, "act_layer": "relu", "img_size": (32, 64), "mlp_ratio": 2.5},
    ],
)
def test_timm_to_ours_and_back(tmp_path, arguments):
    model = timm_vit(**arguments)
    save_timm(model, tmp_path / "timm")
    square = "img_size" not in arguments
    with nullcontext() if square else pytest.warns(UserWarning, match="crop_mode='center' .* for images of 32 x 64"):
        certificate = convert(tmp_path / "timm", "tfm", tmp_path / "ours")
    assert (tmp_path / "ours" / "preprocessor_config.json").is_file() is square
    converted = TfmViTForImageClassification.from_pretrained(tmp_path / "ours")
    size = (3, *model.patch_embed.img_size)
    expected = outputs_of(model, size)
    assert_same_outputs(outputs_of(converted, size), expected)
    assert certificate["source"]["class"] == "VisionTransformer"
    assert converted.config.pooling == ("mean" if "global_pool" in arguments else "cls")
    convert(tmp_path / "ours", "timm", tmp_path / "back")
    assert_same_weights(tmp_path / "timm", tmp_path / "back")
    assert_same_outputs(outputs_of(timm_reads(tmp_path / "back"), size), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_ours_to_timm_and_back(tmp_path, pooling):
    model = ours(pooling=pooling, hidden_act="gelu_pytorch_tanh")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "timm", tmp_path / "timm")
    read = timm_reads(tmp_path / "timm")
    assert read.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    expected = outputs_of(model, (3, 32, 32))
    assert_same_outputs(outputs_of(read, (3, 32, 32)), expected)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "timm")
    assert type(wrapped).__name__ == "TimmWrapperForImageClassification" and wrapped.config.id2label[2] == "owl"
    assert_same_outputs(outputs_of(wrapped, (3, 32, 32)), expected)
    convert(tmp_path / "timm", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "back")


@pytest.mark.parametrize("hidden_size", [40, 48, 56, 104])
def test_widths_without_an_exact_ratio(tmp_path, hidden_size):
    """timm stores the MLP width as a ratio, which it rounds down."""
    for width in range(1, 4 * hidden_size):
        config = TfmViTConfig(**{**TINY, "hidden_size": hidden_size, "intermediate_size": width})
        assert int(hidden_size * TIMM.to_theirs(config)["model_args"]["mlp_ratio"]) == width


def test_image_processor_in_timm_format(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    squashed = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 3}
    ViTImageProcessor(**squashed).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "timm", tmp_path / "timm")
    data = timm.data.resolve_model_data_config(timm_reads(tmp_path / "timm"))
    assert list(data["mean"]) == [0.1, 0.2, 0.3] and data["interpolation"] == "bicubic"
    assert data["crop_mode"] == "squash" and data["crop_pct"] == 1.0 and list(data["input_size"]) == [3, 32, 32]

    # 80 / 0.9 is 88: an even margin, because the libraries round odd ones differently.
    save_timm(timm_vit(img_size=80), tmp_path / "peer")
    convert(tmp_path / "peer", "tfm", tmp_path / "back")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back")
    data = timm.data.resolve_model_data_config(timm_reads(tmp_path / "peer")) | {"input_size": (3, 80, 80)}
    assert data["crop_pct"] == 0.9 and data["crop_mode"] == "center"
    generator = torch.Generator().manual_seed(0)
    # A smooth image, because resized noise depends most on rounding; 90 x 60, so that cropping and squashing differ.
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 4, generator=generator), (90, 60), mode="bicubic")
    image = (image[0].clamp(0, 1) * 255).byte()
    picture = to_pil_image(image)
    expected = timm.data.create_transform(**data)(picture)
    found = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert found.shape == expected.shape == (3, 80, 80)
    squashed = ViTImageProcessor(**{**squashed, "size": {"height": 80, "width": 80}})(picture, return_tensors="pt")
    # PIL and torchvision round and treat borders differently; cropping instead of squashing would differ much more.
    assert (found - expected).abs().mean() < 0.02 < 0.1 < (squashed["pixel_values"][0] - expected).abs().mean()
