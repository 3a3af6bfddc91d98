"""The nine GLUE tasks: their text columns, labels, metrics and splits.

Wang et al. 2018, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding"
(arXiv:1804.07461), table 1 and section 3. Columns, splits and classes are named as in nyu-mll/glue on the Hub.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from .labelled_texts import LABEL, as_numbers, load_texts

HIDDEN = -1  # label of test samples, whose true labels GLUE does not publish
ENTAILMENT = ("entailment", "not_entailment")


class MissingData(ValueError):
    """Raised if the data of a task cannot be found."""


@dataclass(frozen=True)
class GlueTask:
    """A row of table 1.

    Args:
        name: as in the Hub's configurations.
        title: as in the paper.
        text_columns: one or two text columns.
        labels: class names by number; empty for regression.
        metrics: official metrics, see `metrics.glue.METRICS`; the first one selects the best checkpoint.
        validation: labelled splits that are not trained on.
        test: splits with hidden labels.
    """

    name: str
    title: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    @property
    def regression(self) -> bool:
        """Return whether the task is a regression."""
        return not self.labels


_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        GlueTask("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        GlueTask("stsb", "STS-B", _PAIR, (), ("pearson", "spearman")),
        GlueTask("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        GlueTask(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            validation=("validation_matched", "validation_mismatched"),
            test=("test_matched", "test_mismatched"),
        ),
        GlueTask("qnli", "QNLI", ("question", "sentence"), ENTAILMENT, ("accuracy",)),
        GlueTask("rte", "RTE", _PAIR, ENTAILMENT, ("accuracy",)),
        GlueTask("wnli", "WNLI", _PAIR, ENTAILMENT[::-1], ("accuracy",)),
    )
}


def find_task(name: str) -> GlueTask:
    """Return a task by name.

    Raises:
        ValueError: if the task is unknown.
    """
    if name not in TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, got "{name}"')
    return TASKS[name]


def find_tasks(names: str) -> list[GlueTask]:
    """Return tasks by name.

    Args:
        names: comma-separated distinct names, or "glue" for all nine.

    Raises:
        ValueError: if a name is unknown or repeated.
    """
    chosen = list(TASKS) if names.strip() == "glue" else [name.strip() for name in names.split(",")]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"tasks must not contain duplicates, got {names}")
    return [find_task(name) for name in chosen]


def place_of(task: str, dataset: str, name: str | None = None) -> tuple[str, str | None]:
    """Return ``dataset`` and ``name`` of a task's data, as `load_texts` takes them.

    ``{task}`` in either is replaced with the task's name, as in "data/glue-{task}". A data set called "glue", such as
    nyu-mll/glue on the Hub, has one configuration per task and needs no name.
    """
    dataset = dataset.replace("{task}", task)
    if name is None and Path(dataset).name == "glue":
        name = task
    return dataset, name and name.replace("{task}", task)


def load_task(
    task: GlueTask,
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
) -> datasets.DatasetDict:
    """Load the splits of a task; see `place_of` and `load_texts`.

    Raises:
        MissingData: if the data set does not exist or cannot be downloaded.
    """
    try:
        return load_texts(*place_of(task.name, dataset, name), revision, data_files)
    except ValueError as error:
        raise MissingData(str(error)) from error


def hide(rows: datasets.Dataset) -> datasets.Dataset:
    """Convert the ``label`` of a split to numbers, with None for `HIDDEN`: unlike a class, a score may be -1."""

    def known(values: Sequence[float | None]) -> dict[str, list[float | None]]:
        return {LABEL: [None if value == HIDDEN else value for value in values]}

    return as_numbers(rows).map(known, batched=True, input_columns=[LABEL])
