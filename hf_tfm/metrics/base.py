"""Base class of all metrics: validates options, keeps samples in memory in a single process, allows empty shards."""

import inspect
from abc import ABC
from collections.abc import Sequence
from typing import Any

import evaluate


class OfflineMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` that needs no network access.

    A single process keeps its samples in memory: it leaves no cache or lock file and cannot collide with another run.
    Several processes exchange samples through files, as in `evaluate`: process 0 returns the result over all samples,
    the others None.

    Args:
        kwargs: options of `evaluate.Metric`; ``keep_in_memory`` is set according to ``num_process``.

    Raises:
        ValueError: if an option is unknown, or ``num_process`` is above 1 and ``experiment_id`` is not set.
    """

    source: str  # reference that defines the metric

    def __init__(self, **kwargs):
        # evaluate.Metric ignores unknown options silently.
        known = inspect.signature(evaluate.Metric).parameters
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an option of {type(self).__name__}")
        processes = kwargs.get("num_process", 1)
        if processes == 1:
            kwargs["keep_in_memory"] = True
        elif kwargs.get("experiment_id") is None:
            # With evaluate's fixed default id, two runs on one machine can mix their samples.
            raise ValueError(f"num_process={processes} needs an experiment_id, the same in all processes of a run")
        super().__init__(**kwargs)

    def add(self, *, prediction=None, reference=None) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(
        self, *, predictions: Sequence | None = None, references: Sequence | None = None, **options
    ) -> dict[str, Any] | None:
        """Score all added samples, plus ``predictions`` and ``references`` if given, then reset.

        Returns:
            The result in process 0, None in the other processes.

        Raises:
            ValueError: if there is nothing to score, predictions differ in their number of references, or an option is
                passed here instead of to the constructor.
        """
        if options:
            raise ValueError(f"{', '.join(options)}: give options to {type(self).__name__}(...) or evaluate.load(...)")
        if predictions is None and references is None and self.writer is None:
            predictions, references = [], []  # a process whose shard is empty
        return super().compute(predictions=predictions, references=references)

    def result_of(self, predictions: Any, references: Any) -> dict[str, Any]:
        """`compute` in a single process, which has the result.

        Raises:
            ValueError: if this is not process 0.
        """
        result = self.compute(predictions=predictions, references=references)
        if result is None:
            raise ValueError("the result is in process 0")
        return result
