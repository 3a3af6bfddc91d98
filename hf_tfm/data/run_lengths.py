"""Outlines of objects as COCO's compressed run lengths: ``{"size": [height, width], "counts": text}``.

polygons | counts as numbers | counts as text -> text of a few hundred bytes -> (n, h, w) bool
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import List, Value
from faster_coco_eval.core import mask as coco_mask

FEATURE = {"size": List(Value("int32"), length=2), "counts": Value("string")}
ARROW_TYPE = pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})


def run_lengths(outline: Any, height: int, width: int) -> dict[str, Any] | None:
    """An outline in any of COCO's forms -> run lengths; None where there is no outline.

    Args:
        outline: polygons [[x, y, x, y, ...], ...], one polygon, or a dict of ``size`` and ``counts``, numbers or text.
        height, width: of the image, in pixels.

    Raises:
        ValueError: it has another form, or is of an image of another size.
    """
    if outline is None or not len(outline):
        return None
    if isinstance(outline, Mapping):
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"segmentation has size {list(outline['size'])}, its image {[height, width]}")
        counts = outline["counts"]
        if isinstance(counts, str | bytes):
            return {"size": [height, width], "counts": text(counts)}
        if sum(counts) != height * width:
            raise ValueError(f"segmentation counts {sum(counts)} pixels, its image has {height * width}")
        packed = coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    else:
        packed = coco_mask.merge(coco_mask.frPyObjects(polygons(outline), height, width))
    return {"size": [height, width], "counts": text(packed["counts"])}


def polygons(outline: Sequence) -> list[list[float]]:
    """One polygon or several as a list of several.

    Raises:
        ValueError: one has fewer than three corners, or a coordinate without its other.
    """
    several = [outline] if np.isscalar(outline[0]) else outline
    several = [np.asarray(polygon, np.float64).ravel().tolist() for polygon in several]
    for polygon in several:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must have x and y of at least 3 corners, got {len(polygon)} numbers")
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
