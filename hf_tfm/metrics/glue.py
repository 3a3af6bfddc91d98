"""GLUE metrics: accuracy, F1, Matthews, Pearson and Spearman correlation, and the average over tasks.

predictions (N,), references (N,) -> drop unlabelled -> scikit-learn, scipy -> {metric: value}
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_tfm.data.glue import TASKS
from hf_tfm.metrics import base

INPUTS = """
Args:
    predictions: N classes, or N numbers for Pearson's and Spearman's correlation.
    references: N labels of the same kind; negative classes, and numbers that are NaN or None, are none.
"""


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Compute the binary F1 of class 1.

    Raises:
        ValueError: if there are other classes than 0 and 1.
    """
    if found := sorted({*predictions.tolist(), *references.tolist()} - {0, 1}):
        raise ValueError(f"f1 is that of class 1 of two classes, got class {found[0]}: use f1_macro")
    return f1_score(references, predictions, zero_division=0.0)


def f1_macro(predictions: np.ndarray, references: np.ndarray) -> float:
    """Compute the mean of the F1 scores of all classes that occur."""
    return f1_score(references, predictions, average="macro", zero_division=0.0)


def correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> float:
    """Compute a scipy correlation; 0 if either side is constant, where it is undefined.

    Raises:
        ValueError: if there are fewer than two numbers.
    """
    if len(predictions) < 2:
        raise ValueError(f"a correlation needs at least 2 numbers, got {len(predictions)}")
    if np.ptp(predictions) == 0.0 or np.ptp(references) == 0.0:
        return 0.0
    return function(predictions, references).statistic


CLASSES = {
    "accuracy": lambda predictions, references: accuracy_score(references, predictions),
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": lambda predictions, references: matthews_corrcoef(references, predictions),
}
NUMBERS = {
    "pearson": lambda predictions, references: correlation(stats.pearsonr, predictions, references),
    "spearman": lambda predictions, references: correlation(stats.spearmanr, predictions, references),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = CLASSES | NUMBERS


def check_metrics(names: Sequence[str], regression: bool, argument: str = "metrics") -> None:
    """Check that metrics are known and fit the kind of label.

    Raises:
        ValueError: if not; the message lists the available metrics.
    """
    known = NUMBERS if regression else CLASSES
    for name in names:
        if name not in known:
            kind = "numbers" if regression else "classes"
            raise ValueError(f'{argument} of {kind} must be among {", ".join(known)}, got "{name}"')


class Glue(base.OfflineMetric):
    """The official metrics of a GLUE task, or metrics selected by name.

        Glue("mrpc").compute(predictions=[0, 1], references=[0, 1])
        Glue(metrics=["matthews"]).compute(predictions=[0, 1], references=[0, 1])

    The result holds each metric by name: accuracy and F1 in [0, 1], correlations in [-1, 1]. F1 is that of class 1.
    Unlabelled samples are skipped.

    Args:
        config_name: a task of `data.glue.TASKS`.
        metrics: keys of `METRICS`, either all for classes or all for numbers; replaces ``config_name``.
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if a name or an option is unknown, or neither or both of task and metrics are given.
    """

    source = "Wang et al. 2018, arXiv:1804.07461, table 1"

    def __init__(self, config_name: str | None = None, *, metrics: Sequence[str] | None = None, **kwargs):
        if (config_name is None) == (metrics is None):
            raise ValueError(f"give a task or metrics, and not both, got {config_name} and {metrics}")
        if metrics is None:
            if config_name not in TASKS:
                raise ValueError(f'config_name must be one of {", ".join(TASKS)}, got "{config_name}"')
            metrics = TASKS[config_name].metrics
        self.names = list(metrics)
        self.numbers = self.names[0] in NUMBERS
        check_metrics(self.names, self.numbers)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.numbers else "int64")
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add N predictions and their labels.

        Raises:
            ValueError: if the numbers of predictions and references differ.
        """
        pair = [[] if values is None else np.asarray(values).tolist() for values in (predictions, references)]
        if len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"predictions and references must have equal lengths, got {len(pair[0])} and {len(pair[1])}"
            )
        super().add_batch(predictions=pair[0], references=pair[1])

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        found = np.asarray(list(predictions))
        if self.numbers:
            labels = np.array([math.nan if value is None else value for value in references])
            labelled = ~np.isnan(labels)
            for name, values in (("predictions", found), ("references", labels)):
                if (wrong := labelled & ~np.isfinite(values.astype(np.float64))).any():
                    place = int(wrong.argmax())
                    raise ValueError(f"{name}[{place}] must be a finite number, got {values[place]}")
        else:
            labels = np.asarray(list(references))
            labelled = labels >= 0
        if not labelled.any():
            raise ValueError("there is nothing to score: no text has a label")
        pair = found[labelled], labels[labelled]
        return {name: float(METRICS[name](*pair)) for name in self.names}


def task_score(values: Sequence[float]) -> float:
    """Return the score of a task: the mean over its metrics and validation splits (section 3)."""
    return sum(values) / len(values)


def macro_average(scores: Mapping[str, float]) -> float:
    """Return the score over tasks: the mean of each task's `task_score` (section 3).

    Raises:
        ValueError: if there are no tasks.
    """
    if not scores:
        raise ValueError("there are no tasks to average")
    return sum(scores.values()) / len(scores)
