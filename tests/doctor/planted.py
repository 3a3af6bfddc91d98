"""Shared helpers of the doctor tests: a small healthy data set to plant faults in, and ways to run the checks."""

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_tfm.doctor import detection, splits
from hf_tfm.doctor.findings import Finding

NAMES = ["red", "green", "blue"]
HEIGHT, WIDTH = 64, 96
COUNTS = {"train": 24, "validation": 8}
FIRST_ID = {"train": 100, "validation": 900}
# A model that is built quickly; with these options no check fails.
MODEL = (
    "{backbone: test_efficientnet, dilation: true, num_queries: 10, d_model: 64, encoder_layers: 1, "
    "encoder_attention_heads: 8, encoder_ffn_dim: 128, decoder_layers: 2, decoder_attention_heads: 8, "
    "decoder_ffn_dim: 128"
)
OPTIONS = {
    "config": "digits",
    "data": "planted",
    "test_splits": "[]",
    "num_train_epochs": 2000,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "shortest_side": 64,
    "longest_side": 96,
    "mixed_precision": "no",
    "model": MODEL + "}",
}
Rows = dict[str, list[dict[str, Any]]]


def png(pixels: np.ndarray, **options) -> bytes:
    """Encode a (h, w, 3) uint8 image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def scene(split: str, number: int) -> dict[str, Any]:
    """A row with three rectangles side by side, in the colours of their classes, on noise."""
    random = np.random.default_rng([len(split), number])
    pixels = random.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    boxes = []
    for column, category in enumerate(random.permutation(3).tolist()):
        left, top = 32 * column + int(random.integers(0, 5)), int(random.integers(0, 18))
        width, height = int(random.integers(22, 28)), int(random.integers(34, 46))
        pixels[top : top + height, left : left + width, category] += 180
        boxes.append({"bbox": [left, top, width, height], "category": category})
    return {"image": png(pixels), "image_id": FIRST_ID[split] + number, "objects": boxes}


@functools.cache
def scenes() -> Rows:
    """Rows of every split; images are bytes, categories indices into `NAMES`."""
    return {split: [scene(split, number) for number in range(count)] for split, count in COUNTS.items()}


def healthy() -> Rows:
    """Rows of every split, to be changed by the caller."""
    return copy.deepcopy(scenes())


def boxes_of(rows: Rows, split: str = "train") -> list[dict[str, Any]]:
    """All objects of a split."""
    return [o for row in rows[split] for o in row["objects"]]


def as_splits(rows: Rows, category: Any = None, names: dict[str, list[str]] | None = None) -> DatasetDict:
    """Rows in the form that `load_splits` returns.

    Args:
        category: feature of categories; default, a ClassLabel.
        names: class names by split; default, `NAMES`.
    """
    found = DatasetDict()
    for split, own in rows.items():
        kind = category or ClassLabel(names=(names or {}).get(split, NAMES))
        crowds = (
            {"iscrowd": Value("bool")} if any("iscrowd" in found for row in own for found in row["objects"]) else {}
        )
        objects = List({"bbox": List(Value("float32"), length=4), "category": kind, **crowds})
        columns = {"image": ImageFeature(), "image_id": Value("int64"), "objects": objects}
        columns |= {name: Value("int32") for name in ("height", "width") if name in own[0]}
        table = {name: [row[name] for row in own] for name in columns}
        table["image"] = [{"bytes": data, "path": None} for data in table["image"]]
        plain = columns | {"objects": List(objects.feature | {"category": kind if category else Value("int64")})}
        rows_of_split = Dataset.from_dict(table, features=Features(plain))
        # As in a parquet file: `datasets` itself would refuse a category without a name.
        found[split] = Dataset(rows_of_split.data, info=DatasetInfo(features=Features(columns)))
    return found


def command_line(**options) -> list[str]:
    """Command-line arguments; options that are None are omitted."""
    given = {name: value for name, value in (OPTIONS | options).items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def examine(monkeypatch, data: DatasetDict, learn: bool = False, full: bool = False, **options) -> list[Finding]:
    """Findings for some splits; without ``learn``, the overfitting test is skipped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setattr(splits, "load_splits", lambda *args: data)
    _, args, _ = detection.parse(command_line(**options))
    return list(detection.examine(args, full=full, quick=not learn))


def only(findings: list[Finding], check: str, level: str = "failed") -> Finding:
    """The only finding of a check at a level."""
    (found,) = [finding for finding in findings if (finding.check, finding.level) == (check, level)]
    return found


def plant(change: Callable[[Rows], None]) -> Rows:
    """Healthy rows with a fault planted by ``change``."""
    rows = healthy()
    change(rows)
    return rows


def decode_png(data: bytes) -> np.ndarray:
    """(h, w, 3) uint8."""
    return np.array(Image.open(io.BytesIO(data)))
