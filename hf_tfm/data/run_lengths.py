"""Outlines of objects as COCO's compressed run lengths: ``{"size": [height, width], "counts": text}``.

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
MAX_SIDE = 1_000_000  # pixels that an annotation may state as the height or width of an image
# Pixels along all edges of an outline. Points are laid on every edge, 80 bytes a pixel, before they are cut off at the
# image; outlines of COCO have up to 7,000.
MAX_EDGES = 1_000_000
ARROW_TYPE = pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})


def run_lengths(outline: Any, height: int, width: int) -> dict[str, Any] | None:
    """An outline in any of COCO's forms -> run lengths; None where there is no outline.

    Args:
        outline: polygons [[x, y, x, y, ...], ...], one polygon, or a dict of ``size`` and ``counts``, numbers or text.
            What lies outside the image is cut off.
        height, width: of the image, in pixels.

    Raises:
        ValueError: it has another form, or is of an image of another size.
    """
    if outline is None or (isinstance(outline, str | Sequence) and not len(outline)):
        return None
    if isinstance(outline, Mapping):
        return {"size": [height, width], "counts": packed_counts(outline, height, width)}
    packed = coco_mask.merge(coco_mask.frPyObjects(polygons(outline), height, width))
    return {"size": [height, width], "counts": text(packed["counts"])}


def packed_counts(outline: Mapping[str, Any], height: int, width: int) -> str:
    """The compressed counts of run lengths.

    Raises:
        ValueError: a field is missing or malformed, or they are of an image of another size.
    """
    size, counts = outline.get("size"), outline.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"segmentation has size {size}, its image {[height, width]}")
    if isinstance(counts, str | bytes):
        check_counts(unpacked(counts), height, width)
        return text(counts)
    if not isinstance(counts, Sequence) or not all(type(count) is int for count in counts):
        raise ValueError(f"segmentation must have counts, integers or text, got {type(counts).__name__}")
    check_counts(counts, height, width)
    return text(coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)["counts"])


def check_counts(counts: Sequence[int] | np.ndarray, height: int, width: int) -> None:
    """Refuse runs that are negative, or do not make up an image.

    Raises:
        ValueError: they do not.
    """
    if len(counts) and min(counts) < 0:
        raise ValueError(f"segmentation has a run of {min(counts)} pixels")
    if (total := sum(map(int, counts))) != height * width:
        raise ValueError(f"segmentation counts {total} pixels, its image has {height * width}")


def unpacked(counts: str | bytes) -> np.ndarray:
    """Compressed counts as numbers, int64: of five bits a letter, and from the fourth on less the last but one.

    Raises:
        ValueError: it is other text.
    """
    data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    letters = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not letters.size or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("segmentation has counts that are no compressed run lengths")
    ends = np.flatnonzero(letters & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 7:  # of 32 bits
        raise ValueError("segmentation has counts that are no compressed run lengths")
    places = np.arange(letters.size) - np.repeat(starts, sizes)
    found = np.add.reduceat((letters & 31) << (5 * places), starts)
    found -= np.where(letters[ends] & 16 > 0, 1 << (5 * sizes), 0)  # of the last letter, a bit is the sign
    for first in (1, 2):  # the first three are not relative, so that 3, 5, ... add up from 1, and 4, 6, ... from 2
        found[first::2] = np.cumsum(found[first::2])
    return found


def polygons(outline: Any) -> list[list[float]]:
    """One polygon or several as a list of several.

    Raises:
        ValueError: one has fewer than three corners, or a coordinate without its other or that is no finite number, or
            their edges are longer than `MAX_EDGES` together.
    """
    if not isinstance(outline, Sequence) or isinstance(outline, str | bytes):
        raise ValueError(f"segmentation must be polygons or run lengths, got {type(outline).__name__}")
    several, length = [], 0.0
    for polygon in [outline] if isinstance(outline[0], numbers.Real) else outline:
        try:
            corners = np.asarray(polygon, np.float64).ravel()
        except (TypeError, ValueError):
            raise ValueError("a polygon must hold numbers alone") from None
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
    """Compressed counts as text; some tools keep them as bytes."""
    return counts if isinstance(counts, str) else counts.decode("ascii")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """(h, w) bool -> run lengths."""
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": text(packed["counts"])}


def decode(outlines: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """Run lengths of n objects of an image -> (n, h, w) bool.

    Raises:
        ValueError: one is of an image of another size.
    """
    masks = np.zeros((len(outlines), height, width), bool)
    for mask, outline in zip(masks, outlines, strict=True):
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"segmentation has size {list(outline['size'])}, its image {[height, width]}")
        mask[:] = coco_mask.decode({"size": [height, width], "counts": outline["counts"]})
    return masks
