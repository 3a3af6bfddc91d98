"""Labels are interpreted by value, not by storage type; missing labels and dropped rows are reported."""

import csv
import io
import json
import logging

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_tfm.data.csv_files import separator_hint
from hf_tfm.data.images import tell_untrained
from hf_tfm.data.labelled_texts import class_ids, class_names, is_regression, text_rows
from hf_tfm.data.source import load_splits
from hf_tfm.tasks.text_classification import TextClassificationArguments, TextClassificationTask


def texts(labels, kind=None):
    """Rows with these labels, stored with a type of `datasets`."""
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    return rows.cast_column("label", Value(kind)) if kind else rows


@pytest.mark.parametrize(
    ("labels", "kind", "settled", "names"),
    [
        ([0, 1, 2], None, [0, 1, 2], ["0", "1", "2"]),
        ([0, 1, None], None, [0, 1, None], ["0", "1"]),
        ([0.0, 1.0, 2.0], "float32", [0, 1, 2], ["0", "1", "2"]),
        ([0.0, None, 1.0], "float64", [0, None, 1], ["0", "1"]),
        ([0.0, float("nan"), 10.0], None, [0, None, 10], ["0", "10"]),
        (["0", "10", "2"], None, [0, 10, 2], ["0", "2", "10"]),
        (["01", "1"], None, ["01", "1"], ["01", "1"]),
        (["NA", "None", "null", "nan"], None, ["NA", "None", "null", "nan"], ["NA", "None", "nan", "null"]),
        (["yes", "", "no", " "], None, ["yes", None, "no", None], ["no", "yes"]),
        ([True, False, None], None, [True, False, None], ["False", "True"]),
    ],
)
def test_whole_numbers_and_text_are_classes(labels, kind, settled, names):
    rows = text_rows(texts(labels, kind))
    assert rows["label"][:] == settled and not is_regression(rows) and class_names(rows) == names
    ids = class_ids(rows, names)
    assert [ids[label] for label in settled if label is not None] == [
        names.index(str(label)) for label in settled if label is not None
    ]


@pytest.mark.parametrize("labels", [[0.5, 1.0, 2.0], ["0.5", "1", "2"], ["3.800", "", "4.0"], [0, 0.5, None]])
def test_fractional_numbers_give_a_regression(labels):
    rows = text_rows(texts(labels))
    assert is_regression(rows)
    assert rows["label"][:] == [None if label in ("", None) else float(label) for label in labels]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (texts([[0], [1]]), "labels must be numbers or text, all of one kind, got lists: [0]"),
        (texts([{"a": 1}]), "labels must be numbers or text, all of one kind, got"),
        (texts([0.5, float("inf")]), "labels must be finite numbers, got inf"),
        (Dataset.from_dict({"text": ["", " "], "label": [0, 1]}), 'all 2 texts of column "text" are empty'),
    ],
)
def test_invalid_labels_and_texts(rows, message):
    with pytest.raises(ValueError) as error:
        text_rows(rows)
    assert message in str(error.value)


def test_labels_of_mixed_types_are_refused(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (0, "x")))
    with pytest.raises(ValueError, match="all of one kind, got values of several kinds"):
        text_rows(load_splits(str(file))["train"])


def test_column_is_given_once():
    rows = texts(["a", "b"])
    with pytest.raises(ValueError, match='text_columns "label" is also given as label_column'):
        text_rows(rows, ["label"], "label")
    with pytest.raises(ValueError, match='text_columns "text" is also given as text_columns twice'):
        text_rows(rows, ["text", "text"])


def test_csv_numbers_are_text_in_text_columns(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("text,other,label\n12,0.5,a\n7,1.0,b\n")
    rows = text_rows(load_splits(str(file))["train"], ["text", "other"])
    assert rows["text"][:] == ["12", "7"] and rows["pair"][:] == ["0.5", "1.0"]
    file.write_text("text,label\n12,a\n,b\n")
    with pytest.raises(ValueError, match='column "text" must hold text, got None in row 1'):
        text_rows(load_splits(str(file))["train"])


def load(folder, **options):
    """A task with the data of a run."""
    args = TextClassificationArguments(dataset_name=str(folder), output_dir="unused", max_steps=1, **options)
    task = TextClassificationTask(args, None)
    task.splits = task.load_splits()
    return task


def run(tmp_path, files, **options):
    """A task with the data of a run on CSV files, {split: labels}."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for split, labels in files.items():
        file = io.StringIO()
        csv.writer(file).writerows([("text", "label"), *((f"text {i}", label) for i, label in enumerate(labels))])
        (folder / f"{split}.csv").write_text(file.getvalue())
    return load(folder, **options)


def test_training_split_decides_the_problem_type(tmp_path):
    found = run(tmp_path, {"train": ["0.5", "1", "2"], "validation": ["1", "2"]})
    assert found.labels is None and found.splits["validation"].features["label"] == Value("float64")
    assert found.args.metrics == ["pearson", "spearman"]
    found = run(tmp_path, {"train": ["0.0", "1.0"], "validation": ["1", "0"]})
    assert found.labels == ["0", "1"] and found.label_ids("validation")[1] == 1
    with pytest.raises(ValueError, match='validation_split "validation" has labels that are not integers'):
        run(tmp_path, {"train": ["0", "1"], "validation": ["0.5", "1"]})


def test_problem_type_can_be_chosen(tmp_path):
    files = {"train": ["0", "1", "2"], "validation": ["1", "2"]}
    found = run(tmp_path, files, problem_type="regression")
    assert found.labels is None and found.splits["train"]["label"][:] == [0.0, 1.0, 2.0]
    files = {"train": ["0.5", "1.5", "2.5"], "validation": ["1.5", "2.5"]}
    found = run(tmp_path, files, problem_type="single_label_classification")
    assert found.labels == ["0.5", "1.5", "2.5"] and found.label_ids("validation")["1.5"] == 1
    with pytest.raises(ValueError, match="labels must be numbers for regression, got string"):
        run(tmp_path, {"train": ["a", "b"], "validation": ["a", "b"]}, problem_type="regression")
    with pytest.raises(ValueError, match="task determines problem_type"):
        TextClassificationArguments(
            dataset_name="x", output_dir="y", max_steps=1, task="sst2", problem_type="regression"
        )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": ["a", "a"], "validation": ["a"]}, "there must be at least two classes"),
        ({"train": ["", ""], "validation": ["a"]}, "no text has a label"),
        (
            {"train": ["a", "b"], "validation": ["a", "c", "c"]},
            'validation_split "validation": label "c" is not a class of the model; it has a, b',
        ),
        (
            {"train": ["0", "1"], "validation": ["0", "7"]},
            'validation_split "validation": label "7" is not a class of the model; it has 0, 1',
        ),
        ({"train": ["a", "b"], "validation": ["", ""]}, 'validation_split "validation" has no labels'),
        ({"train": ["a", "b"], "validation": []}, 'validation_split "validation" has no rows'),
    ],
)
def test_data_without_labels_is_refused_before_training(tmp_path, files, message):
    with pytest.raises(ValueError) as error:
        run(tmp_path, files)
    assert message in str(error.value)


def test_single_class_in_the_data_is_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]})
    rows = rows.cast(Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}))
    for split in ("train", "validation"):
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match="has 2 of 2 texts with a label, and all have the same, 1"):
        load(tmp_path)


def test_missing_labels_and_similar_classes_are_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, {"train": ["Yes", "", "yes ", "no"], "validation": ["no"]})
    assert (
        '1 of 4 texts of split "train" have no label and are not used for training; the first is row 1' in caplog.text
    )
    assert "classes differ in case or white space alone: 'Yes', 'yes '" in caplog.text


def test_classes_without_training_rows_are_reported(caplog):
    feature = Features({"label": ClassLabel(names=["ant", "bee", "cat"])})
    rows = {
        "train": Dataset.from_dict({"label": [0, 1]}, features=feature),
        "validation": Dataset.from_dict({"label": [0, 2, 2, -1]}, features=feature),
    }
    tell_untrained(rows, "train", ["ant", "bee", "cat"])
    assert [record.message for record in caplog.records] == [
        'split "validation" has 1 classes without a training row: cat'
    ]
    caplog.clear()
    tell_untrained({"train": rows["validation"], "validation": rows["train"].select([0])}, "train", ["ant"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            ["text;label"],
            "; the column \"text;label\" looks like several columns separated by ';', but files must use commas",
        ),
        (["text", "label"], ""),
        ([";"], ""),
    ],
)
def test_separators_in_column_names(columns, told):
    assert separator_hint(columns) == told


def test_null_bytes_in_csv_are_counted(tmp_path, caplog):
    (tmp_path / "train.csv").write_bytes(b"text,label\n" + b"a\0b,x\nc,y\n" * 3)
    load_splits(str(tmp_path))
    assert 'train.csv: 3 fields contain null bytes, the first in column "text"' in caplog.text
