"""The data that the checks of `data` examine: splits as they are stored, and the columns that a task reads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel
from transformers import PreTrainedTokenizerBase

from ..data import images
from ..data.images import IMAGE, BadImage, decode
from .findings import RowSample

LOOKED_AT = 500  # number of evenly spaced images of a split to decode


def is_given(value: Any) -> bool:
    """Return True if a row has a label: None, NaN, blank text and negative integers count as missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return not (isinstance(value, int) and value < 0)


@dataclass(frozen=True)
class Look:
    """Result of decoding an image.

    Args:
        height, width: upright size in pixels; 0 if unreadable.
        blank: all pixels are equal.
        error: why it is unreadable.
    """

    height: int = 0
    width: int = 0
    blank: bool = False
    error: str | None = None


def looks(images: datasets.Dataset) -> dict[int, Look]:
    """Decode up to `LOOKED_AT` evenly spaced images of `image_rows`, by row."""
    found = {}
    for row in np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)).tolist():
        try:
            pixels = decode(images[row][IMAGE])
        except (BadImage, OSError) as error:
            found[row] = Look(error=str(error))
        else:
            blank = torch.equal(pixels.amin((1, 2)), pixels.amax((1, 2)))
            found[row] = Look(*pixels.shape[1:], blank)
    return found


@dataclass(frozen=True)
class Columns:
    """Columns that a task reads.

    Args:
        texts: part ("text", "pair", "source", "target") -> keys that lead to its texts.
        label: label column; None without labels.
        image: image column; None without images.
        video: column of videos; None without videos.
    """

    texts: dict[str, list[str]]
    label: str | None = None
    image: str | None = None
    video: str | None = None


@dataclass(frozen=True, eq=False)
class DataSplit:
    """A split as stored.

    Args:
        name: name of the split.
        rows: N rows from `load_splits`.
        columns: columns that the task reads.
    """

    name: str
    rows: datasets.Dataset
    columns: Columns

    @cached_property
    def texts(self) -> dict[str, list[Any]]:
        """Part -> its N values, some of which may wrongly not be strings."""
        found = {}
        for part, (first, *others) in self.columns.texts.items():
            values = list(self.rows[first])
            for key in others:
                values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
            found[part] = values
        return found

    @cached_property
    def labels(self) -> list[Any]:
        """N labels; names for a ClassLabel, None for missing labels."""
        values, kind = list(self.rows[self.columns.label]), self.rows.features[self.columns.label]
        if isinstance(kind, ClassLabel):
            return [None if value is None or value < 0 else kind.names[value] for value in values]
        return [value if is_given(value) else None for value in values]

    @cached_property
    def images(self) -> datasets.Dataset:
        """N images, not decoded, in a column "image"."""
        return images.image_rows(self.rows, self.columns.image, labelled=False)

    @cached_property
    def looks(self) -> dict[int, Look]:
        """Inspection results of up to `LOOKED_AT` evenly spaced images, by row."""
        return looks(self.images)

    def sample(self, row: int) -> RowSample:
        """Return a row with an excerpt of its texts or label."""
        shown = [repr(values[row]) for values in self.texts.values()]
        if self.columns.label is not None:
            shown.append(f"label {self.labels[row]!r}")
        path = None
        if self.columns.image is not None:
            value = self.images[row][images.IMAGE]
            path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
        return RowSample(self.name, int(row), ", ".join(shown) or None, path)


@dataclass(frozen=True)
class DataCase:
    """Splits to examine, the training split first, and how their texts are read.

    Args:
        splits: splits by name.
        tokenizer: none if not given.
        max_length: maximum number of tokens of a text, or of words without a tokenizer; None for no limit.
    """

    splits: dict[str, DataSplit]
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None

    @property
    def train(self) -> DataSplit:
        """Training split."""
        return next(iter(self.splits.values()))

    @property
    def held_out(self) -> list[DataSplit]:
        """All other splits."""
        return list(self.splits.values())[1:]
