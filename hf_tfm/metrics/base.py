"""What all metrics share: options are checked, a lone process keeps its samples in memory, a share may be empty."""

import inspect
from abc import ABC
from collections.abc import Sequence

import evaluate


class OfflineMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` that needs no network.

    A lone process keeps its samples in memory, so it leaves no cache or lock file and collides with no other. Several
    processes meet in files, as `evaluate` arranges it: process 0 returns the result of all, the others None.

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
            # Under evaluate's fixed default two runs on one machine can mix their samples.
            raise ValueError(f"num_process={processes} needs an experiment_id, the same in all processes of a run")
        super().__init__(**kwargs)

    def add(self, *, prediction=None, reference=None) -> None:
        """Add one prediction and what belongs to it."""
        self.add_batch(predictions=[prediction], references=[reference])

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
            predictions, references = [], []  # the share of a process that has seen no sample
        return super().compute(predictions=predictions, references=references)
