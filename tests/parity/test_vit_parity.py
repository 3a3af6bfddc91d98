"""The models with the same weights match transformers' ViT and ViTMAE, and read each other's files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_tfm import TfmMAEForPreTraining, TfmMAEModel, TfmViTForImageClassification, TfmViTModel

VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,  # layers 1 and 10 must not be confused
    "num_attention_heads": 4,
    "num_labels": 5,
}
MAE = {
    **VIT,
    "num_hidden_layers": 2,
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 2,
}
PAIRS = {
    ViTModel: (ViTConfig, VIT, TfmViTModel),
    ViTForImageClassification: (ViTConfig, VIT, TfmViTForImageClassification),
    ViTMAEModel: (ViTMAEConfig, MAE, TfmMAEModel),
    ViTMAEForPreTraining: (ViTMAEConfig, MAE, TfmMAEForPreTraining),
}


@torch.no_grad()
def native_model(native_class: type, **fields) -> PreTrainedModel:
    """A native model in evaluation mode with all weights random, including position tables.

    In float64: hidden states of such weights reach 50, and their float32 rounding errors 1e-5 on some CPUs.
    """
    config_class, defaults, _ = PAIRS[native_class]
    torch.manual_seed(0)
    model = native_class(config_class(**{**defaults, **fields}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.double().eval()


def load(model_class: type, folder: Path) -> PreTrainedModel:
    """Load a saved model, with no missing and no unexpected weights."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def inputs_of(model: PreTrainedModel, size: tuple[int, int] = (16, 16), channels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixel_values": torch.randn(3, channels, *size, generator=generator, dtype=model.dtype)}
    if hasattr(model.config, "mask_ratio"):
        inputs["noise"] = torch.rand(3, (size[0] // 4) * (size[1] // 4), generator=generator, dtype=model.dtype)
    return inputs


def assert_same(got, expected, exactly: bool = False) -> None:
    """Compare every field of two outputs."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        values, others = (x if isinstance(x, tuple) else (x,) for x in (value, got[name]))
        for one, other in zip(values, others, strict=True):
            torch.testing.assert_close(other.to(one.dtype), one, rtol=0, atol=0 if exactly else 1e-6, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("native_class", "fields"),
    [
        pytest.param(ViTModel, {}, marks=pytest.mark.slow),
        (ViTModel, {"pooler_output_size": 20, "pooler_act": "relu", "qkv_bias": False}),
        pytest.param(ViTForImageClassification, {}, marks=pytest.mark.slow),
        (ViTForImageClassification, {"num_channels": 1, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
        (ViTMAEModel, {}),
        pytest.param(ViTMAEForPreTraining, {}, marks=pytest.mark.slow),
        (ViTMAEForPreTraining, {"norm_pix_loss": True, "mask_ratio": 0.5, "qkv_bias": False}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_outputs_and_files_match_in_both_directions(native_class, fields, tmp_path):
    native = native_model(native_class, **fields)
    native.save_pretrained(tmp_path / "native")
    ours = load(PAIRS[native_class][2], tmp_path / "native")
    inputs = inputs_of(native, channels=native.config.num_channels)
    expected = native(**inputs, output_hidden_states=True)
    assert expected.hidden_states[-1].std() > 0.1, "the comparison is of something"
    assert_same(ours(**inputs, output_hidden_states=True), expected)

    ours.save_pretrained(tmp_path / "ours", save_original_format=True)
    written, read = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "native"))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)
    (tmp_path / "native" / "config.json").rename(tmp_path / "ours" / "config.json")
    assert_same(load(native_class, tmp_path / "ours")(**inputs, output_hidden_states=True), expected, exactly=True)


@pytest.mark.parametrize("native_class", [ViTForImageClassification, ViTMAEForPreTraining])
def test_gradients_match(native_class, tmp_path):
    """Gradients are compared by native parameter name."""
    found = []
    native = native_model(native_class)
    native.save_pretrained(tmp_path)
    for name, model in (("a", native), ("b", load(PAIRS[native_class][2], tmp_path))):
        inputs = inputs_of(model)
        if native_class is ViTForImageClassification:
            inputs["labels"] = torch.tensor([0, 3, 1])
        loss = model(**inputs).loss
        loss.backward()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        model.save_pretrained(tmp_path / name, save_original_format=True)
        found.append((loss.item(), load_file(tmp_path / name / "model.safetensors")))
    (loss, expected), (got_loss, got) = found
    assert got_loss == pytest.approx(loss, abs=1e-6) and got.keys() == expected.keys()
    for name in expected:
        # transformers stores its fixed positions as parameters without a gradient; here they are buffers.
        if name.endswith("pos_embed") or (
            name.endswith("position_embeddings") and "mask_ratio" in vars(native.config)
        ):
            continue
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert expected[name].abs().max() > 0 or "key.bias" in name, name


@torch.no_grad()
@pytest.mark.parametrize("native_class", [ViTForImageClassification, ViTMAEModel])
@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 12), (32, 8)], ids=str)
def test_images_of_other_sizes(native_class, size, tmp_path):
    """For the MAE the encoder only: transformers' decoder resizes its table as if all patches were in one row.

    (32, 8) has as many patches as the model has positions, in another grid.
    """
    native = native_model(native_class)
    native.save_pretrained(tmp_path)
    ours, inputs = load(PAIRS[native_class][2], tmp_path), inputs_of(native, size)
    expected = native(**inputs, interpolate_pos_encoding=True)
    assert_same(ours(**inputs, interpolate_pos_encoding=True), expected)
    assert_same(ours(**inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("native_class", [ViTForImageClassification, ViTMAEModel])
def test_models_of_non_square_images(native_class, tmp_path):
    native = native_model(native_class, image_size=[8, 32])
    native.save_pretrained(tmp_path)
    inputs = inputs_of(native, (8, 32))
    assert_same(load(PAIRS[native_class][2], tmp_path)(**inputs), native(**inputs))


def test_heads_and_base_models_read_each_others_files(tmp_path):
    """A native classifier's encoder into our base, ours into the native base."""
    native = native_model(ViTForImageClassification)
    native.save_pretrained(tmp_path / "native")
    ours, info = TfmViTModel.from_pretrained(tmp_path / "native", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    inputs = inputs_of(native)
    expected = native.vit(**inputs).last_hidden_state
    torch.testing.assert_close(ours.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours", save_original_format=True)
    back, info = ViTModel.from_pretrained(
        tmp_path / "ours", config=native.config, add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(back.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-6)
