"""Boxes, masks, segments and labels as users have them, tensors or lists -> checked arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def records(values: Any, argument: str) -> list[Mapping]:
    """A list of mappings.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"{argument} must be a list of dictionaries, got {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ValueError(f"{argument}[{i}] must be a dictionary, got {type(value).__name__}")
    return list(values)


def entry(record: Mapping, key: str, place: str) -> Any:
    """``record[key]``.

    Raises:
        ValueError: there is none.
    """
    if record.get(key) is None:
        raise ValueError(f'{place} needs "{key}"; it has {", ".join(map(str, record)) or "nothing"}')
    return record[key]


def image_id(reference: Mapping, place: str) -> int:
    """The image id of a reference.

    Raises:
        ValueError: there is none, or it is not an integer.
    """
    value = entry(reference, "image_id", place)
    if isinstance(value, str):
        raise ValueError(f'{place}["image_id"] must be an integer, got "{value}"')
    place = f'{place}["image_id"]'
    # transformers' labels hold it as a tensor of one element.
    return int(integers(to_array(value, place).reshape(-1), place, limit=None, count=1, least=None)[0])


def ordered_names(names: Sequence[str] | Mapping[int, str] | None) -> list[str] | None:
    """Names of the classes 0 to N - 1, in order.

    Raises:
        ValueError: classes are missing, or two have the same name.
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
    """A tensor, an array or nested lists of numbers as an array.

    Raises:
        ValueError: it is no regular array of numbers.
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
    """Finite numbers, (n,) float64.

    Raises:
        ValueError: they are not, or not ``count``.
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
    """Integers, (n,) int64.

    Raises:
        ValueError: they are not, not ``count``, below ``least``, or not below ``limit``.
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
    """Boxes x1, y1, x2, y2 in pixels -> x, y, width, height in pixels, (n, 4) float64.

    Raises:
        ValueError: they are not (count, 4) or not finite, or a box ends before it begins.
    """
    array = to_array(values, place)
    array = array.reshape(0, 4) if array.shape == (0,) else array  # an empty list has no second axis
    if array.shape != (count, 4):
        raise ValueError(f"{place} must have shape ({count}, 4), one box a label, got {array.shape}")
    array = numbers(array.reshape(-1), place).reshape(-1, 4)
    backward = (array[:, 2:] < array[:, :2]).any(axis=1)
    if backward.any():
        raise ValueError(
            f"{place} must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {array[backward][0].tolist()}"
        )
    return np.concatenate([array[:, :2], array[:, 2:] - array[:, :2]], axis=1)


def masks(values: Any, place: str, count: int) -> np.ndarray:
    """Masks, (n, H, W) bool; no masks at all are (0, 0, 0).

    Raises:
        ValueError: they are not (count, H, W), or not made of 0 and 1.
    """
    array = to_array(values, place)
    array = array.reshape(0, 0, 0) if array.shape == (0,) else array
    if array.ndim != 3 or len(array) != count:
        raise ValueError(f"{place} must have shape ({count}, H, W), one mask a label, got {array.shape}")
    if array.dtype != bool and not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{place} must be bool, or 0 and 1")
    return array.astype(bool, copy=False)


def segment_map(values: Any, place: str) -> np.ndarray:
    """A map of segment ids, (H, W) int64.

    Raises:
        ValueError: it has another shape, or numbers that are not whole.
    """
    array = to_array(values, place)
    if array.ndim != 2:
        raise ValueError(f"{place} must have shape (H, W), got {array.shape}")
    # transformers gives a float map of -1 where it finds no segment, so the type alone is no mistake.
    if array.dtype.kind == "f" and (wrong := np.trunc(array) != array).any():  # NaN differs from itself
        raise ValueError(f"{place} must hold integers, got {array[wrong][0]}")
    return array.astype(np.int64)
