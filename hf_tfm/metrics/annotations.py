"""Validate user-supplied boxes, masks, segments and labels (tensors, arrays or lists) and convert them to arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def records(values: Any, argument: str) -> list[Mapping]:
    """Return ``values`` as a list of mappings.

    Raises:
        ValueError: if ``values`` is not a list of mappings.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"{argument} must be a list of dictionaries, got {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ValueError(f"{argument}[{i}] must be a dictionary, got {type(value).__name__}")
    return list(values)


def entry(record: Mapping, key: str, place: str) -> Any:
    """Return ``record[key]``.

    Raises:
        ValueError: if the key is missing or its value is None.
    """
    if record.get(key) is None:
        raise ValueError(f'{place} needs "{key}"; it has {", ".join(map(str, record)) or "nothing"}')
    return record[key]


def image_id(reference: Mapping, place: str) -> int:
    """Return the image id of a reference.

    Raises:
        ValueError: if it is missing or not an integer.
    """
    value = entry(reference, "image_id", place)
    if isinstance(value, str):
        raise ValueError(f'{place}["image_id"] must be an integer, got "{value}"')
    place = f'{place}["image_id"]'
    # transformers' labels store the id as a one-element tensor.
    return int(integers(to_array(value, place).reshape(-1), place, limit=None, count=1, least=None)[0])


def ordered_names(names: Sequence[str] | Mapping[int, str] | None) -> list[str] | None:
    """Return the names of classes 0 to N - 1 in order.

    Raises:
        ValueError: if a class is missing or two classes share a name.
    """
    if names is None:
        return None
    if isinstance(names, Mapping):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"class_names must be of the classes 0 to {len(names) - 1}, got {sorted(names)}")
        names = [names[label] for label in range(len(names))]
    if isinstance(names, str) or not names:
        raise ValueError(f"class_names must be a list of names, got {names!r}")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"class_names must be distinct, got {', '.join(twice)} more than once")
    return list(names)


def to_array(values: Any, place: str) -> np.ndarray:
    """Convert a tensor, an array or nested lists of numbers to an array.

    Raises:
        ValueError: if the values do not form a regular numeric array.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{place} must be a regular array of numbers")
    return array


def numbers(values: Any, place: str, count: int | None = None) -> np.ndarray:
    """Return finite numbers as (n,) float64.

    Raises:
        ValueError: if a number is not finite, or there are not ``count`` numbers.
    """
    array = to_array(values, place)
    if array.ndim != 1 or count not in (None, len(array)):
        raise ValueError(f"{place} must have shape ({'n' if count is None else count},), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{place} must be finite, got {array[~np.isfinite(array)][0]}")
    return array.astype(np.float64)


def integers(
    values: Any, place: str, limit: int | None, count: int | None = None, least: int | None = 0
) -> np.ndarray:
    """Return integers as (n,) int64.

    Raises:
        ValueError: if a value is not an integer, is below ``least`` or not below ``limit``, or there are not ``count``
            values.
    """
    array = to_array(values, place)
    if array.ndim != 1 or count not in (None, len(array)):
        raise ValueError(f"{place} must have shape ({'n' if count is None else count},), got {array.shape}")
    if array.size and array.dtype.kind == "f":
        raise ValueError(f"{place} must hold integers, got {array.dtype}")
    array = array.astype(np.int64)
    wrong = np.zeros(len(array), bool) if least is None else array < least
    wrong |= False if limit is None else array >= limit
    if wrong.any():
        bounds = "at least 0" if limit is None else f"between {least} and {limit - 1}"
        raise ValueError(f"{place} must be {bounds}, got {array[wrong][0]}")
    return array


def boxes(values: Any, place: str, count: int) -> np.ndarray:
    """Convert boxes from (x1, y1, x2, y2) to (x, y, width, height), both in pixels, (n, 4) float64.

    Raises:
        ValueError: if the shape is not (count, 4), a value is not finite, or x2 < x1 or y2 < y1.
    """
    array = to_array(values, place)
    array = array.reshape(0, 4) if array.shape == (0,) else array  # an empty list has no second axis
    if array.shape != (count, 4):
        raise ValueError(f"{place} must have shape ({count}, 4), one box per label, got {array.shape}")
    array = numbers(array.reshape(-1), place).reshape(-1, 4)
    backward = (array[:, 2:] < array[:, :2]).any(axis=1)
    if backward.any():
        raise ValueError(
            f"{place} must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {array[backward][0].tolist()}"
        )
    return np.concatenate([array[:, :2], array[:, 2:] - array[:, :2]], axis=1)


def masks(values: Any, place: str, count: int) -> np.ndarray:
    """Return masks as (n, H, W) bool; an empty list gives (0, 0, 0).

    Raises:
        ValueError: if the shape is not (count, H, W) or a value is neither 0 nor 1.
    """
    array = to_array(values, place)
    array = array.reshape(0, 0, 0) if array.shape == (0,) else array
    if array.ndim != 3 or len(array) != count:
        raise ValueError(f"{place} must have shape ({count}, H, W), one mask per label, got {array.shape}")
    if array.dtype != bool and not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{place} must be bool, or 0 and 1")
    return array.astype(bool, copy=False)


def segment_map(values: Any, place: str) -> np.ndarray:
    """Return a map of segment ids as (H, W) int64.

    Raises:
        ValueError: if it is not two-dimensional or holds non-integer values.
    """
    array = to_array(values, place)
    if array.ndim != 2:
        raise ValueError(f"{place} must have shape (H, W), got {array.shape}")
    # transformers returns a float map filled with -1 if it finds no segment, so a float dtype is not an error.
    if array.dtype.kind == "f" and (wrong := np.trunc(array) != array).any():  # also true for NaN
        raise ValueError(f"{place} must hold integers, got {array[wrong][0]}")
    return array.astype(np.int64)
