"""What the text metrics share: checked input, sentences kept in memory, references in sacrebleu's order.

predictions [N], references [N] or [N][R] -> checked [N][R] -> R streams of N -> score
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence

import datasets
import evaluate

INPUTS = """
Args:
    predictions: N sentences, detokenised.
    references: N sentences, or N lists of R sentences; R is the same for every prediction.
"""


def sentences(values: Sequence, argument: str) -> list:
    """``values`` as a list; a lone string is refused, for it would be read letter by letter."""
    if values is None or isinstance(values, str):
        raise ValueError(f"{argument} must be a list of sentences, got {type(values).__name__}")
    return list(values)


def check_text(value, argument: str) -> str:
    """``value``, which must be a string."""
    if not isinstance(value, str):
        raise ValueError(f"{argument} must be a str, got {type(value).__name__}")
    return value


class TextMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` that compares sentences with one or more references each.

    A lone process keeps its sentences in memory, so it leaves no cache or lock file and collides with no other.
    Several processes meet in files, as `evaluate` arranges it: process 0 returns the result of all, the others None.

    Args:
        kwargs: those of `evaluate.Metric`; ``keep_in_memory`` follows from ``num_process``.

    Raises:
        ValueError: an option is unknown, or ``num_process`` is above 1 and there is no ``experiment_id``.
    """

    source: str  # where the metric is defined

    def __init__(self, **kwargs):
        # evaluate.Metric swallows what it does not know.
        known = inspect.signature(evaluate.Metric).parameters
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an option of {type(self).__name__}")
        processes = kwargs.get("num_process", 1)
        if processes == 1:
            kwargs["keep_in_memory"] = True
        elif kwargs.get("experiment_id") is None:
            # Under evaluate's fixed default two runs on one machine can mix their sentences.
            raise ValueError(f"num_process={processes} needs an experiment_id, the same in all processes of a run")
        super().__init__(**kwargs)

    @abstractmethod
    def score(self, predictions: list[str], references: list[list[str]]) -> dict:
        """Score N predictions against R streams of N references each, the order sacrebleu takes."""

    def add(self, *, prediction: str | None = None, reference: str | Sequence[str] | None = None) -> None:
        """Add one prediction and its reference or references."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add N predictions and their references.

        Raises:
            ValueError: there are not as many references as predictions, or something is not a string.
        """
        predictions = sentences(predictions, "predictions")
        references = sentences(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must be equally many, got {len(predictions)} and {len(references)}"
            )
        for i, prediction in enumerate(predictions):
            check_text(prediction, f"predictions[{i}]")
            texts = [references[i]] if isinstance(references[i], str) else sentences(references[i], f"references[{i}]")
            references[i] = [check_text(text, f"references[{i}][{j}]") for j, text in enumerate(texts)]
        super().add_batch(predictions=predictions, references=references)

    def compute(
        self, *, predictions: Sequence | None = None, references: Sequence | None = None, **options
    ) -> dict | None:
        """Score what was added, and ``predictions`` with ``references`` if given; then start anew.

        Returns:
            the result, or None in a process other than 0.

        Raises:
            ValueError: there is nothing to score, predictions differ in their number of references, or an option is
                given here instead of to the constructor.
        """
        if options:
            raise ValueError(f"{', '.join(options)}: give options to {type(self).__name__}(...) or evaluate.load(...)")
        if predictions is None and references is None and self.writer is None:
            predictions, references = [], []  # the share of a process that has seen no sentence
        return super().compute(predictions=predictions, references=references)

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
