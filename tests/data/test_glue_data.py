"""Labelled texts from any data set, the table of GLUE tasks, and batches of texts of similar length."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_tfm.data import glue
from hf_tfm.data import labelled_texts as texts
from hf_tfm.data.vocabulary import train_wordpiece

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIRS = {
    "premise": ["it rains", "all is well", "she sings"],
    "hypothesis": ["it is wet", "nothing is", "a song"],
    "label": [0, 2, -1],
}


def pairs(**features) -> Dataset:
    kinds = {
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": ClassLabel(names=["yes", "may", "no"]),
    }
    return Dataset.from_dict(PAIRS, Features({**kinds, **features}))


# --- rows


def test_one_or_two_text_columns():
    rows = texts.text_rows(pairs(), ["premise", "hypothesis"])
    assert rows[:]["text"] == PAIRS["premise"] and rows[:]["pair"] == PAIRS["hypothesis"]
    assert rows[:]["label"] == PAIRS["label"] and rows.features["label"].names == ["yes", "may", "no"]
    one = texts.text_rows(pairs(), ["hypothesis"], "label")
    assert set(one.column_names) == {"text", "label"} and one[:]["text"] == PAIRS["hypothesis"]
    assert texts.text_rows(pairs(), ["hypothesis"], labelled=False).column_names == ["text"]


def test_text_columns_are_inferred_if_unambiguous():
    rows = Dataset.from_dict({"text": ["a", "b"], "kind": ["x", "y"], "n": [1, 2]})
    found = texts.text_rows(rows, label_column="kind")
    assert found[:] == {"text": ["a", "b"], "label": ["x", "y"]}
    nested = Dataset.from_list([{"part": {"pair": "a"}, "text": "b", "label": 1}])  # existing column names
    assert texts.text_rows(nested, ["part.pair", "text"])[0] == {"text": "a", "pair": "b", "label": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text_columns must name one column or two, since they cannot be inferred; the data set has premise"),
        ({"text_columns": ["sentence"]}, 'text_columns "sentence" is not a column of the data set; it has premise'),
        ({"text_columns": ["premise"] * 3}, "text_columns must be one column or two, got premise, premise, premise"),
        ({"text_columns": ["label"]}, 'text_columns "label" is also given as label_column'),
        ({"text_columns": ["premise"], "label_column": "score"}, 'label_column "score" is not a column'),
    ],
)
def test_invalid_columns(options, message):
    with pytest.raises(ValueError, match=message):
        texts.text_rows(pairs(), **options)


def test_empty_split():
    with pytest.raises(ValueError, match="has no rows"):
        texts.text_rows(pairs().select([]), ["premise"])


# --- labels


@pytest.mark.parametrize(
    ("kind", "labels", "known", "names", "ids"),
    [
        (ClassLabel(names=["b", "a"]), [0, 1], (), ["b", "a"], {0: 0, 1: 1}),
        (ClassLabel(names=["b", "a"]), [0, 1], ["a", "b"], ["a", "b"], {0: 1, 1: 0}),
        (Value("string"), ["b", "a"], (), ["a", "b"], {"a": 0, "b": 1}),
        (Value("int64"), [7, 3], (), ["3", "7"], {"3": 0, "7": 1, 3: 0, 7: 1}),
        (Value("int64"), [1, 0], ["no", "yes"], ["no", "yes"], {0: 0, 1: 1}),
    ],
)
def test_classes(kind, labels, known, names, ids):
    rows = Dataset.from_dict({"label": labels}, Features({"label": kind}))
    assert texts.class_names(rows, known) == names
    assert texts.class_ids(rows, names) == ids


def test_invalid_classes():
    with pytest.raises(ValueError, match="at least two classes of labels, got '4'"):
        texts.class_names(Dataset.from_dict({"label": [4, 4]}))
    with pytest.raises(ValueError, match="no text has a label"):
        texts.class_names(Dataset.from_dict({"label": [None, None]}))
    rows = Dataset.from_dict({"label": [0]}, Features({"label": ClassLabel(names=["odd"])}))
    with pytest.raises(ValueError, match='label "odd" is not a class of the model; it has negative, positive'):
        texts.class_ids(rows, ["negative", "positive"])


def test_regression_labels():
    assert texts.is_regression(Dataset.from_dict({"label": [0.5, 3.0]}))
    assert not texts.is_regression(Dataset.from_dict({"label": [0, 3]}))
    assert glue.hide(Dataset.from_dict({"label": [0.5, -1.0]}))["label"][:] == [0.5, None]


# --- tokens and batches


def test_truncation_shortens_the_longer_text():
    tokenizer = train_wordpiece(["a b c d e f g"], 30)
    rows = Dataset.from_dict({"text": ["a b c d e f g", "a"], "pair": ["a b", "b"], "label": [0, 1]})
    tokens = texts.tokenize_texts(rows, tokenizer, 9)
    assert tokenizer.decode(tokens[0]["input_ids"]) == "[CLS] a b c d [SEP] a b [SEP]"
    assert tokens[0]["token_type_ids"] == [0] * 6 + [1] * 3
    assert set(tokens.column_names) == {"input_ids", "token_type_ids", "label"}
    assert texts.text_lengths(tokens).tolist() == [9, 5]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_similar_length(shuffle):
    lengths = np.random.default_rng(0).integers(3, 40, 103)
    sampler = texts.LengthBatchSampler(lengths, 8, seed=3, shuffle=shuffle)
    steps = sampler.steps(0)
    assert sorted(i for step in steps for i in step) == list(range(103))
    assert sorted(map(len, steps)) == [7] + [8] * 12
    assert max(np.ptp(lengths[step]) for step in steps) <= 6  # of 37 lengths
    assert (steps != sampler.steps(1)) is shuffle
    assert sampler.cut(steps[0], 3) == [steps[0][:3], steps[0][3:6], steps[0][6:]]


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        texts.LengthBatchSampler(np.array([3]), 0)


# --- GLUE


def test_glue_table_matches_the_paper():
    """Table 1: nine tasks, of which two have single sentences, one is a regression and one has three classes."""
    assert list(glue.TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    assert [t.name for t in glue.TASKS.values() if len(t.text_columns) == 1] == ["cola", "sst2"]
    assert [t.name for t in glue.TASKS.values() if t.regression] == ["stsb"]
    assert {t.name: len(t.labels) for t in glue.TASKS.values() if len(t.labels) != 2} == {"stsb": 0, "mnli": 3}
    assert [t.name for t in glue.TASKS.values() if len(t.validation) > 1] == ["mnli"]


def test_task_names():
    assert [task.name for task in glue.find_tasks("glue")] == list(glue.TASKS)
    assert [task.name for task in glue.find_tasks("sst2, cola")] == ["sst2", "cola"]
    with pytest.raises(ValueError, match=r'task must be one of cola, sst2, .*, got "sst3"'):
        glue.find_tasks("sst2,sst3")
    with pytest.raises(ValueError, match="not contain duplicates, got sst2,sst2"):
        glue.find_tasks("sst2,sst2")


@pytest.mark.parametrize(
    ("dataset", "name", "expected"),
    [
        ("nyu-mll/glue", None, ("nyu-mll/glue", "rte")),
        ("/data/glue", None, ("/data/glue", "rte")),
        ("/data/glue-{task}", None, ("/data/glue-rte", None)),
        ("/data/all", "{task}-v2", ("/data/all", "rte-v2")),
        ("nyu-mll/glue", "other", ("nyu-mll/glue", "other")),
    ],
)
def test_task_data_locations(dataset, name, expected):
    assert glue.place_of("rte", dataset, name) == expected


def test_folder_with_a_configuration_per_task(tmp_path):
    """In the layout of nyu-mll/glue on the Hub."""
    folder = tmp_path / "glue"
    configs = []
    for task in ("mnli", "rte"):
        (folder / task).mkdir(parents=True)
        pairs().to_parquet(folder / task / "validation-0.parquet")
        files = [{"split": "validation", "path": f"{task}/validation-*"}]
        configs.append({"config_name": task, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert len(glue.load_task(glue.TASKS["rte"], str(folder))["validation"]) == 3
    with pytest.raises(glue.MissingData, match="wnli"):
        glue.load_task(glue.TASKS["wnli"], str(folder))
    with pytest.raises(glue.MissingData, match="cannot be loaded"):
        glue.load_task(glue.TASKS["wnli"], str(tmp_path / "glue-{task}"))


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "rte"])
def test_local_copies_match_the_table(name):
    if not (SHARED / f"glue-{name}").is_dir():
        pytest.skip("this machine has no copy of the task")
    task = glue.find_task(name)
    for split, rows in glue.load_task(task, str(SHARED / "glue-{task}")).items():
        found = texts.text_rows(rows, task.text_columns)
        assert texts.class_ids(found, task.labels) == {0: 0, 1: 1}, split


# --- the embedded data set


def test_number_parity():
    splits = texts.load_texts("number-parity")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 5000, "validation": 500, "test": 1000}
    row = next(row for row in splits["train"] if row["number"] == 21)
    assert row == {"number": 21, "text": "twenty-one", "label": 1}
    labels = np.array(splits["test"]["label"][:])
    assert (labels == np.array(splits["test"]["number"][:]) % 2).all() and 0.4 < labels.mean() < 0.6
    with pytest.raises(ValueError, match="is embedded: it takes no name"):
        texts.load_texts("number-parity", "config")
