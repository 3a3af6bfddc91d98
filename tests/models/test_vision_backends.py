"""ViT and MAE with every attention backend, gradient checkpointing, half precision, compilation and export."""

import copy

import pytest
import torch
from tiny_models import largest_difference
from tiny_vision import HYBRID, gradients, tiny_backbone, tiny_images, tiny_mae, tiny_noise, tiny_vit
from torch import Tensor

LABELS = torch.tensor([0, 4, 2])
MODELS = {
    "cls": lambda: tiny_vit(pooling="cls"),
    "mean-2d": lambda: tiny_vit(pooling="mean", position_embedding_type="learned_2d"),
    "sincos": lambda: tiny_vit(position_embedding_type="sincos_2d", representation_layer=True),
    "mae": tiny_mae,
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def inputs_of(model, rows: int = 3, loss: bool = False) -> dict[str, Tensor]:
    """Images; noise for a masked autoencoder; with ``loss`` also labels for a classifier."""
    inputs = {"pixel_values": tiny_images(rows)}
    if hasattr(model.config, "mask_ratio"):
        inputs["noise"] = tiny_noise(rows)
    elif loss:
        inputs["labels"] = LABELS[:rows]
    return inputs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@torch.no_grad()  # flex attention has no backward on a CPU
@every_model
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_backends_agree(build, backend):
    model = build()
    inputs = inputs_of(model)
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    model.set_attn_implementation(backend)
    assert largest_difference(model(**inputs).logits, expected) < 1e-5


@torch.no_grad()
@every_model
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
def test_maps_with_every_backend(build, backend):
    """Encoder maps. Flash attention needs a GPU, but with output_attentions a model computes the maps eagerly."""
    model = build()
    inputs = inputs_of(model)
    model.set_attn_implementation("eager")
    expected = model.vit(**inputs, output_attentions=True)
    assert model.vit(**inputs).attentions is None
    model.config._attn_implementation = backend
    output = model.vit(**inputs, output_attentions=True)
    T = expected.last_hidden_state.shape[1]
    assert len(output.attentions) == 3 and output.attentions[0].shape == (3, 4, T, T)
    for maps, others in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(maps, others)
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 4, T))
    assert largest_difference(output.last_hidden_state, expected.last_hidden_state) < 1e-5
    assert model.config._attn_implementation == backend


def test_maps_requested_by_the_configuration():
    model = tiny_vit(attn_implementation="eager")
    model.config.output_attentions = True
    assert len(model(tiny_images()).attentions) == 3
    assert model(tiny_images(), output_attentions=False).attentions is None


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(build, reentrant):
    found = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(**inputs_of(model, loss=True), output_attentions=True)
        assert len(output.attentions) == 3
        output.loss.backward()
        found.append(gradients(model))
    assert found[0].abs().max() > 1e-3 and largest_difference(*found) < 1e-6


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(build, dtype, tmp_path):
    """Models converted to half precision or loaded in it; fixed position tables may stay float32."""
    model = build()
    inputs = inputs_of(model, loss=True)
    expected = model(**inputs).loss.item()
    model.save_pretrained(tmp_path)
    converted = copy.deepcopy(model).to(dtype)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for half in (converted, loaded):
        output = half(**inputs)
        assert output.logits.dtype == dtype
        assert output.loss.item() == pytest.approx(expected, rel=0.03)


@every_model
def test_autocast(build):
    model = build().train()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**inputs_of(model, loss=True)).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (expected, exact), (got, rounded) = found
    assert got == pytest.approx(expected, rel=0.03) and exact.dtype == rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cls", {"output_attentions": True, "output_hidden_states": True}),
        pytest.param("mean-2d", {}, marks=pytest.mark.slow),
        pytest.param("sincos", {}, marks=pytest.mark.slow),
        pytest.param("mae", {}, marks=pytest.mark.slow),
        pytest.param("mae", {"output_attentions": True, "output_hidden_states": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_forward_compiles_in_one_graph(name, asked):
    """The graph alone, run eagerly by torch: graph breaks show up here."""
    model = MODELS[name]()
    inputs = inputs_of(model)
    # The first, uncompiled call installs transformers\' output hooks.
    expected = model(**inputs, **asked)
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **asked)
    assert largest_difference(output.logits, expected.logits) < 1e-6
    assert (output.attentions is not None) == bool(asked)


@pytest.mark.slow  # tests/models/test_text_backends.py compiles the training of the same blocks
@pytest.mark.parametrize("name", ["mean-2d", "mae"])
def test_training_compiles_in_one_graph(name):
    model = MODELS[name]()
    inputs = inputs_of(model, loss=True)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        found.append(torch.cat([loss[None], gradients(model)]))
    assert largest_difference(*found) < 1e-5


@pytest.mark.parametrize("kind", [pytest.param("vit", marks=pytest.mark.slow), "mae"])
def test_drop_path_and_random_masks_compile_in_one_graph(kind):
    build = {
        "vit": lambda: tiny_vit(drop_path_rate=0.5, hidden_dropout_prob=0.1),
        "mae": lambda: tiny_mae(drop_path_rate=0.5),
    }
    model = build[kind]().train()
    inputs = inputs_of(model, loss=True)
    inputs.pop("noise", None)
    assert torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss.isfinite()


@torch.no_grad()
def test_backbone_compiles_in_one_graph():
    model, images = tiny_backbone(out_indices=[1, 3]), tiny_images()
    expected = model(images).feature_maps
    maps = torch.compile(model, fullgraph=True, backend="eager")(images).feature_maps
    assert all(largest_difference(*pair) < 1e-6 for pair in zip(maps, expected, strict=True))


@pytest.mark.slow
@torch.no_grad()
@every_model
def test_forward_compiled_with_the_default_backend(build):
    model = build()
    inputs = inputs_of(model)
    assert largest_difference(torch.compile(model, fullgraph=True)(**inputs).logits, model(**inputs).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [pytest.param(MODELS[name], id=name, marks=pytest.mark.slow if name != "mae" else ()) for name in MODELS],
)
def test_export(build):
    """One graph for any number of images."""
    model = build()
    inputs = inputs_of(model)
    B = torch.export.Dim("B", min=2)
    shapes = {name: {0: B} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    for other in (inputs, inputs_of(model, rows=5)):
        assert largest_difference(program.module()(**other).logits, model(**other).logits) < 1e-5


@torch.no_grad()
def test_export_with_any_image_size():
    model = tiny_vit(position_embedding_type="sincos_2d")
    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    shapes = {"pixel_values": {2: 4 * rows, 3: 4 * columns}}
    images = tiny_images(2, 24, 32)
    program = torch.export.export(model, (), {"pixel_values": images}, dynamic_shapes=shapes, strict=False)
    for size in ((24, 32), (12, 40)):
        other = tiny_images(2, *size)
        assert largest_difference(program.module()(pixel_values=other).logits, model(other).logits) < 1e-5


@pytest.mark.slow  # test_onnx_runtime.py exports a model with a timm backbone
@torch.no_grad()
def test_hybrid_exports_and_compiles():
    model, images = tiny_vit(**HYBRID), tiny_images(2, 64, 64)
    expected = model(images).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert largest_difference(compiled(images).logits, expected) < 1e-5
    program = torch.export.export(model, (), {"pixel_values": images}, strict=False)
    assert largest_difference(program.module()(pixel_values=images).logits, expected) < 1e-5
