"""With the same weights Swin computes what transformers', timm's and torchvision's compute, and shares files."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification, SwinModel

from hf_tfm import TfmSwinBackbone, TfmSwinConfig, TfmSwinForImageClassification, TfmSwinModel
from hf_tfm.conversion.timm_swin import TIMM_SWIN
from hf_tfm.conversion.torchvision_swin import TORCHVISION_SWIN, build

SHAPE = {"patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
PAIRS = {
    SwinModel: TfmSwinModel,
    SwinForImageClassification: TfmSwinForImageClassification,
    SwinBackbone: TfmSwinBackbone,
}
FIELDS = {
    "plain": {},
    "other": {"qkv_bias": False, "mlp_ratio": 2.5, "hidden_act": "relu", "num_channels": 1, "patch_size": [2, 4]},
}


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """Every weight random, in float64: deep states of such weights round differently by 1e-5 in float32."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and "norm" in name), std=0.2)
    return model.double().eval()


def images_of(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def load(model_class: type, folder: Path) -> nn.Module:
    """The model in a folder; every weight must be found, and none left over."""
    model, info = model_class.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("native_class", PAIRS, ids=lambda kind: kind.__name__)
def test_outputs_and_files_of_transformers(native_class, fields, tmp_path):
    """Images whose feature maps windows divide, and others; also smaller ones where transformers keeps its windows."""
    fields = {**SHAPE, **fields, "image_size": 32}
    if native_class is SwinBackbone:
        fields["out_features"] = ["stem", "stage1", "stage2"]
    native = drawn(native_class(SwinConfig(**fields)))
    native.save_pretrained(tmp_path / "native")
    model = load(PAIRS[native_class], tmp_path / "native")
    model.save_pretrained(tmp_path / "own")
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == model.state_dict().keys()
    if hasattr(native, "swin") and hasattr(native.swin.encoder.layers[0].blocks[0].attention, "o_proj"):
        left = native.state_dict().keys() - model.state_dict().keys()  # transformers 5.24 has the same names
        assert left == ({"swin.layernorm.weight", "swin.layernorm.bias"} if native_class is SwinBackbone else set())
    sizes = [(32, 64), (29, 75), (25, 64)] + ([(6, 40), (14, 5)] if native_class is SwinBackbone else [(16, 44)])
    options = {} if native_class is SwinBackbone else {"output_hidden_states": True}
    for size in sizes:
        # Read anew for each size, as transformers keeps the windows of the smallest.
        twin = native_class.from_pretrained(tmp_path / "native", dtype=torch.float64).eval()
        images = images_of(size, fields.get("num_channels", 3))
        got, expected = model(images, **options), twin(images, **options)
        for name in ("logits", "last_hidden_state", "pooler_output"):
            if expected.get(name) is not None:
                assert_same(got[name], expected[name])
        for name in ("feature_maps", "hidden_states", "reshaped_hidden_states"):
            if expected.get(name) is not None:
                for one, other in zip(got[name], expected[name], strict=True):
                    assert_same(one, other)


@torch.no_grad()
def test_the_last_attentions_of_a_stage_are_transformers():
    native = drawn(SwinForImageClassification(SwinConfig(**SHAPE, attn_implementation="eager")))
    model = TfmSwinForImageClassification(TfmSwinConfig(**SHAPE)).double().eval()
    model.load_state_dict(native.state_dict())
    images = images_of((30, 46))
    got, expected = model(images, output_attentions=True).attentions, native(images, output_attentions=True).attentions
    assert len(got) == 5
    for maps, others in zip((got[1], got[4]), expected, strict=True):
        torch.testing.assert_close(maps, others, rtol=0, atol=1e-6)  # theirs are rounded to float32


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (26, 44), (8, 8), (12, 40), (4, 24)], ids=str)
def test_logits_are_those_of_timm(size):
    model = drawn(TfmSwinForImageClassification(TfmSwinConfig(**SHAPE, image_size=list(size), window_fit="timm")))
    twin = timm.models.swin_transformer.SwinTransformer(
        img_size=size, patch_size=2, embed_dim=8, depths=(2, 3), num_heads=(2, 4), window_size=4, num_classes=5
    ).eval()
    twin.load_state_dict(TIMM_SWIN.weights_to_theirs(model))
    assert_same(model(images_of(size)).logits, twin.double()(images_of(size)))
    rates = [block.drop_path.rate for stage in model.swin.encoder.layers for block in stage.blocks]
    theirs = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in twin.layers for block in stage.blocks]
    assert rates == pytest.approx(theirs)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (26, 44), (29, 37), (8, 8), (12, 40), (4, 24)], ids=str)
def test_logits_are_those_of_torchvision(size):
    model = drawn(TfmSwinForImageClassification(TfmSwinConfig(**SHAPE, window_fit="torchvision")))
    twin = build(TORCHVISION_SWIN.to_theirs(model.config)).double().eval()
    twin.load_state_dict(TORCHVISION_SWIN.weights_to_theirs(model))
    assert_same(model(images_of(size)).logits, twin(images_of(size)))


@pytest.mark.parametrize(
    "size",
    [
        "tiny",
        pytest.param("small", marks=pytest.mark.slow),
        pytest.param("base", marks=pytest.mark.slow),
        pytest.param("large", marks=pytest.mark.slow),
    ],
)
def test_sizes_are_those_of_all_three(size):
    with torch.device("meta"):
        config = TfmSwinConfig.of_size(size, num_labels=1000)
        fields = {name: getattr(config, name) for name in ("embed_dim", "depths", "num_heads")}
        models = [
            TfmSwinForImageClassification(config),
            SwinForImageClassification(SwinConfig(**fields, num_labels=1000)),
            timm.create_model(f"swin_{size}_patch4_window7_224", num_classes=1000),
        ]
        if size != "large":
            models.append(getattr(torchvision.models, f"swin_{size[0]}")())
    assert len({sum(parameter.numel() for parameter in model.parameters()) for model in models}) == 1
