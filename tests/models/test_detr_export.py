"""DETR compiled to one graph, exported, and run with ONNX Runtime."""

import pytest
import torch
from tiny_detr import tiny_detr, tiny_padding, tiny_panoptic, tiny_photos
from tiny_models import largest_difference
from torch import Tensor

SIZES = ((64, 96), (32, 64), (64, 32), (64, 64), (32, 96))
OUTPUTS = ("logits", "pred_boxes", "pred_masks")


def inputs_of(rows: int = 3, height: int = 64, width: int = 96) -> dict[str, Tensor]:
    sizes = tuple((min(h, height), min(w, width)) for h, w in SIZES[:rows])
    return {
        "pixel_values": tiny_photos(rows, height, width),
        "pixel_mask": tiny_padding(sizes, height, width),
    }


def assert_same(found, expected) -> None:
    names = [name for name in OUTPUTS if name in expected]
    assert len(names) >= 2
    for name in names:
        assert expected[name].std() > 1e-2 and largest_difference(found[name], expected[name]) < 1e-4, name


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


MAPS = {"output_attentions": True, "output_hidden_states": True}


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "masked", "asked"),
    [
        (tiny_panoptic, True, MAPS),
        pytest.param(tiny_detr, False, {}, marks=pytest.mark.slow),
        pytest.param(tiny_detr, True, {}, marks=pytest.mark.slow),
        pytest.param(tiny_panoptic, False, {}, marks=pytest.mark.slow),
    ],
)
def test_forward_compiles_in_one_graph(build, masked, asked):
    """The graph alone, run eagerly by torch: graph breaks show up here."""
    model, inputs = build(), inputs_of()
    if not masked:
        del inputs["pixel_mask"]
    # The first, uncompiled call installs transformers\' output hooks.
    expected = model(**inputs, **asked)
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **asked)
    assert_same(output, expected)
    assert (output.cross_attentions is not None) == bool(asked)


@torch.no_grad()
@pytest.mark.slow  # tests/clients/test_onnx_runtime.py exports a smaller model
@pytest.mark.parametrize("build", [tiny_detr, tiny_panoptic])
def test_export(build):
    """One graph for any number of images, and any size that is a multiple of the backbone's stride."""
    model = build()
    B, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("B", "rows", "columns"))
    shapes = {
        "pixel_values": {0: B, 2: 32 * rows, 3: 32 * columns},
        "pixel_mask": {0: B, 1: 32 * rows, 2: 32 * columns},
    }
    program = torch.export.export(model, (), inputs_of(), dynamic_shapes=shapes, strict=False)
    for other in (inputs_of(), inputs_of(5), inputs_of(2, 128, 160)):
        assert_same(program.module()(**other), model(**other))


@torch.no_grad()
@pytest.mark.slow  # tests/clients/test_onnx_runtime.py exports and runs smaller models
@pytest.mark.parametrize("build", [tiny_detr, tiny_panoptic])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx(build, tmp_path):
    """ONNX Runtime on images of another number and size than in the export."""
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")
    model = build()
    B, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("B", "rows", "columns"))
    shapes = {
        "pixel_values": {0: B, 2: 32 * rows, 3: 32 * columns},
        "pixel_mask": {0: B, 1: 32 * rows, 2: 32 * columns},
    }
    program = torch.onnx.export(model, (), kwargs=inputs_of(), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "detr.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detr.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["pixel_values", "pixel_mask"]
    for other in (inputs_of(), inputs_of(5), inputs_of(2, 128, 160)):
        expected = model(**other)
        found = session.run(None, {name: value.numpy() for name, value in other.items()})
        names = [name for name in OUTPUTS if name in expected]  # outputs are in this order, hidden states last
        assert_same(dict(zip(names, map(torch.from_numpy, found), strict=False)), expected)
