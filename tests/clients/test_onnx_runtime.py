"""ONNX Runtime gives equal outputs for a class of every family that exports, also for other batches and lengths."""

import pytest
import torch
from every_class import CLASSES, FAMILIES, inputs_of, tiny
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
FAST = ("bert",)  # `make test-slow` tries the other families
# torch.export refuses a number of detections that depends on the image, as torchvision's suppression of boxes has.
# The graph of rnn_seq2seq unrolls its steps, and so has one length.
EXPORTED = [name for name in FAMILIES if name not in ("faster_rcnn", "rnn_seq2seq")]
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")


def shapes_of(inputs: dict[str, Tensor]) -> dict[str, dict[int, object]]:
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=24)
    return {key: {0: batch, 1: length} if value.dtype == torch.long else {0: batch} for key, value in inputs.items()}


@pytest.mark.client("ONNX Runtime", "onnxruntime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED]
)
@torch.no_grad()
def test_outputs_are_equal(name, tmp_path):
    model = tiny(name, **({"decoder_layers": 1} if "decoder_layers" in CLASSES[name][1] else {}))
    model.config.use_cache = False
    inputs = inputs_of(name, 3)
    options = {"use_cache": False} if name in ("gpt", "transformer") else {}
    program = torch.onnx.export(
        model,
        (),
        kwargs={**inputs, **options},
        dynamo=True,
        dynamic_shapes={**shapes_of(inputs), **dict.fromkeys(options)},
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    others = [inputs, inputs_of(name, 5, seed=1)]
    if "input_ids" in inputs:
        shorter = {key: value[:, :6].clone() for key, value in inputs_of(name, 2, seed=2).items()}
        shorter["attention_mask"][0, 4:] = 0
        others.append(shorter)
    for other in others:
        found = session.run(None, {each.name: other[each.name].numpy() for each in session.get_inputs()})
        expected = tree_leaves(model(**other, **options))  # in the order of the exported graph
        assert len(found) == len(expected) >= 1
        for one, tensor in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), tensor, rtol=1e-4, atol=1e-4)
