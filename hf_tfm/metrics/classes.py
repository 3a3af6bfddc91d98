"""Base class of the image classification metrics: ranked classes against labels.

predictions [N] or [N][k], best first; references [N] or [N][R] -> validated -> score
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence

import datasets
import evaluate

from hf_tfm.metrics.base import OfflineMetric

MOST = 2**31  # exclusive upper bound of class ids
INPUTS = """
Args:
    predictions: N classes, or N lists of k classes, the most likely first; k is the same for every image.
    references: N labels, or N lists of labels.
"""


def class_lists(values: Sequence | None, argument: str) -> list[list[int]]:
    """Convert integers, or lists or arrays of integers, to lists of Python ints.

    Raises:
        ValueError: if a value is not an integer.
    """
    if values is None or isinstance(values, str):
        raise ValueError(f"{argument} must be a list of classes, got {type(values).__name__}")
    rows = []
    for i, value in enumerate(values):
        row = value.tolist() if hasattr(value, "tolist") else value
        row = list(row) if isinstance(row, list | tuple) else [row]
        if wrong := [entry for entry in row if not isinstance(entry, int) or isinstance(entry, bool)]:
            raise ValueError(f"{argument}[{i}] must hold integers, got {wrong[0]!r}")
        if wrong := [entry for entry in row if abs(entry) >= MOST]:
            raise ValueError(f"{argument}[{i}] must be below {MOST}, got {wrong[0]}")
        rows.append(row)
    return rows


class ClassMetric(OfflineMetric):
    """An `OfflineMetric` of ranked classes."""

    @abstractmethod
    def score(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        """Score N images, each with k ranked classes and any number of labels."""

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add N predictions and their labels.

        Raises:
            ValueError: if the numbers of predictions and references differ, or a value is not an integer.
        """
        predictions = class_lists(predictions, "predictions")
        references = class_lists(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have equal lengths, got {len(predictions)} and {len(references)}"
            )
        super().add_batch(predictions=predictions, references=references)

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        if not predictions:
            raise ValueError("there are no predictions to score: predictions is empty and nothing was added")
        counts = sorted({len(row) for row in predictions})
        if len(counts) > 1 or counts[0] == 0:
            raise ValueError(f"every prediction needs the same number of classes, at least 1, got {counts}")
        return self.score(list(predictions), list(references))
