"""Rows of the splits of a run: to train on, to validate on, and to score."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import datasets

from ..arguments import EvaluationArguments
from ..data.source import DataFiles, first, gather, load_splits, take_split


class SplitOptions(Protocol):
    """Arguments of a run that choose rows: those of `SplitArguments`, and the seed."""

    train_split: str
    validation_split: str | None
    holdout: int | None
    max_train_samples: int | None
    seed: int


class RowOptions(SplitOptions, Protocol):
    """Arguments of a run that load rows: also those of `DatasetArguments`, and whether training rows are streamed."""

    test_splits: list[str]

    @property
    def source(self) -> tuple[str, str | None, str | None, DataFiles | None]: ...

    @property
    def streaming(self) -> bool: ...


def load_rows(
    args: RowOptions | EvaluationArguments,
    read: Callable[[Any], Any],
    select: Callable[[Any, str], Any] = lambda rows, split: rows,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Load the rows of a task whose training data may be streamed, by split.

    Args:
        args: of a run or of an evaluation.
        read: rows of a data set -> rows of the task.
        select: (rows of the task, name of a split) -> the rows of that split.
        sources: {name of a split that the data set lacks: split that `select` makes it of}.

    Raises:
        ValueError: the data set has a split with a name of ``sources``.
    """
    if isinstance(args, EvaluationArguments):
        rows = select(read(take_split(load_splits(*args.source), args.split, "split")), args.split)
        return {args.split: first(rows, args.max_samples)}
    splits, sources = load_splits(*args.source, args.streaming), sources or {}
    if clash := [name for name in sources if name in splits]:
        raise ValueError(f'test_splits "{clash[0]}" is ambiguous: the data set has a split of this name, too')

    def rows_of(name: str, argument: str) -> Any:
        rows = select(read(take_split(splits, sources.get(name, name), argument)), name)
        return gather(rows) if args.streaming and argument != "train_split" else rows

    return split_rows(args, args.test_splits, rows_of)


def split_rows(
    args: SplitOptions, test_splits: list[str], rows_of: Callable[[str, str], datasets.Dataset]
) -> dict[str, datasets.Dataset]:
    """Return the rows of the training split, the validation data and each test split, by name of the split.

    Args:
        rows_of: (name of a split, the argument that names it) -> its rows.

    Raises:
        ValueError: ``holdout`` is not below the number of training rows.
    """
    train = rows_of(args.train_split, "train_split")
    rows = {}
    if args.holdout is not None:
        if args.holdout >= len(train):
            raise ValueError(f"holdout must be below the {len(train)} rows of {args.train_split}, got {args.holdout}")
        parts = train.train_test_split(args.holdout, seed=args.seed)
        train, rows["holdout"] = parts["train"], parts["test"]
    if args.max_train_samples is not None:
        train = train.shuffle(args.seed).select(range(min(args.max_train_samples, len(train))))
    arguments = dict.fromkeys(test_splits, "test_splits")
    if args.validation_split is not None:
        arguments[args.validation_split] = "validation_split"
    for name, argument in arguments.items():
        rows[name] = rows_of(name, argument)
    return {**rows, args.train_split: train}
