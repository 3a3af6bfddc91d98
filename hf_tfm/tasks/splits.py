"""Which rows a run learns from, which decide what is best, and which are only scored."""

from collections.abc import Callable
from typing import Protocol

import datasets


class SplitArguments(Protocol):
    """Knobs that name splits, or make one: ``holdout`` rows of the training split are held out where
    ``validation_split`` is None."""

    seed: int
    train_split: str
    validation_split: str | None
    holdout: int | None
    max_train_samples: int | None


def check_holdout(args: SplitArguments) -> None:
    """Refuse two validation splits, or none.

    Raises:
        ValueError: it says which are given.
    """
    if (args.validation_split is None) == (args.holdout is None):
        raise ValueError(
            f"give exactly one of validation_split and holdout, got {args.validation_split} and {args.holdout}; "
            "null takes back what a preset gives"
        )


def split_rows(
    args: SplitArguments, test_splits: list[str], rows_of: Callable[[str, str], datasets.Dataset]
) -> dict[str, datasets.Dataset]:
    """The rows of the training split, of what is held out, and of each test split, by the name of the split.

    Args:
        rows_of: (name of a split, the argument it comes from) -> its rows.

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
    for name, argument in {
        **dict.fromkeys(test_splits, "test_splits"),
        args.validation_split: "validation_split",
    }.items():
        if name is not None:
            rows[name] = rows_of(name, argument)
    return {**rows, args.train_split: train}
