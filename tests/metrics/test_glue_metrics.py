"""GLUE metrics: expected values, definitions, hidden labels, several processes, loading by path."""

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest

from hf_tfm.data.glue import TASKS
from hf_tfm.metrics import Glue, path
from hf_tfm.metrics.glue import macro_average, task_score

# class 1: 3 true positives, 1 false negative, 2 false positives; 4 true negatives.
PREDICTED = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def values(names, predictions=PREDICTED, references=LABELS) -> dict:
    return Glue(metrics=names).compute(predictions=predictions, references=references)


def test_classes_by_hand():
    found = values(["accuracy", "f1", "f1_macro", "matthews"])
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["f1_macro"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert found["matthews"] == pytest.approx((3 * 4 - 2 * 1) / (5 * 4 * 6 * 5) ** 0.5)


def test_correlations_by_definition():
    random = np.random.default_rng(0)
    references = random.random(50) * 5
    predictions = references**3 + random.normal(size=50)
    found = values(["pearson", "spearman"], predictions.astype(np.float32), references)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, references)[0, 1], abs=1e-6)
    ranks = [np.argsort(np.argsort(numbers)) for numbers in (predictions, references)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert found["spearman"] > found["pearson"]


def test_constant_values_have_no_correlation():
    assert values(["pearson", "spearman"], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert values(["matthews"], [1] * 10) == {"matthews": 0.0}
    assert values(["f1"], [0] * 10) == {"f1": 0.0}


@pytest.mark.parametrize("task", list(TASKS))
def test_official_metrics_of_each_task(task):
    numbers = TASKS[task].regression
    pair = ([0.5, 2.0, 1.0], [0.0, 3.0, 1.5]) if numbers else ([0, 1, 1], [0, 1, 1])
    found = Glue(task).compute(predictions=pair[0], references=pair[1])
    assert tuple(found) == TASKS[task].metrics
    assert all(value == pytest.approx(1.0, abs=0.05) for value in found.values())


def test_hidden_labels_are_ignored():
    assert values(["accuracy"], [1, 0, 1], [1, -1, -100]) == {"accuracy": 1.0}
    found = values(["pearson"], [1.0, 2.0, 9.0, 7.0], [-1.0, -2.0, float("nan"), None])
    assert found == {"pearson": pytest.approx(-1.0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Glue(), "give a task or metrics, and not both, got None and None"),
        (lambda: Glue("mrpc", metrics=["f1"]), "and not both"),
        (lambda: Glue("mrcp"), 'config_name must be one of cola, .*, got "mrcp"'),
        (lambda: Glue(metrics=["bleu"]), 'metrics of classes must be among accuracy, .*, got "bleu"'),
        (lambda: Glue(metrics=["pearson", "f1"]), 'metrics of numbers must be among pearson, spearman, got "f1"'),
        (lambda: Glue("mrpc", average="micro"), "average: not an option of Glue"),
        (lambda: values(["accuracy"], [1], [1, 2]), "must have equal lengths, got 1 and 2"),
        (lambda: values(["accuracy"], [1, 0], [-1, -1]), "no text has a label"),
        (lambda: values(["accuracy"], [], []), "no text has a label"),
        (lambda: values(["f1"], [2, 0], [1, 0]), "of two classes, got class 2: use f1_macro"),
        (lambda: values(["pearson"], [2.0], [1.0]), "needs at least 2 numbers, got 1"),
    ],
)
def test_invalid_input_and_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_macro_score():
    """Metrics of a task are averaged first, then the tasks."""
    scores = {"mrpc": task_score([0.8, 0.9]), "cola": task_score([0.5]), "mnli": task_score([0.7, 0.72])}
    assert macro_average(scores) == pytest.approx((0.85 + 0.5 + 0.71) / 3)
    with pytest.raises(ValueError, match="no tasks"):
        macro_average({})


def test_several_processes(tmp_path):
    """Three shares of one run, the last one empty, as with a small validation set."""

    def share(rank: int) -> dict | None:
        metric = Glue("mrpc", num_process=3, process_id=rank, experiment_id="one", cache_dir=str(tmp_path))
        part = [slice(0, 7), slice(7, 10), slice(10, 10)][rank]
        metric.add_batch(predictions=PREDICTED[part], references=LABELS[part])
        return metric.compute()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(share, range(3)))
    assert found == [values(["accuracy", "f1"]), None, None]


def test_loaded_by_path(monkeypatch):
    def refuse(*args):
        raise OSError("this test has no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    loaded = evaluate.load(path("glue"), "mrpc")
    assert loaded.compute(predictions=PREDICTED, references=LABELS) == values(["accuracy", "f1"])
    loaded = evaluate.load(path("glue"), metrics=["matthews"])
    assert loaded.compute(predictions=PREDICTED, references=LABELS) == values(["matthews"])
