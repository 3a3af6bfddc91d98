"""Accuracy, top-5 and ReaL accuracy: expected values, torchmetrics' definition, invalid input, loading by path."""

import evaluate
import numpy as np
import pytest
import torch

from hf_tfm.metrics import CLASS_METRICS, Accuracy, RealAccuracy, path

RANKED = [[2, 0, 1, 3, 4], [1, 0, 2, 3, 5], [4, 5, 0, 1, 2]]


def test_accuracy_by_hand():
    # First: correct. Second: 4 is not in the top five. Third: 0 is third.
    assert Accuracy().compute(predictions=RANKED, references=[2, 4, 0]) == {
        "accuracy": pytest.approx(1 / 3),
        "top5_accuracy": pytest.approx(2 / 3),
    }
    assert Accuracy().compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}


def test_images_without_a_label_are_not_counted():
    assert Accuracy().compute(predictions=[1, 0, 3], references=[1, -1, -100]) == {"accuracy": 1.0}
    result = RealAccuracy().compute(predictions=[3, 1, 4, 0], references=[[3, 7], [2], [], [1, 0]])
    assert result == {"real_accuracy": pytest.approx(2 / 3), "images": 3}


def test_accuracy_of_logits():
    """By definition: the label's logit is the largest, or among the five largest."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 20)), random.integers(0, 20, 200)
    logits[np.arange(200), labels] += 1.0
    above = (logits > logits[np.arange(200), labels][:, None]).sum(axis=1)
    ranked = torch.from_numpy(logits).topk(5).indices
    result = Accuracy().compute(predictions=ranked, references=torch.from_numpy(labels))
    assert result == {
        "accuracy": pytest.approx((above < 1).mean()),
        "top5_accuracy": pytest.approx((above < 5).mean()),
    }
    # With a single label per image, ReaL accuracy equals accuracy.
    real = RealAccuracy().compute(predictions=ranked.numpy(), references=[[int(label)] for label in labels])
    assert real["real_accuracy"] == result["accuracy"]


@pytest.mark.parametrize("metric", CLASS_METRICS.values())
def test_adding_in_batches_equals_all_at_once(metric):
    whole = metric().compute(predictions=RANKED, references=[2, 4, 4])
    parts = metric()
    parts.add(prediction=RANKED[0], reference=2)
    assert parts.compute(predictions=RANKED[1:], references=[4, 4]) == whole


@pytest.mark.parametrize("name", list(CLASS_METRICS))
def test_loaded_by_path(name):
    loaded, direct = evaluate.load(path(name)), CLASS_METRICS[name]()
    inputs = {"predictions": RANKED, "references": [2, 4, 4]}
    assert loaded.compute(**inputs) == direct.compute(**inputs)


@pytest.mark.parametrize("metric", CLASS_METRICS.values())
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "predictions is empty and nothing was added"),
        ({"predictions": [1], "references": [1, 2]}, "must have equal lengths, got 1 and 2"),
        ({"predictions": [[1, 2], [1]], "references": [1, 2]}, r"same number of classes.*got \[1, 2\]"),
        ({"predictions": ["cat"], "references": [1]}, r"predictions\[0\] must hold integers, got 'cat'"),
        ({"predictions": [1], "references": [0.5]}, r"references\[0\] must hold integers, got 0.5"),
        ({"predictions": "12", "references": [1, 2]}, "predictions must be a list of classes, got str"),
    ],
)
def test_invalid_input_is_refused(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(**arguments)


@pytest.mark.parametrize(
    ("metric", "references", "message"),
    [
        (Accuracy, [-1], "no image has a label"),
        (RealAccuracy, [[]], "no image has a label"),
        (Accuracy, [[1, 2]], r"references\[0\] must be one label, got \[1, 2\]"),
    ],
)
def test_unusable_labels_are_refused(metric, references, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(predictions=[1], references=references)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="topk: not an option of Accuracy"):
        Accuracy(topk=5)
