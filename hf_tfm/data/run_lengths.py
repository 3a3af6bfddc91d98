"""Segmentation masks as COCO's compressed run lengths: ``{"size": [height, width], "counts": text}``.

polygons | counts as numbers | counts as text -> text of a few hundred bytes -> (n, h, w) bool
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import List, Value
from faster_coco_eval.core import mask as coco_mask

FEATURE = {"size": List(Value("int32"), length=2), "counts": Value("string")}
MAX_SIDE = 1_000_000  # maximum height or width in pixels that an annotation may state for an image
# Maximum total edge length of an outline in pixels. Points are sampled along all edges, 80 bytes per pixel, before
# clipping to the image; COCO's outlines have up to 7,000.
MAX_EDGES = 1_000_000
ARROW_TYPE = pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})


def run_lengths(outline: Any, height: int, width: int) -> dict[str, Any] | None:
    """Convert an outline in any COCO format to run lengths; None if there is no outline.

    Args:
        outline: polygons [[x, y, x, y, ...], ...], a single polygon, or a dict of ``size`` and ``counts`` (numbers or
            text). Parts outside the image are clipped.
        height, width: size of the image in pixels.

    Raises:
        ValueError: if the outline has another form, or belongs to an image of another size.
    """
    if outline is None or (isinstance(outline, str | Sequence) and not len(outline)):
        return None
    if isinstance(outline, Mapping):
        return {"size": [height, width], "counts": packed_counts(outline, height, width)}
    packed = coco_mask.merge(coco_mask.frPyObjects(polygons(outline), height, width))
    return {"size": [height, width], "counts": text(packed["counts"])}


def packed_counts(outline: Mapping[str, Any], height: int, width: int) -> str:
    """Return the compressed counts of run lengths.

    Raises:
        ValueError: if a field is missing or malformed, or the image has another size.
    """
    size, counts = outline.get("size"), outline.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"segmentation has size {size}, but its image has {[height, width]}")
    if isinstance(counts, str | bytes):
        check_counts(unpacked(counts), height, width)
        return text(counts)
    if not isinstance(counts, Sequence) or not all(type(count) is int for count in counts):
        raise ValueError(f"segmentation must have counts, integers or text, got {type(counts).__name__}")
    check_counts(counts, height, width)
    return text(coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)["counts"])


def check_counts(counts: Sequence[int] | np.ndarray, height: int, width: int) -> None:
    """Raise if a run is negative or the runs do not sum to the number of pixels.

    Raises:
        ValueError: if so.
    """
    if len(counts) and min(counts) < 0:
        raise ValueError(f"segmentation has a run of {min(counts)} pixels")
    if (total := sum(map(int, counts))) != height * width:
        raise ValueError(f"segmentation counts {total} pixels, but its image has {height * width}")


def unpacked(counts: str | bytes) -> np.ndarray:
    """Decode compressed counts to int64.

    A character holds five bits. From the fourth count on, the difference to the count two places before is stored.

    Raises:
        ValueError: if the text is not valid compressed counts.
    """
    data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    letters = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not letters.size or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("segmentation has counts that are not valid compressed run lengths")
    ends = np.flatnonzero(letters & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 7:  # numbers have 32 bits
        raise ValueError("segmentation has counts that are not valid compressed run lengths")
    digits = np.arange(letters.size) - np.repeat(starts, sizes)
    found = np.add.reduceat((letters & 31) << (5 * digits), starts)
    found -= np.where(letters[ends] & 16 > 0, 1 << (5 * sizes), 0)  # bit 4 of the last character is the sign
    for first in (1, 2):  # the first three are absolute: 3, 5, ... accumulate from 1, and 4, 6, ... from 2
        found[first::2] = np.cumsum(found[first::2])
    return found


def polygons(outline: Any) -> list[list[float]]:
    """Return one polygon or several as a list of polygons.

    Raises:
        ValueError: if a polygon has fewer than three corners, an odd number of coordinates or a non-finite one, or the
            total edge length exceeds `MAX_EDGES`.
    """
    if not isinstance(outline, Sequence) or isinstance(outline, str | bytes):
        raise ValueError(f"segmentation must be polygons or run lengths, got {type(outline).__name__}")
    several, length = [], 0.0
    for polygon in [outline] if isinstance(outline[0], numbers.Real) else outline:
        try:
            corners = np.asarray(polygon, np.float64).ravel()
        except (TypeError, ValueError):
            raise ValueError("a polygon must contain only numbers") from None
        if len(corners) < 6 or len(corners) % 2:
            raise ValueError(f"a polygon must have x and y of at least 3 corners, got {len(corners)} numbers")
        if not np.isfinite(corners).all():
            raise ValueError("a polygon has a coordinate that is not finite")
        with np.errstate(over="ignore"):
            edges = np.diff(corners.reshape(-1, 2), axis=0, append=corners[None, :2])
            length += float(np.abs(edges).max(axis=1).sum())
        several.append(corners.tolist())
    if length > MAX_EDGES:
        raise ValueError(f"the edges of the polygons are {length:.3g} pixels long, the limit is {MAX_EDGES:,}")
    return several


def text(counts: str | bytes) -> str:
    """Return compressed counts as str; some tools store them as bytes."""
    return counts if isinstance(counts, str) else counts.decode("ascii")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (h, w) bool as run lengths."""
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": text(packed["counts"])}


def decode(outlines: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """Decode the run lengths of n objects of an image to (n, h, w) bool.

    Raises:
        ValueError: if one belongs to an image of another size.
    """
    masks = np.zeros((len(outlines), height, width), bool)
    for mask, outline in zip(masks, outlines, strict=True):
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"segmentation has size {list(outline['size'])}, but its image has {[height, width]}")
        mask[:] = coco_mask.decode({"size": [height, width], "counts": outline["counts"]})
    return masks
