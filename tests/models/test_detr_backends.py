"""DETR with every attention backend, gradient checkpointing and half precision."""

import copy

import pytest
import torch
from tiny_detr import PLAIN, relative_difference, tiny_detr, tiny_labels, tiny_padding, tiny_panoptic, tiny_photos
from tiny_models import largest_difference
from tiny_vision import gradients

MODELS = {
    "detection": tiny_detr,
    "pre-norm": lambda **fields: tiny_detr(norm_first=True, **fields),
    "learned": lambda **fields: tiny_detr(position_embedding_type="learned", auxiliary_loss=False, **fields),
    "panoptic": tiny_panoptic,
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def inputs_of(loss: bool = False) -> dict:
    """A padded batch; with ``loss`` also its objects."""
    inputs = {"pixel_values": tiny_photos(), "pixel_mask": tiny_padding(((64, 96), (32, 64), (64, 32)))}
    return {**inputs, "labels": tiny_labels(size=(64, 96))} if loss else inputs


@torch.no_grad()  # flex attention has no backward on a CPU
@every_model
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [True, False])
def test_backends_agree(build, backend, padded):
    model, inputs = build(), inputs_of()
    if not padded:
        del inputs["pixel_mask"]
    model.set_attn_implementation("eager")
    expected = model(**inputs)
    model.set_attn_implementation(backend)
    output = model(**inputs)
    for name in ("logits", "pred_boxes", "pred_masks"):
        if name in expected:
            assert expected[name].std() > 1e-2 and largest_difference(output[name], expected[name]) < 1e-4, name


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(build, reentrant):
    found = []
    for checkpointing in (False, True):
        model = build(**PLAIN).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(**inputs_of(loss=True), output_attentions=True)
        assert len(output.cross_attentions) == 3
        output.loss.backward()
        found.append(gradients(model))
    assert found[0].abs().max() > 1e-3 and relative_difference(found[1], found[0]) < 1e-5


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(build, dtype, tmp_path):
    """Models converted to half precision or loaded in it; images may be float32. The loss is float32."""
    model, inputs = build(), inputs_of(loss=True)
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    for half in (copy.deepcopy(model).to(dtype), type(model).from_pretrained(tmp_path, dtype=dtype).eval()):
        output = half(**inputs)
        assert output.logits.dtype == output.pred_boxes.dtype == dtype and output.loss.dtype == torch.float32
        assert relative_difference(output.logits.float(), expected.logits) < 0.05
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.1)
        output.loss.backward()
        assert gradients(half).isfinite().all()


@every_model
def test_autocast(build):
    model = build(**PLAIN).train()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**inputs_of(loss=True))
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        found.append((output.loss.item(), gradients(model)))
    (expected, exact), (got, rounded) = found
    assert got == pytest.approx(expected, rel=0.05) and exact.dtype == rounded.dtype == torch.float32
    assert relative_difference(rounded, exact) < 0.3  # the matching may differ where two costs are nearly equal
