"""Shared helpers of the image recipe tests: a few images on disk, short runs, and access to their results."""

import io
import runpy
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from recipe_helpers import ROOT, fresh_state, record
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

CLASSES = ["ant", "bee", "cat"]
SPLITS = {"train": 24, "validation": 9, "test": 7}
ENCODER = "patch_size: 4, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
DECODER = (
    "decoder_hidden_size: 16, decoder_intermediate_size: 32, decoder_num_hidden_layers: 1, "
    "decoder_num_attention_heads: 2"
)
VIT, MAE = f"{{{ENCODER}, drop_path_rate: 0.0}}", f"{{{ENCODER}, {DECODER}}}"


def image_file(number: int) -> bytes:
    """A PNG of 18 x 20 pixels, whose color shows its class, number % 3."""
    noise = np.random.default_rng(number).integers(0, 160, (20, 18, 3))
    noise[..., number % 3] += 90
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def numbers_of(split: str) -> list[int]:
    """Image numbers of a split grouped by class, as in an image folder."""
    start = {"train": 0, "validation": 24, "test": 33}[split]
    return sorted(range(start, start + SPLITS[split]), key=lambda number: (number % 3, number))


def write_images(folder: Path, bad: tuple[int, ...] = ()) -> Path:
    """Write parquet with 24 training, 9 validation and 7 test images; training images in ``bad`` are truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    for split in SPLITS:
        rows = []
        for row, number in enumerate(numbers_of(split)):
            data = image_file(number)
            data = data[:60] if split == "train" and row in bad else data
            rows.append({"image": {"bytes": data, "path": None}, "label": number % 3})
        Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Noise\n")
    return folder


def write_imagefolder(folder: Path) -> Path:
    """Write the same images as files."""
    for split in SPLITS:
        for number in numbers_of(split):
            class_folder = folder / split / CLASSES[number % 3]
            class_folder.mkdir(parents=True, exist_ok=True)
            (class_folder / f"{number:03}.png").write_bytes(image_file(number))
    return folder


def command_line(recipe: str, data: Path, output_dir: Path, **options) -> list[str]:
    """Command-line arguments of a short run; options that are None are omitted."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "image_size": 16,
        "max_steps": 3,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
        "batch_size": 8,
        "learning_rate": 0.01,
        "size": "tiny",
        "progress": "false",
        "final_weights": "last",
        **({"test_splits": "[test]"} if recipe == "image_classification_train" else {}),
        **(
            {}
            if "model_name_or_path" in options
            else {"model": VIT if recipe == "image_classification_train" else MAE}
        ),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def run(recipe: str, data: Path, output_dir: Path, **options) -> Path:
    """Run a recipe in this process; returns its folder."""
    fresh_state()
    script = str(ROOT / "recipes" / f"{recipe}.py")
    assert runpy.run_path(script)["main"](command_line(recipe, data, output_dir, **options)) == 0
    return output_dir


def classify(data: Path, output_dir: Path, **options) -> Path:
    return run("image_classification_train", data, output_dir, **options)


def pretrain(data: Path, output_dir: Path, **options) -> Path:
    return run("mae_pretrain", data, output_dir, **options)


def scores(folder: Path, split: str) -> dict[str, float]:
    """Scores of a split in results.json."""
    return {row["name"]: row["value"] for row in record(folder).metrics if row["split"] == split}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def distance(one: Path, other: Path, key_biases: bool = True) -> float:
    """The largest difference between two models' weights.

    Args:
        key_biases: False leaves out biases of key projections, whose gradient is rounding alone, which Adam scales to
            full steps: runs that compute the same in another order differ in them.
    """
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    names = [name for name in mine if key_biases or not name.endswith("k_proj.bias")]
    return max((mine[name].float() - theirs[name].float()).abs().max().item() for name in names)


def accuracy(folder: Path, data: Path, split: str) -> float:
    """Top-1 accuracy of a saved model and processor, computed with transformers only."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = load_dataset(str(data), split=split)
    with torch.no_grad():
        logits = model(**processor([row["image"] for row in rows], return_tensors="pt")).logits
    names = [model.config.id2label[i] for i in logits.argmax(dim=-1).tolist()]
    return sum(name == CLASSES[row["label"]] for name, row in zip(names, rows, strict=True)) / len(rows)
