"""Labelled texts or text pairs from any data set, and batches of texts of similar length.

    load_dataset(...) -> {"text", "pair", "label"} -> tokens, truncated: {"input_ids", ..., "label"} -> steps

Labels are classes, or regression targets if the data set's numbers are not all integers. It does not matter whether
they are stored as strings, integers or floats.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Value
from transformers import PreTrainedTokenizerBase

from .batching import Steps, TokenBudgetSampler
from .csv_files import separator_hint, written
from .images import LABEL, find_column, is_label, label_ids, label_names
from .number_parity import number_parity
from .progress import show_progress_of
from .source import announce, load_splits
from .text import check_filled, column_path, texts_at
from .tokens import tokenization_key, tokenized

log = logging.getLogger(__name__)

TEXT, PAIR = "text", "pair"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
WHOLE_NUMBER = r"(?:0|-?[1-9]\d{0,17})(?:\.0*)?"  # "01" and "+1" are class names
ProblemType = Literal["regression", "single_label_classification"]
EMBEDDED = {"number-parity": number_parity}


def load_texts(
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
) -> datasets.DatasetDict:
    """Load every split of a data set, as `load_splits` does, or the built-in data set "number-parity".

    Raises:
        ValueError: see `load_splits`.
    """
    if dataset not in EMBEDDED:
        return load_splits(dataset, name, revision, data_files)
    if name or revision or data_files:
        raise ValueError(f'dataset_name "{dataset}" is embedded: it takes no name, revision or data_files')
    splits = EMBEDDED[dataset]()
    announce(splits, dataset)
    return splits


def text_rows(
    rows: datasets.Dataset, text_columns: Sequence[str] = (), label_column: str | None = None, labelled: bool = True
) -> datasets.Dataset:
    """Return rows with ``text``, ``pair`` if there are two text columns, and ``label`` (see `settle_labels`).

    Args:
        rows: a split.
        text_columns: one or two columns, or dotted paths into them; default: the only text column.
        label_column: column of type ClassLabel, integer, string or float; default: the only ClassLabel, or the column
            "label".
        labelled: False omits labels.

    Raises:
        ValueError: if there are no rows, a column is missing or named twice, a text value is not a string, all texts
            are empty, or labels are neither classes nor numbers.
    """
    if not len(rows):
        raise ValueError("the data set has no rows")
    label = find_column(rows.features, label_column, "label_column", ClassLabel, LABEL) if labelled else None
    names = list(text_columns) or [only_text(rows.features, label)]
    if len(names) > 2:
        raise ValueError(f"text_columns must be one column or two, got {', '.join(names)}")
    if twice := [name for name in names if name == label or names.count(name) > 1]:
        other = "label_column" if twice[0] == label else "text_columns twice"
        raise ValueError(f'text_columns "{twice[0]}" is also given as {other}')
    rows = written(rows, names)
    paths = [column_path(rows[0], name, "text_columns") for name in names]
    for path in paths:
        check_filled(rows, path, "text_columns")

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {f"_{part}": texts_at(batch, indices, path) for part, path in zip((TEXT, PAIR), paths, strict=False)}

    show_progress_of(rows)
    others = [column for column in rows.column_names if column != label]
    rows = rows.map(pick, batched=True, with_indices=True, remove_columns=others)
    new = {f"_{part}": part for part in (TEXT, PAIR)[: len(paths)]} | ({label: LABEL} if labelled else {})
    rows = rows.rename_columns({old: name for old, name in new.items() if old != name})
    for part, name in zip((TEXT, PAIR), names, strict=False):
        check_empty(rows, part, name)
    return settle_labels(rows) if labelled else rows


def check_empty(rows: datasets.Dataset, part: str, column: str) -> None:
    """Warn about empty texts.

    Raises:
        ValueError: if all texts are empty.
    """
    empty = pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(rows.data.column(part))), 0)).as_py()
    if empty == len(rows):
        raise ValueError(f'all {empty} texts of column "{column}" are empty')
    if empty:
        log.warning('%d of %d texts of column "%s" are empty', empty, len(rows), column)


def settle_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Convert labels to integers if all are integers, or to floats if all are numbers and one is not an integer.

    Other labels are unchanged: classes of a ClassLabel, booleans, and strings that are not numbers or are written
    differently, such as "01". Empty strings and NaN become None: the row is unlabelled.

    Raises:
        ValueError: if labels are lists, objects or dates, or have mixed types.
    """
    kind = rows.features[LABEL]
    dtype = getattr(kind, "dtype", "")
    if isinstance(kind, ClassLabel) or (isinstance(kind, Value) and re.match("u?int|bool|null", dtype)):
        return rows
    if not (isinstance(kind, Value) and re.match("(large_)?string|float|double", dtype)):
        first = next((value for value in rows[LABEL] if value is not None), None)
        raise ValueError(f"labels must be numbers or text, all of one kind, got {kind_of_label(kind)}: {first!r:.60}")
    text = "string" in dtype
    values = [value for value in rows.unique(LABEL) if not no_label(value)]
    if text and not all(re.fullmatch(NUMBER, value) for value in values):
        numbers, to = False, dtype
    else:
        numbers = [float(value) for value in values]
        if beyond := [value for value in numbers if not math.isfinite(value)]:
            raise ValueError(f"labels must be finite numbers, got {beyond[0]}")
        whole = all(value.is_integer() for value in numbers)
        form = not text or all(re.fullmatch(WHOLE_NUMBER, value) for value in values)
        to = dtype if not values or (whole and not form) else "int64" if whole else "float64"
    if to == dtype and not any(no_label(value) and value is not None for value in rows.unique(LABEL)):
        return rows
    convert = {"int64": lambda value: int(value.split(".")[0] if text else value), "float64": float}.get(to)

    def converted(values: Sequence[Any]) -> dict[str, list[Any]]:
        return {LABEL: [None if no_label(v) else convert(v) if convert else v for v in values]}

    return rows.map(
        converted, batched=True, input_columns=[LABEL], features=datasets.Features({**rows.features, LABEL: Value(to)})
    )


def no_label(value: Any) -> bool:
    """Return whether a stored label is missing: None, NaN, or an empty or whitespace-only string."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def kind_of_label(kind: Any) -> str:
    """Return the name of a feature's type, for error messages."""
    if type(kind).__name__ == "Json":
        return "values of several kinds, or objects"
    return (
        "lists" if isinstance(kind, (datasets.List, datasets.LargeList, list)) else str(getattr(kind, "dtype", kind))
    )


def as_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    """Convert the labels of `text_rows` to float64 regression targets.

    Raises:
        ValueError: if labels are named classes.
    """
    kind = rows.features[LABEL]
    if isinstance(kind, ClassLabel) or not re.match("u?int|float|double|null", kind.dtype):
        raise ValueError(f"labels must be numbers for regression, got {kind.dtype}: {rows.unique(LABEL)[:5]}")
    return rows if kind.dtype == "float64" else rows.cast_column(LABEL, Value("float64"))


def as_classes(rows: datasets.Dataset) -> datasets.Dataset:
    """Convert the labels of `text_rows` to classes, including non-integer numbers."""
    if not is_regression(rows):
        return rows

    def name(values: Sequence[float | None]) -> dict[str, list[str | None]]:
        return {LABEL: [None if value is None else f"{value:g}" for value in values]}

    features = datasets.Features({**rows.features, LABEL: Value("string")})
    return rows.map(name, batched=True, input_columns=[LABEL], features=features)


def check_classes(rows: datasets.Dataset, names: Sequence[str], split: str, known: bool = False) -> None:
    """Warn about unlabelled texts, and about class names that differ only in case or whitespace.

    Args:
        split: name of the split.
        known: whether the names come from somewhere other than these rows.

    Raises:
        ValueError: if fewer than two different labels occur.
    """
    labels = rows[LABEL][:]
    there = [is_label(value) for value in labels]
    if len({value for value, labelled in zip(labels, there, strict=True) if labelled}) < 2:
        one = next((value for value, labelled in zip(labels, there, strict=True) if labelled), None)
        raise ValueError(
            f'split "{split}" has {sum(there)} of {len(there)} texts with a label, and all have the same, {one!r}: '
            "there must be at least two classes"
        )
    tell_unlabelled(there, split)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    for group in alike.values():
        if len(group) > 1 and not known:
            log.warning("classes differ in case or white space alone: %s", ", ".join(map(repr, group)))


def tell_unlabelled(there: Sequence[bool], split: str) -> None:
    """Warn about unlabelled texts.

    Args:
        there: for each row of the split, whether it is labelled.
    """
    if not all(there):
        log.warning(
            '%d of %d texts of split "%s" have no label and are not used for training; the first is row %d',
            len(there) - sum(there),
            len(there),
            split,
            list(there).index(False),
        )


def only_text(features: Mapping[str, Any], label: str | None) -> str:
    """Return the only text column besides the label.

    Raises:
        ValueError: if there is none, or several; the message lists the columns.
    """
    found = [
        name
        for name, kind in features.items()
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string") and name != label
    ]
    if not found and TEXT in features and label != TEXT:
        return TEXT
    if len(found) != 1:
        raise ValueError(
            f"text_columns must name one column or two, since they cannot be inferred; the data set has "
            f"{', '.join(features)}"
            f"{separator_hint(features)}"
        )
    return found[0]


def is_regression(rows: datasets.Dataset) -> bool:
    """Return whether the labels of `text_rows` are regression targets."""
    kind = rows.features[LABEL]
    return isinstance(kind, Value) and kind.dtype.startswith("float")


def class_names(rows: datasets.Dataset, known: Sequence[str] = ()) -> list[str]:
    """Return the class names: ``known`` if given, otherwise those of the labels; see `label_names`.

    Raises:
        ValueError: if labels are neither numbers nor strings, or there are fewer than two classes.
    """
    if known:
        return list(known)
    if all(value is None for value in rows.unique(LABEL)):
        raise ValueError("no text has a label")
    names = label_names(rows)
    if len(names) < 2:
        negative = any(isinstance(value, int) and value < 0 for value in rows.unique(LABEL))
        raise ValueError(
            f"there must be at least two classes of labels, got {', '.join(map(repr, names)) or 'none'}"
            f"{' (a number below 0 means that a text has no label)' * negative}"
        )
    return names


def class_ids(rows: datasets.Dataset, names: Sequence[str]) -> dict[int | str, int]:
    """Map each label as stored to its index in ``names``.

    Plain integers already are indices, unless the names are numbers themselves.

    Raises:
        ValueError: if a class of a ClassLabel is not among the names.
    """
    kind = rows.features[LABEL]
    whole = isinstance(kind, Value) and "int" in kind.dtype
    if whole and not all(name.lstrip("-").isdecimal() for name in names):
        return {place: place for place in range(len(names))}
    return label_ids(rows, names)


class TextTokenization:
    """``text`` and ``pair`` -> ``input_ids``, and ``token_type_ids`` if the tokenizer returns them; a
    `tokens.Tokenization`.

    Inputs longer than ``max_length`` tokens are truncated, the longer text of a pair first (Devlin et al. 2019, the
    authors' run_classifier.py).
    """

    features = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool):
        self.tokenizer, self.max_length, self.paired = tokenizer, max_length, paired
        self.key = tokenization_key(tokenizer, "texts", max_length, paired)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        texts = (batch[TEXT], batch[PAIR]) if self.paired else (batch[TEXT],)
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False))


def tokenize_texts(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Return rows with the tokens of `TextTokenization` instead of the texts, cached by `datasets`."""
    paired = PAIR in rows.column_names
    return tokenized(rows, TextTokenization(tokenizer, max_length, paired), [TEXT, PAIR][: 1 + paired])


def text_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens of each row of `tokenize_texts`, (N,)."""
    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


class LengthBatchSampler(TokenBudgetSampler):
    """Steps with an equal number of texts of similar length: a conventional batch size with little padding.

    Args:
        lengths: (N,) tokens of each text.
        batch_size: texts per step, over all ranks; only the step of the longest texts may have fewer.
        seed, shuffle: see `TokenBudgetSampler`.

    Raises:
        ValueError: if ``batch_size`` is below 1 or there are no texts.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0, shuffle: bool = True):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        longest = int(max(lengths, default=0))
        super().__init__(lengths, max(longest, 1) * batch_size, seed, shuffle, max_samples=batch_size)

    def check_budget(self, name: str, samples: int) -> None:
        """Accept any number of texts."""

    def cut(self, part: Sequence[int], samples: int) -> Steps:
        """Split a part of a step into runs of at most ``samples`` texts."""
        return [list(part[i : i + samples]) for i in range(0, len(part), samples)]
