"""Files written by earlier versions, with the names of transformers' own classes, still load.

`tests/fixtures/native_names` explains how they were made.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from every_class import class_of, outputs_of
from old_files import DRAWN, WHOLE, drawn
from processes import clean_environment, finish, start

import hf_tfm
from hf_tfm.conversion import convert
from hf_tfm.tasks.evaluation import evaluate

FIXTURES = Path(__file__).parents[1] / "fixtures" / "native_names"


@pytest.fixture(scope="module", params=(*WHOLE, *DRAWN))
def old(request, tmp_path_factory):
    """(name, folder) of a model saved by an earlier version."""
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "old"
    shutil.copytree(FIXTURES / name, folder)
    if name in DRAWN:
        weights = drawn(json.loads((folder / "shapes.json").read_text()))
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return name, folder


def assert_outputs(model, name, folder):
    expected = safetensors.torch.load_file(folder / "outputs.safetensors")
    found = outputs_of(model, name)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_outputs_equal_those_of_the_version_that_wrote_the_file(old, tmp_path):
    name, folder = old
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    model, report = class_of(name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    if not name.startswith("transformer"):
        assert names - model.state_dict().keys(), "the file holds other names than the model"
    assert_outputs(model, name, folder)

    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    model.load_state_dict(weights, strict=True)
    again, report = class_of(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_outputs(again, name, folder)


# Classes that load the file of another class of their family, and weights that may be newly initialized.
READERS = {
    "transformer": {"TfmTransformerModel": ()},
    "bert": {"TfmBertModel": (), "TfmBertForTokenClassification": ()},
    "bert-masked": {"TfmBertForSequenceClassification": ("classifier.", "bert.pooler."), "TfmBertModel": ("pooler.",)},
    "bert-pretraining": {"TfmBertForMaskedLM": (), "TfmBertForSequenceClassification": ("classifier.",)},
    "gpt": {"TfmGPTModel": (), "TfmGPTForSequenceClassification": ("score.",)},
    "gpt-classifier": {"TfmGPTForCausalLM": ()},
    "vit": {"TfmViTBackbone": (), "TfmViTModel": ("pooler.",)},
    "mae": {"TfmViTForImageClassification": ("classifier.",), "TfmMAEModel": ()},
    "detr": {"TfmDetrModel": (), "TfmDetrForPanopticSegmentation": ("mask_head.", "bbox_attention.")},
    "detr-panoptic": {"TfmDetrForObjectDetection": (), "TfmDetrModel": ()},
}


@pytest.mark.filterwarnings("ignore")
def test_other_classes_load_the_file(old):
    name, folder = old
    for reader, fresh in READERS[name].items():
        kind = getattr(hf_tfm, reader)
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not [key for key in report["missing_keys"] if not key.startswith(fresh or "-")], report
        assert not report["mismatched_keys"] and model.dtype == torch.float32
    base = transformers.AutoModel.from_pretrained(folder)
    assert type(base).__name__.endswith("Model")
    assert type(getattr(transformers, class_of(name)._auto_class).from_pretrained(folder)) is class_of(name)


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("transformer")])
def test_file_converts_to_the_native_class(name, tmp_path):
    family = {"bert": "bert", "gpt": "gpt2", "vit": "vit", "mae": "vit_mae"}[name.split("-")[0]]
    certificate = convert(FIXTURES / name, family, tmp_path / "stock")
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    before = safetensors.torch.load_file(FIXTURES / name / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "stock" / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_run_of_an_earlier_version_is_evaluated(tmp_path):
    expected = [
        (row["name"], row["value"])
        for row in json.loads((FIXTURES / "run" / "results.json").read_text())["metrics"]
        if row["split"] == "test"
    ]
    found = evaluate(str(FIXTURES / "run"), dataset_name="number-parity", split="test", progress=False)
    scores = {row["name"]: row["value"] for row in found["metrics"]}
    assert expected and all(scores[name] == pytest.approx(value, abs=2e-3) for name, value in expected)


def test_remote_code_of_an_earlier_version_loads_its_files(tmp_path):
    """The code in the folder, not the installed package."""
    program = (
        "import sys; sys.modules['hf_tfm'] = None; from transformers import AutoModelForSequenceClassification as A; "
        f"m, r = A.from_pretrained({str(FIXTURES / 'run')!r}, trust_remote_code=True, output_loading_info=True); "
        "assert type(m).__module__.startswith('transformers_modules') and not any(r.values()), r"
    )
    environment = clean_environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    finish(start("-c", program, environment=environment, cwd=tmp_path, server="torch"))


def test_remote_code_of_the_old_run_is_unchanged():
    """Merging a renamed file could put current code into the folder, which would then no longer be an old one."""
    folder = FIXTURES / "run"
    assert "save_original_format" not in "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
