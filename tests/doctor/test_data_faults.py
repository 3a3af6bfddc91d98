"""``hf-tfm doctor data``: each fault, planted in healthy data of a task, is found."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Value

from hf_tfm import cli
from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.doctor.data import find_task

WORDS = ["red", "green", "blue", "small", "large", "round", "square", "old"]
WORDS += ["new", "warm", "cold", "quick", "slow", "loud", "quiet", "soft"]
CLASSES = ["animal", "plant"]


def sentence(number: int) -> str:
    """A different sentence for each number below 4,096."""
    return " ".join(WORDS[(number >> shift) & 15] for shift in (0, 4, 8))


def png(seed: int, side: int = 12, blank: bool = False) -> dict:
    """An image as `datasets` stores it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels * (not blank)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def texts(start: int, count: int) -> list[dict]:
    return [{"text": sentence(start + i), "label": CLASSES[i % 2]} for i in range(count)]


def pairs(start: int, count: int) -> list[dict]:
    return [{"en": sentence(start + i), "de": sentence(start + i)[::-1]} for i in range(count)]


def image_rows(start: int, count: int) -> list[dict]:
    return [{"image": png(start + i), "label": i % 2} for i in range(count)]


HEALTHY = {
    "text_classification": {"train": texts(0, 40), "validation": texts(100, 10)},
    "language_modeling": {
        "train": [{"text": sentence(i)} for i in range(40)],
        "validation": [{"text": sentence(100 + i)} for i in range(10)],
    },
    "translation": {"train": pairs(0, 40), "validation": pairs(100, 10)},
    "image_classification": {"train": image_rows(0, 40), "validation": image_rows(100, 10)},
}


def preferences(start: int, count: int) -> list[dict]:
    return [{"prompt": sentence(start + i), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


HEALTHY["supervised_fine_tuning"] = {
    split: [{"instruction": row["en"], "output": row["de"]} for row in rows]
    for split, rows in HEALTHY["translation"].items()
}
HEALTHY["preference_optimization"] = {"train": preferences(0, 40), "validation": preferences(100, 10)}
HEALTHY["video_forecasting"] = {
    "train": [{"frames": [png(10 * i + k) for k in range(4)]} for i in range(12)],
    "validation": [{"frames": [png(1000 + 10 * i + k) for k in range(5)]} for i in range(3)],
}
OPTIONS = {"translation": ["--source_column", "en", "--target_column", "de"]}


def put(split: str, column: str, rows, value):
    """A fault that replaces values of some rows; a function is called with the row index."""

    def plant(splits):
        for row in rows:
            splits[split][row][column] = value(row) if callable(value) else value

    return plant


# name: task, fault, further options, check, level, split and row of the sample (None: any), text
FAULTS = {
    "equal completions": (
        *("preference_optimization", put("train", "rejected", range(9), lambda row: f"yes {row}"), []),
        *("equal_completions", "warning", 0, "9 of 40 pairs have equal sides"),
    ),
    "no completion": (
        *("supervised_fine_tuning", put("train", "output", [3], None), []),
        *("reading", "failed", None, 'column "completion" must hold a text or a conversation, got None in row 3'),
    ),
    "unreadable frame": (
        *("video_forecasting", put("train", "frames", [5], [png(0), {"bytes": b"no image", "path": None}]), []),
        *("frames_of_videos", "failed", 5, "12 of 12 videos decoded, 1 are unreadable"),
    ),
    "video of one frame": (
        *("video_forecasting", put("validation", "frames", [2], [png(0)]), []),
        *("frames_of_videos", "warning", 2, "videos have 1 to 5 frames"),
    ),
    "missing text": (
        "text_classification",
        put("train", "text", [7], None),
        [],
        "text_kind",
        "failed",
        7,
        "1 of 40",
    ),
    "blank text": (
        "language_modeling",
        put("train", "text", [3], "  "),
        [],
        "empty_texts",
        "warning",
        3,
        "1 of 40",
    ),
    "mostly blank texts": (
        *(
            "translation",
            put("train", "de", range(30), ""),
            [],
            "empty_texts",
            "failed",
            0,
            "30 of 40 values of target",
        ),
    ),
    "wrong encoding": (
        *("text_classification", put("train", "text", [5], "caf\ufffd"), [], "damaged_characters", "warning", 5),
        "wrong encoding",
    ),
    "unknown words": (
        *("language_modeling", put("train", "text", range(9), lambda row: f"\u6c34\u706b{row}")),
        *(["--tokenizer", "TOKENIZER"], "unknown_tokens", "failed", None, "are unknown, in 9 of 40 texts"),
    ),
    "long texts": (
        *(
            "text_classification",
            put("train", "text", [4], "red " * 60),
            ["--max_length", "16"],
            "text_lengths",
            "warning",
        ),
        *(4, "1 of 40 texts of text have more than 16 words, the longest 60"),
    ),
    "long texts in tokens": (
        *("language_modeling", put("train", "text", range(30), lambda row: f"red {row} " * 9)),
        *(["--max_length", "12", "--tokenizer", "TOKENIZER"], "text_lengths", "failed", None, "more than 12 tokens"),
    ),
    "repeated texts": (
        *(
            "language_modeling",
            put("train", "text", range(30), "red"),
            [],
            "repeated_texts",
            "failed",
            1,
            "29 of 40 rows",
        ),
    ),
    "one text with two labels": (
        *(
            "text_classification",
            put("train", "text", [0, 1], "red"),
            [],
            "repeated_texts",
            "warning",
            1,
            "another label",
        ),
    ),
    "leak": (
        *("text_classification", put("validation", "text", range(4), sentence), [], "shared_texts", "failed", 0),
        "4 of 10 rows of validation are also in train, 40.0%",
    ),
    "leak of a pair": (
        *("translation", put("validation", "en", [2], sentence(5)), [], "shared_texts", "ok", None, "none of 10 rows"),
    ),
    "untranslated": (
        *(
            "translation",
            put("train", "de", range(25), sentence),
            [],
            "equal_sides",
            "failed",
            0,
            "25 of 40 pairs have equal",
        ),
    ),
    "misaligned": (*("translation", put("train", "de", range(3), "so"), [], "length_ratio", "ok", None, "0 of 40"),),
    "very different lengths": (
        *("translation", put("train", "en", range(3), "red " * 90), [], "length_ratio", "warning", 0, "3 of 40 pairs"),
    ),
    "missing label": (
        *("text_classification", put("train", "label", [9], None), [], "missing_labels", "warning", 9, "1 of 40 rows"),
    ),
    "mostly missing labels": (
        *(
            "image_classification",
            put("train", "label", range(25), None),
            [],
            "missing_labels",
            "failed",
            0,
            "25 of 40",
        ),
    ),
    "fractional numbers as classes": (
        *(
            "image_classification",
            put("train", "label", range(40), lambda row: row + 0.5),
            [],
            "label_kind",
            "warning",
            0,
        ),
        "not whole numbers",
    ),
    "unique names as classes": (
        *(
            "text_classification",
            put("train", "label", range(40), lambda row: f"id {row}"),
            [],
            "label_kind",
            "failed",
            0,
        ),
        "40 different labels for 40 rows",
    ),
    "two spellings": (
        *("text_classification", put("train", "label", [8], "Animal "), [], "label_spelling", "warning", None),
        "differ only in case or white space",
    ),
    "one class": (
        *(
            "image_classification",
            put("train", "label", range(40), 1),
            [],
            "class_balance",
            "failed",
            0,
            "all 40 labels are 1",
        ),
    ),
    "rare class": (
        *(
            "text_classification",
            put("train", "label", [6], "stone"),
            [],
            "class_balance",
            "warning",
            6,
            "has 1 examples",
        ),
    ),
    "class missing in training": (
        *("image_classification", put("validation", "label", [3], 2), [], "classes_in_one_split", "failed", 3),
        "1 classes of validation are not in train: 2",
    ),
    "unreadable": (
        *("image_classification", put("train", "image", [11], {"bytes": b"no image", "path": None}), []),
        *("unreadable_images", "failed", 11, "40 of 40 images decoded, 1 are unreadable"),
    ),
    "thumbnails": (
        *("image_classification", put("train", "image", range(25), lambda row: png(500 + row, side=4)), []),
        *("small_images", "failed", 0, "25 of 40 images have a side below 8 pixels"),
    ),
    "placeholders": (
        *("image_classification", put("train", "image", [2], png(0, blank=True)), [], "blank_images", "warning", 2),
        "1 of 40 images have a single colour",
    ),
    "leak of an image": (
        *("image_classification", put("validation", "image", [1], png(4)), [], "shared_images", "failed", 1),
        "1 of 10 images of validation are also in train",
    ),
}


def write(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """A folder of parquet files, one per split."""
    folder.mkdir()
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """The folder of a tokenizer with the vocabulary `WORDS`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece([sentence(i) for i in range(300)], 120).save_pretrained(folder)
    return str(folder)


def doctor(folder: Path, *options: str) -> tuple[int, dict]:
    """Exit status and report."""
    report = folder.parent / "report.json"
    try:
        cli.main(["doctor", "data", str(folder), "--json", str(report), *options])
    except SystemExit as end:
        return end.code, json.loads(report.read_text())
    return 0, json.loads(report.read_text())


def image_options(task: str) -> list[str]:
    return ["--task", task, "--image_column", "image"] if task.startswith("image") else ["--task", task]


@pytest.mark.parametrize("task", HEALTHY)
def test_healthy_data_passes(task, tmp_path, capsys):
    folder = write(tmp_path / "data", HEALTHY[task])
    status, report = doctor(folder, *image_options(task), *OPTIONS.get(task, []))
    assert status == 0 and report["failed"] == []
    assert {row["level"] for row in report["findings"]} <= {"ok", "skipped"}
    assert capsys.readouterr().out.splitlines()[-1] == "failed: nothing; warnings: 0"


# Further limits and tasks of a check of which another fault is tested.
SLOW = (
    *("mostly blank texts", "long texts", "leak of a pair", "misaligned", "mostly missing labels"),
    *("unique names as classes", "rare class", "leak of an image", "placeholders"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAULTS]
)
def test_planted_fault_is_found(name, tmp_path, tokenizer):
    task, plant, options, check, level, row, message = FAULTS[name]
    splits = copy.deepcopy(HEALTHY[task])
    plant(splits)
    options = [tokenizer if option == "TOKENIZER" else option for option in options]
    status, report = doctor(write(tmp_path / "data", splits), *image_options(task), *OPTIONS.get(task, []), *options)
    own = [f for f in report["findings"] if f["check"] == check]
    (found,) = [f for f in own if f["level"] == level and message in f["message"]]
    assert status == (1 if report["failed"] else 0)
    if level == "failed":
        assert check in report["failed"] and status == 1
    if level in ("failed", "warning"):
        assert found["remedy"]
        if row is not None:
            assert found["sample"]["row"] == row


def test_task_is_inferred_from_the_columns(tmp_path):
    status, report = doctor(write(tmp_path / "data", HEALTHY["text_classification"]))
    assert status == 0 and report["examined"]["task"] == "text_classification"
    with pytest.raises(ValueError, match=r"task must be one of translation, .* columns a, b fit several"):
        find_task({"a": Value("string"), "b": Value("string")}, None)


def test_embedded_data_passes(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "data", "digits", "--train_split", "training"])
    assert end.value.code == 1
    assert 'train_split "training" is not a split' in capsys.readouterr().err
    cli.main(["doctor", "data", "number-words"])
    assert "checking number-words for translation" in capsys.readouterr().out


def test_missing_column_is_named(tmp_path, capsys):
    splits = copy.deepcopy(HEALTHY["text_classification"])
    folder = write(tmp_path / "data", splits)
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "data", str(folder), "--label_column", "klass"])
    assert end.value.code == 1
    assert 'label_column "klass" is not a column of the data set; it has text, label' in capsys.readouterr().err
