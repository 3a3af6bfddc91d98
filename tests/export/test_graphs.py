"""Graphs of every family compute what the model computes, before any exporter; arguments and the card of an export."""

import ast
import json

import pytest
import torch
from every_class import tiny

from hf_tfm.export import export, formats
from hf_tfm.export.certificate import check
from hf_tfm.export.formats import FORMATS, require_installed, require_packages
from hf_tfm.export.graphs import graphs_of
from hf_tfm.export.usage import LOADERS, card

NAMES = [
    *("transformer", "transformer-mask-predict", "transformer-base", "rnn_seq2seq", "gpt", "bert", "bert-chooser"),
    *("long_range", "mae", "swin", "detr", "video_transformer"),
]


def runners_of(graphs):
    """The graphs themselves, as if they were exported."""
    return {graph.name: graph.module for graph in graphs}


def loaded(name):
    model = tiny(name)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("name", NAMES)
def test_graphs_compute_the_same(name):
    """The outputs are equal, and with a cache so are the tokens that `generate` returns, for padded rows too."""
    model = loaded(name)
    graphs = graphs_of(model, "onnx")
    found = check(model, graphs, runners_of(graphs))
    assert found["max_abs_difference"] <= 1e-5
    assert found.get("greedy_tokens_equal", True)
    for graph in graphs:
        assert graph.axes.keys() <= graph.inputs.keys()
        assert all(axes[0] == "batch" for axes in graph.axes.values())
    certificate = {
        **found,
        "source": {"model": name, "class": type(model).__name__},
        "graphs": {
            graph.name: {"file": graph.name, "inputs": {key: [2] for key in graph.inputs}, "outputs": ["logits"]}
            for graph in graphs
        },
    }
    for to in FORMATS:
        text = card(model.config.to_dict(), {**certificate, "target": {"format": to, "quantize": None}}, name)
        code = text.split("```python\n")[1].split("```")[0]
        ast.parse(code)
        assert "hf_tfm" not in code


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("score", ["none", "dot"])
def test_recurrent_graphs(cell, score):
    model = tiny("rnn_seq2seq", cell=cell, attention_score=score)
    graphs = graphs_of(model, "onnx")
    assert check(model, graphs, runners_of(graphs))["greedy_tokens_equal"]


@pytest.mark.parametrize("wrong", ["value", "shape", "token", "nan"])
def test_differences_are_found(wrong):
    model = tiny("gpt")
    (graph,) = graphs_of(model, "onnx")

    def run(**inputs):
        output = dict(graph.module(**inputs))
        logits = output["logits"]
        output["logits"] = {
            "value": logits + 1e-3,
            "shape": logits[..., 1:],
            "token": logits,
            "nan": logits * torch.nan,
        }[wrong]
        if wrong == "token":
            output["logits"] = logits.flip(-1)
        return output

    with pytest.raises(ValueError, match=r"the exported graph"):
        check(model, [graph], {"model": run})
    if wrong == "value":
        assert check(model, [graph], {"model": run}, exact=False)["tolerance"] is None


def test_refused_families_say_why():
    with pytest.raises(ValueError, match=r"cannot be exported to openvino: the number of detections"):
        graphs_of(tiny("faster_rcnn"), "openvino")


def test_packages_and_versions(monkeypatch):
    with pytest.raises(ValueError, match=r'to must be one of onnx, openvino, executorch, got "tflite"'):
        require_installed("tflite")
    with pytest.raises(ImportError, match=r'needs no_such_package: pip install "hf-tfm\[openvino\]"'):
        require_packages('to "openvino"', ("torch", "no_such_package"), "openvino")
    monkeypatch.setattr(formats, "LEAST_TRANSFORMERS", "99.1")
    with pytest.raises(ImportError, match=r'export needs transformers 99\.1 or later, got 5\.\S+: pip install "trans'):
        require_installed("onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, r'quantize must be one of dynamic, static, got "int4"'),
        ({"quantize": "static"}, r"calibration_data is needed for quantize \"static\""),
        ({"calibration_data": "texts.txt"}, r"calibration_data is only for quantize \"static\", got quantize None"),
        ({"quantize": "static", "calibration_data": "/no/where"}, r'calibration_data "/no/where" does not exist'),
        ({"revision": "v1"}, r'revision "v1" applies only to a model on the Hub'),
    ],
)
def test_arguments(options, message, tmp_path):
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", "onnx", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_output_folder_is_empty(tmp_path):
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export(tmp_path / "model", "onnx", tmp_path)
    with pytest.raises(ValueError, match=r"neither a local folder"):
        export(tmp_path / "model", "onnx", tmp_path / "out")


def test_loaders_are_python():
    assert LOADERS.keys() == FORMATS.keys()
    for loader in LOADERS.values():
        ast.parse(loader)


def test_certificate_is_json(tmp_path):
    model = tiny("vit")
    graphs = graphs_of(model, "onnx")
    assert json.loads(json.dumps(check(model, graphs, runners_of(graphs))))["same_predictions"] == 1
