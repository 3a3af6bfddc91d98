"""Models of every family exported to every format: equal outputs and tokens, by code without this package too."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from every_class import FAMILIES, tiny
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DetrImageProcessor, PreTrainedTokenizerFast

from hf_tfm.export import export
from hf_tfm.export.formats import FORMATS
from hf_tfm.export.graphs import reason_against

CLIENTS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch"}
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
OTHERS = ("bert-reader", "gpt-classifier", "transformer-mask-predict", "detr-panoptic", "video_transformer-causal")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def client(to):
    return [
        pytest.mark.client(CLIENTS[to], PACKAGES[to]),
        pytest.mark.skipif(
            any(importlib.util.find_spec(package) is None for package in FORMATS[to].packages),
            reason=f"needs pip install hf-tfm[{to}]",
        ),
    ]


def saved(name, folder):
    model = tiny(name)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("to", [pytest.param(to, marks=client(to)) for to in FORMATS])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, to, tmp_path):
    model = saved(name, tmp_path / "model")
    if (reason := reason_against(model.config.model_type, to)) is not None:
        with pytest.raises(ValueError, match="cannot be exported"):
            export(tmp_path / "model", to, tmp_path / "out")
        pytest.skip(f"refused: {reason}")
    check(export(tmp_path / "model", to, tmp_path / "out"), tmp_path / "out")


def check(certificate, folder):
    assert certificate == json.loads((folder / "parity_certificate.json").read_text())
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate.get("greedy_tokens_equal", True)
    assert {graph["file"] for graph in certificate["graphs"].values()} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=client("onnx"))])
@pytest.mark.parametrize("name", OTHERS)
def test_other_classes(name, to, tmp_path):
    saved(name, tmp_path / "model")
    check(export(tmp_path / "model", to, tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("to", [pytest.param(to, marks=client(to)) for to in FORMATS])
@pytest.mark.parametrize("name", ["gpt"])
def test_dynamic_quantisation(name, to, tmp_path):
    if any(importlib.util.find_spec(package) is None for package in FORMATS[to].quantizing):
        pytest.skip(f"needs pip install hf-tfm[{to}]")
    saved(name, tmp_path / "model")
    certificate = export(tmp_path / "model", to, tmp_path / "out", quantize="dynamic")
    assert certificate["tolerance"] is None
    assert 0 < certificate["max_abs_difference"] < 0.1 and certificate["same_predictions"] > 0.8


def words():
    """A tokenizer of 48 words; the first are special tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, 48))])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def printed(folder):
    """Run the code of the card in the folder, without this package, with some texts or an image."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"... ..."', '"w7 w8 w9"').replace('open("...")', 'open("image.png")').replace("...", "w5 w6")
    code = code.replace("threshold=0.7", "threshold=0.0")
    Image.new("RGB", (80, 60), "red").save(folder / "image.png")
    blocked = f"import sys\nsys.modules['hf_tfm'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("to", [pytest.param(to, marks=client(to)) for to in FORMATS])
@pytest.mark.parametrize("name", ["gpt", "transformer", "bert", "detr"])
@torch.no_grad()
def test_code_of_the_card(name, to, tmp_path):
    model, tokenizer = saved(name, tmp_path / "model"), words()
    if name == "detr":
        processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
        processor.save_pretrained(tmp_path / "model")
    else:
        tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", to, tmp_path / "out")
    found = printed(tmp_path / "out")
    tokenizer.padding_side = "left" if name == "gpt" else "right"
    inputs = tokenizer(["w5 w6", "w7 w8 w9"], padding=True, return_tensors="pt", return_token_type_ids=False)
    if name == "gpt":
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[:, -20:]
        assert found == str(tokenizer.batch_decode(ids))
    elif name == "transformer":
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=1)
        assert found.splitlines() == tokenizer.batch_decode(ids, skip_special_tokens=True)
    elif name == "bert":
        labels = model(**inputs).logits.argmax(-1).tolist()
        assert found == str([model.config.id2label[label] for label in labels])
    else:
        image = Image.open(tmp_path / "out" / "image.png")
        output = model(**processor(images=image, return_tensors="pt"))
        (result,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(60, 80)])
        lines = [line.split(maxsplit=2) for line in found.splitlines()]
        assert [line[0] for line in lines] == [model.config.id2label[int(label)] for label in result["labels"]]
        boxes = torch.tensor([json.loads(line[2]) for line in lines])
        torch.testing.assert_close(boxes, result["boxes"], atol=1e-2, rtol=1e-3)
