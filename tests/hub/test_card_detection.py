"""The model card of detectors: full text, runnable code, and scores in the training curve."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread
from PIL import Image
from test_card import RECORD
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.hub.card import write_card
from hf_tfm.hub.curve import plot_history
from hf_tfm.hub.results import RunRecord, read_history

GOLDEN = Path(__file__).with_name("card_detection.golden.md")
SIZES = {
    **{"backbone": "test_resnet", "num_queries": 5, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    **{
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "id2label": {0: "cat", 1: "dog"},
        "label2id": {"cat": 0, "dog": 1},
    },
}
CHANGES = {
    "task": "object-detection",
    "model_type": "tfm_detr",
    "data": {
        "path": "user/pets",
        "name": None,
        "revision": "5503434ddd753f426f4b38109466949a1217c2bb",
        "fingerprint": {"train": "0a1b2c", "validation": "3d4e5f"},
        "license": "cc-by-4.0",
        "image_column": "image",
        "objects_column": "annotations",
        "rows": {"train": 205, "validation": 87},
    },
    "arguments": {
        "output_dir": "runs/pets",
        "learning_rate": 1e-4,
        "model_name_or_path": None,
        "pretrained_backbone": True,
    },
    "command": "hf-tfm run detection_train --config finetune_small",
    "metrics": [
        {"name": "AP", "value": 0.41234, "split": "validation"},
        {"name": "AP50", "value": 0.75, "split": "validation"},
    ],
}


def write_history(folder: Path, *names: str) -> None:
    rows = [{"step": step, "epoch": 0, "loss": 5.0 - step / 100, "learning_rate": 1e-4} for step in range(20, 201, 20)]
    for step in (100, 200):
        scores = {name: step / (300 + 100 * i) for i, name in enumerate(names)}
        rows.append({"step": step, "epoch": 0, "evaluation": {"loss": 4.5, "class": 2.0, **scores}})
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """The files of a run's folder that its card uses."""
    folder = tmp_path / "pets"
    TfmDetrConfig(architectures=["TfmDetrForObjectDetection"], **SIZES).save_pretrained(folder)
    write_history(folder, "AP", "AP50")
    return folder


def record(**changes) -> RunRecord:
    return RunRecord.from_dict({**json.loads(json.dumps(RECORD)), **CHANGES, **changes})


def test_card_text(folder):
    path = write_card(folder, record())
    assert path.read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")
    card = ModelCard.load(path)
    assert card.data.pipeline_tag == "object-detection"
    assert card.data.eval_results[0].metric_value == 0.41234


def test_card_states_the_initial_weights(folder):
    sentences = {
        "trained from scratch except for timm's pretrained backbone `test_resnet`, for": {},
        "trained from scratch for object-detection": {"arguments": {"pretrained_backbone": False}},
        "initialised from `user/detr` and trained for": {
            "base_model": "user/detr",
            "arguments": {"pretrained_backbone": False},
        },
    }
    for words, changes in sentences.items():
        text = write_card(folder, record(**changes)).read_text()
        assert words in text
        assert all(other == words or other not in text for other in sentences)


@torch.no_grad()
def save_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "native":
        native = {key: value for key, value in SIZES.items() if key != "backbone"}
        backbone = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}
        model = DetrForObjectDetection(DetrConfig(**native, use_timm_backbone=False, backbone_config=backbone))
        head = model.class_labels_classifier
    else:
        owner = TfmDetrForPanopticSegmentation if kind == "panoptic" else TfmDetrForObjectDetection
        model = owner(TfmDetrConfig(**SIZES))
        head = model.detr.class_labels_classifier if kind == "panoptic" else model.class_labels_classifier
    head.weight.zero_(), head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # confident in class "dog"
    if kind == "panoptic":
        model.mask_head.last.weight.zero_(), model.mask_head.last.bias.fill_(5.0)  # everywhere
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["detection", "panoptic", "native"])
def test_code_in_the_card_runs(kind, folder, tmp_path, capsys, monkeypatch):
    shutil.rmtree(folder)
    folder.mkdir()
    save_model(folder, kind)
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    text = write_card(folder, record()).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace('"..."', '"a.png"')
    auto = "AutoModelForObjectDetection" if kind != "panoptic" else "AutoModelForImageSegmentation"
    assert f"model = {auto}.from_pretrained(model_id{'' if kind == 'native' else ', trust_remote_code=True'})" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    if kind == "panoptic":
        assert printed[-1].split()[1] == "dog"
    else:
        assert [line.split()[0] for line in printed] == ["dog"] * 5


def test_scores_are_in_the_curve(folder):
    losses, scores, rates = plot_history(read_history(folder), "pets").axes
    lines = {line.get_label(): line for line in scores.get_lines()}
    assert set(lines) == {"AP", "AP50"} and scores.get_ylim() == (0, 1)
    np.testing.assert_allclose(lines["AP"].get_xdata(), [100, 200])
    np.testing.assert_allclose(lines["AP50"].get_ydata(), [0.25, 0.5])
    assert {line.get_label() for line in losses.get_lines()} == {"training", "evaluation"} and rates.get_lines()
    write_card(folder, record())
    assert imread(folder / "training_curve.png").shape[:2] == (840, 960)
    write_history(folder, "AP", "AP50", "PQ")
    assert len(plot_history(read_history(folder), "pets").axes[1].get_lines()) == 3
    write_history(folder)
    assert len(plot_history(read_history(folder), "pets").axes) == 2, "without scores there is no such panel"
