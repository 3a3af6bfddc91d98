"""Text in JSON files stays text, whatever it looks like."""

import gzip
import json

import pytest
from datasets import load_dataset
from PIL import Image

from hf_tfm.data.labelled_texts import text_rows
from hf_tfm.data.source import load_splits
from hf_tfm.data.text import text_pairs

DATES = ["2024-01-02", "2024-01-03T04:05:06Z", "2024-01-04 05:06:07", "1999-12-31"]
ROWS = [{"text": date, "label": i % 2, "deep": {"dates": [date]}} for i, date in enumerate(DATES)]


def as_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_list(path):
    path.write_text(json.dumps(ROWS))


def as_list_of_lines(path):
    path.write_text(json.dumps(ROWS, indent=1))


def as_archive(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


FORMS = {
    "train.jsonl": as_lines,
    "train.json": as_list,
    "indented.json": as_list_of_lines,
    "train.jsonl.gz": as_archive,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_dates_stay_text(tmp_path, name, streaming):
    FORMS[name](tmp_path / name)
    rows = list(load_splits(str(tmp_path / name), streaming=streaming)["train"])
    assert rows == ROWS


def test_dates_stay_text_in_a_folder_and_in_pairs(tmp_path):
    as_lines(tmp_path / "train.jsonl")
    rows = load_splits(str(tmp_path))["train"]
    assert text_rows(rows)["text"][:] == DATES
    rows = rows.map(lambda row: {"answer": "a day"})
    assert text_pairs(rows, "answer", "text")["target"][:] == DATES


def test_later_text_that_is_not_a_date_is_accepted(tmp_path, monkeypatch):
    """`datasets` reads ten megabytes at a time and infers types from the first block."""
    rows = [{"text": date, "filler": "x" * 1000} for date in DATES * 3000] + [{"text": "no date", "filler": ""}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_splits(str(tmp_path))["train"][-1]["text"] == "no date"


def test_captions_of_an_image_folder_are_text(tmp_path):
    lines = []
    for number, date in enumerate(DATES):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "label": date}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    assert sorted(load_splits(str(tmp_path))["train"]["label"][:]) == sorted(DATES)


def test_global_json_readers_are_restored(tmp_path):
    as_lines(tmp_path / "train.jsonl")
    load_splits(str(tmp_path))
    rows = load_dataset("json", data_files=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows.features["text"].dtype == "timestamp[s]"
