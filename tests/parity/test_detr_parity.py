"""DETR with the same weights matches transformers' DETR, and both read each other's files.

Auxiliary losses are off: with them transformers 5.23 feeds layer-normed states into the next decoder layer, which
neither the paper nor the authors do. These terms are tested against a slow reference in test_set_loss.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrModel,
    PreTrainedModel,
)

from hf_tfm import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel

TINY = {
    "backbone": "test_resnet",
    "num_queries": 7,
    "d_model": 32,
    "encoder_layers": 11,  # layers 1 and 10 must not be confused
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_labels": 5,
}
R50 = {"backbone": "resnet50", "encoder_layers": 2}
COSTS = {"class_cost": 2, "giou_cost": 1, "eos_coefficient": 0.3}
MASKS = {"mask_loss_coefficient": 3, "dice_loss_coefficient": 2}
PAIRS = {
    DetrModel: TfmDetrModel,
    DetrForObjectDetection: TfmDetrForObjectDetection,
    DetrForSegmentation: TfmDetrForPanopticSegmentation,
}
CASES = pytest.mark.parametrize(
    ("native_class", "fields"),
    [
        (DetrModel, {}),
        (DetrForObjectDetection, {}),
        pytest.param(DetrForObjectDetection, R50, marks=pytest.mark.slow),
        pytest.param(DetrForObjectDetection, {**R50, "dilation": True}, marks=pytest.mark.slow),
        (DetrForObjectDetection, {"position_embedding_type": "learned", "activation_function": "gelu"}),
        (DetrForObjectDetection, {"num_channels": 1, "encoder_layers": 1, "decoder_layers": 3}),
        (DetrForSegmentation, {}),
        (DetrForSegmentation, R50),
        pytest.param(
            DetrForSegmentation,
            {"d_model": 64, "backbone": "resnet18", "encoder_attention_heads": 16},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else " ".join(map(str, value.values())),
)


@torch.no_grad()
def native_model(native_class: type, **fields) -> PreTrainedModel:
    """A native model in evaluation mode with all weights and norm statistics random."""
    torch.manual_seed(0)
    model = native_class(DetrConfig(**{**TINY, **fields})).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
    return model


def load(model_class: type, folder: Path) -> PreTrainedModel:
    """Load a saved model, with no missing and no unexpected weights."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def inputs_of(model: PreTrainedModel, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, mask = torch.randn(2, model.config.num_channels, 96, 128, generator=generator), torch.ones(2, 96, 128)
    if padded:
        mask[1, 70:] = mask[1, :, 100:] = 0  # inside a cell of the last feature map
        images = images * mask[:, None]
    return {"pixel_values": images, "pixel_mask": mask.long()}


def targets() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    labels = []
    for count, size in ((4, (96, 128)), (1, (70, 100))):
        boxes = torch.rand(count, 4, generator=generator) * 0.5 + 0.1
        masks = (torch.rand(count, *size, generator=generator) > 0.5).float()
        classes = torch.randint(5, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": boxes, "masks": masks})
    return labels


OUTPUTS = ("logits", "pred_boxes", "pred_masks", "last_hidden_state", "encoder_last_hidden_state")


def assert_same(got, expected, exactly: bool = False) -> None:
    """Compare all hidden states and the fields that both outputs have."""
    names = [name for name in OUTPUTS if expected.get(name) is not None]
    assert {"last_hidden_state", "encoder_last_hidden_state"} <= set(names)
    for name in names:
        assert expected[name].std() > 0.01, f"the comparison of {name} is of something"
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0 if exactly else 5e-5, msg=name)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0 if exactly else 5e-5, msg=name)


@torch.no_grad()
@CASES
def test_outputs_and_files_match_in_both_directions(native_class, fields, tmp_path):
    native = native_model(native_class, **fields)
    native.save_pretrained(tmp_path / "native")
    ours = load(PAIRS[native_class], tmp_path / "native")
    for padded in (True, False):
        inputs = inputs_of(native, padded)
        assert_same(ours(**inputs, output_hidden_states=True), native(**inputs, output_hidden_states=True))

    ours.save_pretrained(tmp_path / "ours", save_original_format=True)
    written, read = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "native"))
    read = {name: value for name, value in read.items() if not name.endswith("num_batches_tracked")}
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    (tmp_path / "native" / "config.json").rename(tmp_path / "ours" / "config.json")
    back = load(native_class, tmp_path / "ours")
    assert_same(back(**inputs, output_hidden_states=True), native(**inputs, output_hidden_states=True), exactly=True)


@torch.no_grad()
def test_attention_maps_match(tmp_path):
    native = native_model(DetrForObjectDetection)
    native.save_pretrained(tmp_path)
    native.set_attn_implementation("eager")
    inputs = inputs_of(native)
    expected = native(**inputs, output_attentions=True)
    got = load(TfmDetrForObjectDetection, tmp_path)(**inputs, output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


@pytest.fixture
def float64():
    """float32 rounding flips ReLUs. transformers' loss creates its class weights in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("native_class", "fields"),
    [
        (DetrForObjectDetection, {"encoder_layers": 2, **COSTS}),
        (DetrForSegmentation, {"encoder_layers": 2, **MASKS}),
        pytest.param(DetrForObjectDetection, {**R50, **COSTS}, marks=pytest.mark.slow),
        pytest.param(DetrForSegmentation, {**R50, **MASKS}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else " ".join(map(str, value.values())),
)
def test_losses_and_gradients_match(native_class, fields, tmp_path, float64):
    """Gradients are compared by native parameter name."""
    found = []
    native = native_model(native_class, **fields)
    native.save_pretrained(tmp_path)
    for name, model in (("native", native), ("ours", load(PAIRS[native_class], tmp_path))):
        output = model.double()(**inputs_of(model), labels=targets())
        output.loss.backward()
        learned = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
        for parameter in model.parameters():
            parameter.data = parameter.grad if id(parameter) in learned else torch.zeros_like(parameter)
        model.save_pretrained(tmp_path / name, save_original_format=True)
        found.append((output, load_file(tmp_path / name / "model.safetensors")))
    (expected, gradients), (got, own) = found
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert got.loss_dict.keys() == expected.loss_dict.keys()
    for name, term in expected.loss_dict.items():
        assert got.loss_dict[name].item() == pytest.approx(term.item(), rel=1e-4), name
    whole = torch.cat([value.flatten() for value in gradients.values()]).norm()
    compared = 0
    for name, value in own.items():
        # transformers freezes no weight of a timm backbone; here the stem and the first stage are frozen.
        if "running" in name or "num_batches" in name or (".conv_encoder." in name and not value.any()):
            continue
        if ".conv_encoder." in name and gradients[name].ndim == 1:
            continue  # scales and shifts of frozen norms, which are not trained in either model
        difference = (value - gradients[name]).norm()
        assert difference <= 1e-4 * gradients[name].norm() + 1e-7 * whole, name
        compared += value.any().item()
    assert compared > 60, "the comparison is of something"


def test_heads_and_base_models_read_each_others_files(tmp_path):
    """A native detector's base into ours, ours into the native base, and a detector into both panoptic models."""
    native = native_model(DetrForObjectDetection, encoder_layers=1)
    native.save_pretrained(tmp_path / "native")
    inputs = inputs_of(native)
    with torch.no_grad():
        expected = native.model(**inputs).last_hidden_state
        logits = native(**inputs).logits
    ours, info = TfmDetrModel.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(ours.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours", save_original_format=True)
    back, info = DetrModel.from_pretrained(tmp_path / "ours", config=native.config, output_loading_info=True)
    assert {name.split(".")[-1] for name in info["missing_keys"]} <= {"num_batches_tracked"}
    torch.testing.assert_close(back.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)
    panoptic, info = TfmDetrForPanopticSegmentation.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"bbox_attention", "mask_head"}
    torch.testing.assert_close(panoptic.eval()(**inputs).logits, logits, rtol=0, atol=1e-5)
