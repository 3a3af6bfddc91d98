"""Deformable DETR compiled in one graph, exported, and run by ONNX Runtime."""

import pytest
import torch
from test_detr_export import MAPS, assert_same, inputs_of
from tiny_deformable import TWO_STAGE, tiny_deformable

SHALLOW = {"encoder_layers": 1, "decoder_layers": 2, "num_feature_levels": 2}
SCALES = {**SHALLOW, "num_feature_levels": 4}
pytestmark = pytest.mark.slow
BUILDS = pytest.mark.parametrize("fields", [SCALES, {**SHALLOW, **TWO_STAGE}], ids=["four-levels", "two-stage"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "masked", "asked"),
    [
        ({**SHALLOW, **TWO_STAGE}, True, MAPS),
        (SCALES, False, {}),
    ],
    ids=str,
)
def test_forward_compiles_in_one_graph(fields, masked, asked):
    """The graph alone, run by torch as it is: what would break it does so here."""
    model, inputs = tiny_deformable(**fields), inputs_of()
    if not masked:
        del inputs["pixel_mask"]
    expected = model(**inputs, **asked)  # first, as transformers installs its hooks for outputs in an uncompiled call
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **asked)
    assert_same(output, expected)
    assert (output.cross_attentions is not None) == bool(asked)


def dynamic_shapes() -> dict:
    """Any number of images, of any size that the strides divide; the last level has a stride of 64."""
    B, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("B", "rows", "columns"))
    return {
        "pixel_values": {0: B, 2: 64 * rows, 3: 64 * columns},
        "pixel_mask": {0: B, 1: 64 * rows, 2: 64 * columns},
    }


@torch.no_grad()
@BUILDS
def test_export(fields):
    model = tiny_deformable(**fields)
    options = {"dynamic_shapes": dynamic_shapes(), "strict": False}
    program = torch.export.export(model, (), inputs_of(3, 128, 192), **options)
    for other in (inputs_of(3, 128, 192), inputs_of(5, 128, 128), inputs_of(2, 192, 256)):
        assert_same(program.module()(**other), model(**other))


@torch.no_grad()
@BUILDS
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx(fields, tmp_path):
    """ONNX Runtime gives the same outputs for another number and size of images than the export used."""
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")
    model = tiny_deformable(**fields)
    options = {"dynamo": True, "dynamic_shapes": dynamic_shapes(), "verbose": False}
    program = torch.onnx.export(model, (), kwargs=inputs_of(3, 128, 192), **options)
    program.save(tmp_path / "detr.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detr.onnx", providers=["CPUExecutionProvider"])
    for other in (inputs_of(3, 128, 192), inputs_of(5, 128, 128), inputs_of(2, 192, 256)):
        expected = model(**other)
        found = session.run(None, {name: value.numpy() for name, value in other.items()})
        names = ["logits", "pred_boxes"]  # outputs come in this order, hidden states last
        assert_same(dict(zip(names, map(torch.from_numpy, found), strict=False)), expected)
