"""Base class of the text metrics: validates input and puts references in sacrebleu's order.

predictions [N], references [N] or [N][R] -> validated [N][R] -> R streams of N -> score
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence

import datasets
import evaluate

from hf_tfm.metrics.base import OfflineMetric

INPUTS = """
Args:
    predictions: N sentences, detokenised.
    references: N sentences, or N lists of R sentences; R is the same for every prediction.
"""


def sentences(values: Sequence | None, argument: str) -> list:
    """Return ``values`` as a list; a single string is rejected, since it would be read character by character."""
    if values is None or isinstance(values, str):
        raise ValueError(f"{argument} must be a list of sentences, got {type(values).__name__}")
    return list(values)


def check_text(value, argument: str) -> str:
    """Return ``value`` after checking that it is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{argument} must be a str, got {type(value).__name__}")
    return value


class TextMetric(OfflineMetric):
    """An `OfflineMetric` that compares sentences with one or more references each."""

    @abstractmethod
    def score(self, predictions: list[str], references: list[list[str]]) -> dict:
        """Score N predictions against R streams of N references each, sacrebleu's order."""

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add N predictions and their references.

        Raises:
            ValueError: if the numbers of predictions and references differ, or a value is not a string.
        """
        predictions = sentences(predictions, "predictions")
        references = sentences(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have equal lengths, got {len(predictions)} and {len(references)}"
            )
        for i, prediction in enumerate(predictions):
            check_text(prediction, f"predictions[{i}]")
            texts = [references[i]] if isinstance(references[i], str) else sentences(references[i], f"references[{i}]")
            references[i] = [check_text(text, f"references[{i}][{j}]") for j, text in enumerate(texts)]
        super().add_batch(predictions=predictions, references=references)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict:
        if not predictions:
            raise ValueError("there are no predictions to score: predictions is empty and nothing was added")
        counts = sorted({len(texts) for texts in references})
        if len(counts) > 1 or counts[0] == 0:
            raise ValueError(f"every prediction needs the same number of references, at least 1, got {counts}")
        return self.score(list(predictions), [list(stream) for stream in zip(*references, strict=True)])
