"""Conversion between columns of lists of structs and flat NumPy arrays, without a Python loop over images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def whole(rows: datasets.Dataset, column: str) -> pa.Array:
    """Return a column of a data set as one Arrow array, with the data set's row selection and order applied."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is a list type of any kind."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def lengths(lists: pa.Array) -> np.ndarray:
    """Return the length of each list, (N,) int64; 0 for null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def subfields(feature: Any) -> dict[str, Any]:
    """Return the fields of a list of structs or a struct of lists as `datasets` features; {} for any other feature."""
    if isinstance(feature, Mapping):
        return {name: kind.feature for name, kind in feature.items() if hasattr(kind, "feature")}
    inner = getattr(feature, "feature", None)
    return dict(inner) if isinstance(inner, Mapping) else {}


@dataclass
class FlatList:
    """The elements of a column's lists, concatenated over all rows.

    Args:
        column: name of the column, for error messages.
        counts: (N,) number of elements in each row.
        fields: {name: M values}.
        kinds: {name: `datasets` feature}.
    """

    column: str
    counts: np.ndarray
    fields: dict[str, pa.Array]
    kinds: dict[str, Any]

    @classmethod
    def of(cls, rows: datasets.Dataset, column: str) -> "FlatList":
        """Flatten a column of lists of structs, or of structs of lists.

        Raises:
            ValueError: if the lists of a struct differ in length.
        """
        kinds = subfields(rows.features[column])
        values = whole(rows, column)
        if is_list(values.type):
            elements = values.flatten()
            fields = {name: pc.struct_field(elements, name) for name in kinds}
            return cls(column, lengths(values), fields, kinds)
        lists = {name: pc.struct_field(values, name) for name in kinds}
        counts = {name: lengths(array) for name, array in lists.items()}
        first = next(iter(counts))
        for name, count in counts.items():
            if (odd := np.flatnonzero(count != counts[first])).size:
                raise ValueError(
                    f'column "{column}" must have equal numbers of {first} and {name} in each row, got '
                    f"{counts[first][odd[0]]} and {count[odd[0]]} in row {odd[0]}"
                )
        return cls(column, counts[first], {name: array.flatten() for name, array in lists.items()}, kinds)

    def rows(self) -> np.ndarray:
        """Return the row of each element, (M,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def find(self, names: Sequence[str]) -> str:
        """Return the first of ``names`` that is a field.

        Raises:
            ValueError: if none is; the message lists the fields.
        """
        for name in names:
            if name in self.fields:
                return name
        have = ", ".join(self.fields)
        raise ValueError(f'column "{self.column}" must have a field {" or ".join(names)}; it has {have}')

    def numbers(self, name: str, default: float) -> np.ndarray:
        """Return a field as (M,) float64; ``default`` replaces nulls and a missing field.

        Raises:
            ValueError: if the field is not numeric.
        """
        if name not in self.fields:
            return np.full(int(self.counts.sum()), default)
        return self.to_float(self.fields[name], name, default)

    def to_float(self, values: pa.Array, name: str, default: float) -> np.ndarray:
        """Convert numbers to float64."""
        if not (
            pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)
        ):
            raise ValueError(f'column "{self.column}" must hold numbers as {name}, got {values.type}')
        return pc.fill_null(pc.cast(values, pa.float64()), default).to_numpy(zero_copy_only=False)

    def fours(self, name: str) -> np.ndarray:
        """Return a field of four numbers per element, (M, 4) float64; NaN if there are none.

        Raises:
            ValueError: if the field holds anything else.
        """
        lists = self.fields[name]
        if not is_list(lists.type):
            raise ValueError(f'column "{self.column}" must hold four numbers as {name}, got {lists.type}')
        count = lengths(lists)
        if (odd := np.flatnonzero((count != 4) & (count != 0))).size:
            raise ValueError(
                f'column "{self.column}" must hold four numbers as {name}, got {count[odd[0]]} in row '
                f"{self.rows()[odd[0]]}"
            )
        boxes = np.full((len(lists), 4), np.nan)
        boxes[count == 4] = self.to_float(lists.flatten(), name, np.nan).reshape(-1, 4)
        return boxes


def nest(fields: Mapping[str, pa.Array], counts: np.ndarray) -> pa.ListArray:
    """Invert `FlatList.of`: M elements of each field -> N lists of structs."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(list(fields.values()), list(fields)))
