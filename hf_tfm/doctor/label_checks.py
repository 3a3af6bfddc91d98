"""Checks of class labels: missing, of mixed types, inconsistently spelled, rare, or in one split only."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import ClassLabel

from .data_case import DataCase, DataSplit
from .findings import Finding, failed, graded, ok, warning

MOSTLY = 0.5
RARE = 2  # minimum number of examples per class
UNBALANCED = 100  # maximum ratio of the frequencies of two classes
MANY_CLASSES = 0.5  # classes per example above which the column is probably not a class label
SHOWN = 3


def listed(values: list[Any]) -> str:
    """List the first values, and how many more there are."""
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(repr, values[:SHOWN])) + more


def missing_labels(split: DataSplit, case: DataCase) -> Finding:
    """Rows have labels."""
    missing = [row for row, value in enumerate(split.labels) if value is None]
    total = len(split.labels)
    if not missing:
        return ok(f"all {total} rows have a label")
    message = f"{len(missing)} of {total} rows have no label"
    if split is not case.train and len(missing) == total:
        return warning(f"{message}: it cannot be scored", "evaluate on another split", split.sample(missing[0]))
    return graded(
        split is case.train and len(missing) > MOSTLY * total,
        f"{message} (limit: {MOSTLY:.0%})",
        "fill in the labels or delete these rows; quote a class named NA or None",
        split.sample(missing[0]),
    )


def label_kind(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Labels have a single type, and are classes."""
    if isinstance(split.rows.features[split.columns.label], ClassLabel):
        return
    kinds = Counter(type(value).__name__ for value in split.labels if value is not None)
    wrong = [kind for kind in kinds if kind not in ("str", "int", "bool", "float")]
    odd = wrong or ([kinds.most_common()[-1][0]] if len(kinds) > 1 else [])
    if odd:
        row = next(row for row, value in enumerate(split.labels) if type(value).__name__ == odd[0])
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield failed(
            f"labels have mixed or unsupported types: {counts}", "use one type for all labels", split.sample(row)
        )
        return
    values = [value for value in split.labels if value is not None]
    fractions = [row for row, value in enumerate(split.labels) if isinstance(value, float) and value % 1]
    if fractions:
        yield warning(
            f"{len(fractions)} of {len(values)} labels are not whole numbers: a run trains a regression model",
            "write classes as whole numbers or names, unless you want regression",
            split.sample(fractions[0]),
        )
    elif len(set(values)) > max(20, MANY_CLASSES * len(values)):
        yield failed(
            f"{len(set(values))} different labels for {len(values)} rows (limit: {MANY_CLASSES:.0%})",
            "set label_column to the column of classes",
            split.sample(0),
        )


def label_spelling(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """No two classes differ only in case or white space."""
    spelled: dict[str, set[str]] = {}
    for value in split.labels:
        if isinstance(value, str):
            spelled.setdefault(" ".join(value.split()).casefold(), set()).add(value)
    for values in spelled.values():
        if len(values) > 1:
            row = next(row for row, value in enumerate(split.labels) if value == sorted(values)[-1])
            yield warning(
                f"classes {listed(sorted(values))} differ only in case or white space",
                "use one spelling per class",
                split.sample(row),
            )


def class_balance(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """There are several classes, with enough examples of each."""
    counts = Counter(value for value in split.labels if value is not None)
    if not counts or any(isinstance(value, float) and value % 1 for value in counts):
        return
    kind = split.rows.features[split.columns.label]
    names = kind.names if isinstance(kind, ClassLabel) else list(counts)
    if split is case.train and len(counts) < 2:
        yield failed(
            f"all {sum(counts.values())} labels are {next(iter(counts))!r}: there is only one class",
            "add examples of other classes, or set another label_column",
            split.sample(split.labels.index(next(iter(counts)))),
        )
        return
    if split is case.train and (absent := [name for name in names if name not in counts]):
        yield warning(
            f"{len(absent)} classes have no example: {listed(absent)}", "add examples, or remove these classes"
        )
    (most, high), (least, low) = counts.most_common()[0], counts.most_common()[-1]
    if split is case.train and (low < RARE or high > UNBALANCED * low):
        yield warning(
            f"class {least!r} has {low} examples and class {most!r} {high} (limits: at least {RARE}, at most "
            f"{UNBALANCED} times)",
            "add examples of the rare class, or use a metric that weights classes equally",
            split.sample(split.labels.index(least)),
        )


def classes_in_one_split(case: DataCase) -> Iterator[Finding]:
    """Every class that is evaluated is also trained on."""
    learned = {value for value in case.train.labels if value is not None}
    if any(isinstance(value, float) and value % 1 for value in learned):
        return
    for split in case.held_out:
        new = sorted({value for value in split.labels if value is not None} - learned, key=str)
        if new:
            yield failed(
                f"{len(new)} classes of {split.name} are not in {case.train.name}: {listed(new)}",
                "use the same classes in every split",
                split.sample(split.labels.index(new[0])),
            )
