"""Shared helpers of the annotation tests: small images and their objects in a common form."""

import io
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(40, 60), (48, 32), (50, 50)]  # height, width
NAMES = ["apple", "dog", "zebra"]
# x, y, width, height, category, area, crowd
OBJECTS = [
    [(4, 6, 20, 10, 1, 150.0, False), (30, 20, 25, 15, 2, 300.0, True)],
    [],
    [(0, 0, 50, 50, 0, 2500.0, False)],
]


def jpeg(index: int, kind: str = "JPEG") -> bytes:
    """An encoded image of blurry blobs, of size SIZES[index]."""
    small = np.random.default_rng(index).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    height, width = SIZES[index]
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def expected(index: int, crowd: bool = True) -> list[dict[str, Any]]:
    """The objects of an image as in the rows; without iscrowd if the source has no such field."""
    return [
        {"bbox": [float(v) for v in (x, y, w, h)], "category": c, "area": area, "iscrowd": is_crowd and crowd}
        for x, y, w, h, c, area, is_crowd in OBJECTS[index]
    ]


def segment_map(index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segment ids (h, w), with all objects on a background of category 7, and the segments; 0 on the left edge."""
    ids = np.full(SIZES[index], 70_000 + index)
    segments = []
    for k, (x, y, w, h, category, _, is_crowd) in enumerate(OBJECTS[index]):
        ids[y : y + h, x : x + w] = 300 * (k + 1)
        segments.append({"id": 300 * (k + 1), "category_id": [1, 2, 4][category], "iscrowd": int(is_crowd)})
    segments.append({"id": 70_000 + index, "category_id": 7, "iscrowd": 0})
    ids[:, 0] = 0
    there = [segment | {"area": int((ids == segment["id"]).sum())} for segment in segments]
    return ids, [segment for segment in there if segment["area"]]


CATEGORIES = [
    {"id": 1, "name": "apple", "isthing": 1},
    {"id": 2, "name": "dog", "isthing": 1},
    {"id": 4, "name": "zebra", "isthing": 1},
    {"id": 7, "name": "grass", "isthing": 0},
]


def colours(ids: np.ndarray) -> bytes:
    """A panoptic PNG."""
    file = io.BytesIO()
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()
