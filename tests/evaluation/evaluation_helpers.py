"""Shared helpers of the image evaluation tests: a small data set, tiny random models, and their expected outputs."""

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmViTConfig,
    TfmViTForImageClassification,
)
from hf_tfm.conversion import convert

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
COUNT = 23
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**TINY, "image_size": 16, "patch_size": 4, "initializer_range": 0.5}
DECODER = {f"decoder_{name}": value for name, value in TINY.items()}
QUIET = {"progress": False, "batch_size": 5}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def photos() -> list[Image.Image]:
    draw = np.random.RandomState(0)
    return [Image.fromarray(draw.randint(0, 256, (20, 18 + i % 3, 3), dtype=np.uint8)) for i in range(COUNT)]


LABELS = np.random.RandomState(1).randint(0, len(NAMES), COUNT).tolist()


def save_rows(folder, labels, feature, images=None) -> str:
    """Write a data set with one split, test."""
    rows = {"image": photos() if images is None else images, "label": labels}
    features = Features({"image": datasets.Image(), "label": feature})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data"), LABELS, ClassLabel(names=NAMES))


def save_model(folder, model_class, config, processor=None) -> str:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 16, "width": 16})).save_pretrained(folder)
    return str(folder)


def labels_of(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models by name."""
    folder, names = tmp_path_factory.mktemp("models"), labels_of(NAMES)
    convnext = ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], initializer_range=0.5, **names)
    half = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.5)  # TimmWrapper resizes on its own
    tfm = save_model(folder / "tfm", TfmViTForImageClassification, TfmViTConfig(**SIZES, **names))
    convert(tfm, "timm", str(folder / "timm"))  # timm's configuration format without class names
    return {
        "tfm": tfm,
        "timm": str(folder / "timm"),
        "vit": save_model(folder / "vit", ViTForImageClassification, ViTConfig(**SIZES, **names)),
        "convnext": save_model(folder / "convnext", ConvNextForImageClassification, convnext, half),
        "mae": save_model(folder / "mae", TfmMAEForPreTraining, TfmMAEConfig(**SIZES, **DECODER)),
        "vit_mae": save_model(folder / "vit_mae", ViTMAEForPreTraining, ViTMAEConfig(**SIZES, **DECODER)),
    }


def ranked(model: str) -> np.ndarray:
    """Classes ranked by score (N, classes), from the model's own processor, one image at a time."""
    loaded, processor = (
        AutoModelForImageClassification.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model),
    )
    with torch.inference_mode():
        logits = [loaded.eval()(**processor(images=photo, return_tensors="pt")).logits[0] for photo in photos()]
    return torch.stack(logits).argsort(descending=True).numpy()


def values(result) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["metrics"]}


# --- classifiers
