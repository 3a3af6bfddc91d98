"""hf-tfm evaluate on image models: matching labels of the data set to classes of the model."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Value
from evaluation_helpers import (
    COUNT,
    LABELS,
    NAMES,
    QUIET,
    SIZES,
    labels_of,
    ranked,
    save_model,
    save_rows,
    values,
)

from hf_tfm import (
    TfmViTConfig,
    TfmViTForImageClassification,
)
from hf_tfm.tasks.evaluation import evaluate


def test_classes_are_matched_by_name(models, data, tmp_path):
    """Data sets with the same labels in another order, with one class missing, or stored as text."""
    expected = evaluate(models["tfm"], dataset_name=data, max_samples=9, **QUIET)["metrics"]
    other = [name for name in sorted(NAMES, reverse=True) if name in {NAMES[label] for label in LABELS}]
    turned = save_rows(tmp_path / "a", [other.index(NAMES[label]) for label in LABELS], ClassLabel(names=other))
    text = save_rows(tmp_path / "b", [NAMES[label] for label in LABELS], Value("string"))
    for where in (turned, text):
        result = evaluate(models["tfm"], dataset_name=where, max_samples=9, **QUIET)
        assert (result["metrics"], result["match_labels"]) == (expected, "name")


def test_other_names_are_refused_but_can_be_matched_by_number(models, data, tmp_path):
    names = ["ant", "bee", "cat", "dog", "elk", "fly"]
    other = save_rows(tmp_path / "a", LABELS, ClassLabel(names=names))
    with pytest.raises(ValueError, match=r"only the data set has elk, fly; only the model has eel, fox\. .*number"):
        evaluate(models["tfm"], dataset_name=other, **QUIET)
    numbers = save_rows(tmp_path / "b", LABELS, Value("int64"))
    with pytest.raises(ValueError, match="only the data set has 0, 1, 2"):
        evaluate(models["tfm"], dataset_name=numbers, **QUIET)
    expected = evaluate(models["tfm"], dataset_name=data, **QUIET)["metrics"]
    for where in (other, numbers):
        result = evaluate(models["tfm"], dataset_name=where, match_labels="number", **QUIET)
        assert (result["metrics"], result["match_labels"]) == (expected, "number")
    more = save_rows(tmp_path / "c", LABELS, ClassLabel(names=[*names, "gnu"]))
    with pytest.raises(ValueError, match="0 to 5; the data set also has 6"):
        evaluate(models["tfm"], dataset_name=more, match_labels="number", **QUIET)


def test_boolean_class_names(tmp_path):
    """Classes named True and False, in either order; by number, False is class 0."""
    flags = [bool(label % 2) for label in LABELS]
    where = save_rows(tmp_path / "flags", flags, Value("bool"))
    for names in (["True", "False"], ["False", "True"], ["no", "yes"]):
        config = TfmViTConfig(**SIZES, **labels_of(names))
        model = save_model(tmp_path / names[0], TfmViTForImageClassification, config)
        by_number = names == ["no", "yes"]
        result = evaluate(model, dataset_name=where, **({"match_labels": "number"} if by_number else {}), **QUIET)
        right = [int(flag) if by_number else names.index(str(flag)) for flag in flags]
        assert values(result)["accuracy"] == np.mean(ranked(model)[:, 0] == right)


def test_model_without_names_is_matched_by_number(data, tmp_path):
    model = save_model(tmp_path / "m", TfmViTForImageClassification, TfmViTConfig(**SIZES, num_labels=6))
    result = evaluate(model, dataset_name=data, **QUIET)
    assert result["match_labels"] == "number"
    assert values(result)["accuracy"] == np.mean(ranked(model)[:, 0] == LABELS)


def test_duplicate_class_names_are_refused(data, tmp_path):
    config = TfmViTConfig(**SIZES, id2label=dict(enumerate([*NAMES, "cat"])), label2id={"cat": 2})
    model = save_model(tmp_path / "m", TfmViTForImageClassification, config)
    with pytest.raises(ValueError, match=r"several classes called cat: .*number"):
        evaluate(model, dataset_name=data, **QUIET)


def test_real_labels(models, data, tmp_path):
    """A prediction is correct if it is among the image's labels; images without labels are not counted."""
    first = ranked(models["tfm"])[:, 0].tolist()
    lists = [[] if i % 5 == 0 else [(c + 1) % 6] if i % 5 == 1 else [(c + 2) % 6, c] for i, c in enumerate(first)]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(lists))
    result = evaluate(models["tfm"], dataset_name=data, real_labels=str(file), **QUIET)
    counted = [i for i in range(COUNT) if i % 5]
    assert values(result)["real_accuracy"] == np.mean([i % 5 > 1 for i in counted])
    assert set(values(result)) == {"accuracy", "top5_accuracy", "real_accuracy"}
    counted = [i for i in range(8) if i % 5]
    short = evaluate(models["tfm"], dataset_name=data, real_labels=str(file), max_samples=8, **QUIET)
    assert values(short)["real_accuracy"] == np.mean([i % 5 > 1 for i in counted])
    # They are label numbers of the data set, regardless of the model's class names.
    turned = save_rows(tmp_path / "a", [5 - label for label in LABELS], ClassLabel(names=NAMES[::-1]))
    file.write_text(json.dumps([[5 - label for label in labels] for labels in lists]))
    assert evaluate(models["tfm"], dataset_name=turned, real_labels=str(file), **QUIET)["metrics"] == result["metrics"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([[0]] * 3, f"a list for each of the {COUNT} images, got 3"),
        ({"0": [1]}, "must hold a list of lists"),
        ([0] * COUNT, "must hold a list of lists"),
        ([[0]] * (COUNT - 1) + [[6]], f"6 of image {COUNT - 1} is not a label of the data set"),
    ],
)
def test_invalid_real_labels_are_refused(content, named, models, data, tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=named):
        evaluate(models["tfm"], dataset_name=data, real_labels=str(file), **QUIET)
