"""Texts, or pairs of them, with a label, from any data set; and batches of texts of like length.

    load_dataset(...) -> {"text", "pair", "label"} -> tokens, cut to a length: {"input_ids", ..., "label"} -> steps

The label is a class, or a number where the data set's are not whole: then a model learns it by regression.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Value
from transformers import PreTrainedTokenizerBase

from .batching import Steps, TokenBudgetSampler
from .images import LABEL, find_column, label_ids, label_names
from .number_parity import number_parity
from .source import announce, load_splits, show_progress_of
from .text import column_path, texts_at

TEXT, PAIR = "text", "pair"
EMBEDDED = {"number-parity": number_parity}


def load_texts(
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
) -> datasets.DatasetDict:
    """Every split of a data set: `load_splits`, and the embedded data set "number-parity".

    Raises:
        ValueError: see `load_splits`.
    """
    if dataset not in EMBEDDED:
        return load_splits(dataset, name, revision, data_files)
    if name or revision or data_files:
        raise ValueError(f'dataset "{dataset}" is embedded: it takes no name, revision or data_files')
    splits = EMBEDDED[dataset]()
    announce(splits, dataset)
    return splits


def text_rows(
    rows: datasets.Dataset, text_columns: Sequence[str] = (), label_column: str | None = None, labelled: bool = True
) -> datasets.Dataset:
    """Rows with ``text``, of two columns also ``pair``, and ``label`` as it is stored.

    Args:
        rows: a split.
        text_columns: one or two columns, or dotted paths into them; default, the only column of texts.
        label_column: a ClassLabel, integers, strings or numbers; default, the only ClassLabel or the column "label".
        labelled: False leaves labels out.

    Raises:
        ValueError: there are no rows, no such column, or a value that should be text is none.
    """
    if not len(rows):
        raise ValueError("the data set has no rows")
    label = find_column(rows.features, label_column, "label_column", ClassLabel, LABEL) if labelled else None
    names = list(text_columns) or [only_text(rows.features, label)]
    if len(names) > 2:
        raise ValueError(f"text_columns must be one column or two, got {', '.join(names)}")
    paths = [column_path(rows[0], name, "text_columns") for name in names]

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {f"_{part}": texts_at(batch, indices, path) for part, path in zip((TEXT, PAIR), paths, strict=False)}

    show_progress_of(rows)
    others = [column for column in rows.column_names if column != label]
    rows = rows.map(pick, batched=True, with_indices=True, remove_columns=others)
    new = {f"_{part}": part for part in (TEXT, PAIR)[: len(paths)]} | ({label: LABEL} if labelled else {})
    return rows.rename_columns({old: name for old, name in new.items() if old != name})


def only_text(features: Mapping[str, Any], label: str | None) -> str:
    """The only column of texts beside the label.

    Raises:
        ValueError: there is none, or several; the error names the columns there are.
    """
    found = [
        name
        for name, kind in features.items()
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string") and name != label
    ]
    if len(found) != 1:
        raise ValueError(
            f"text_columns must name one column or two, since none stands out; the data set has {', '.join(features)}"
        )
    return found[0]


def is_regression(rows: datasets.Dataset) -> bool:
    """Whether the labels of `text_rows` are numbers that need not be whole."""
    kind = rows.features[LABEL]
    return isinstance(kind, Value) and kind.dtype.startswith("float")


def class_names(rows: datasets.Dataset, known: Sequence[str] = ()) -> list[str]:
    """The names of the classes: those ``known`` beforehand, otherwise those of the labels; see `label_names`.

    Raises:
        ValueError: labels are neither numbers nor strings, there is none, or they are fewer than two.
    """
    if known:
        return list(known)
    if all(value is None for value in rows.unique(LABEL)):
        raise ValueError("no text has a label")
    names = label_names(rows)
    if len(names) < 2:
        raise ValueError(f"there must be at least two classes, got {', '.join(names) or 'none'}")
    return names


def class_ids(rows: datasets.Dataset, names: Sequence[str]) -> dict[int | str, int]:
    """From a label as it is stored to its place in ``names``.

    Plain integers are places already, unless the names are numbers themselves.

    Raises:
        ValueError: a class of a ClassLabel is not among the names.
    """
    kind = rows.features[LABEL]
    whole = isinstance(kind, Value) and "int" in kind.dtype
    if whole and not all(name.lstrip("-").isdecimal() for name in names):
        return {place: place for place in range(len(names))}
    return label_ids(rows, names)


def tokenize_texts(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """``text`` and ``pair`` -> ``input_ids``, and ``token_type_ids`` where the tokenizer gives them.

    What is longer than ``max_length`` tokens is cut, the longer text of a pair first (Devlin et al. 2019, the authors'
    run_classifier.py).
    """
    paired = PAIR in rows.column_names

    def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
        texts = (batch[TEXT], batch[PAIR]) if paired else (batch[TEXT],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        return dict(encoded)

    show_progress_of(rows)
    # Said in words, it quiets the tokenizers library, which warns when a data loader forks after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return rows.map(tokenize, batched=True, remove_columns=[TEXT, PAIR][: 1 + paired])


def text_lengths(rows: datasets.Dataset) -> np.ndarray:
    """(N,) tokens of each of `tokenize_texts`."""
    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


class LengthBatchSampler(TokenBudgetSampler):
    """Steps of equally many texts of like length: what papers call a batch size, with little padding.

    Args:
        lengths: (N,) tokens of each text.
        batch_size: texts of a step, over all ranks; only the step of the longest texts may have fewer.
        seed, shuffle: see `TokenBudgetSampler`.

    Raises:
        ValueError: ``batch_size`` is below 1, or there are no texts.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0, shuffle: bool = True):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        longest = int(max(lengths, default=0))
        super().__init__(lengths, max(longest, 1) * batch_size, seed, shuffle, max_samples=batch_size)

    def check_budget(self, name: str, samples: int) -> None:
        """Any number of texts fits."""

    def cut(self, part: Sequence[int], samples: int) -> Steps:
        """A part of a step as runs of at most ``samples`` texts."""
        return [list(part[i : i + samples]) for i in range(0, len(part), samples)]
