"""Built-in scenes for detection and segmentation: scikit-learn's digits placed randomly on textured backgrounds.

    seed -> digits of a split -> sizes, places, colours -> one or two textures behind them -> image, boxes, segments

Digits are things; the three textures are stuff. Training scenes and held-out scenes share no digit (see `digits`).
"""

from io import BytesIO
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from . import run_lengths
from .categories import Category
from .digits import digits

# Things are countable, stuff is not (Kirillov et al. 2019).
THINGS = [str(digit) for digit in range(10)]
STUFF = ["plain", "stripes", "noise"]
CATEGORIES = [Category(i, name, i < len(THINGS)) for i, name in enumerate(THINGS + STUFF)]
LARGEST_NUMBER = 6
SIDES = (0.2, 0.45)  # side of a digit, as a fraction of the scene
LEAST_GROUND = 0.1  # minimum area of the second texture, as a fraction of the scene; if smaller, it is not used
OVERLAP = 0.1  # maximum overlap of two digits' boxes, as a fraction of the smaller one
INK = 0.4  # minimum ink intensity for a pixel to belong to a digit
FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "objects": List(
            {
                "bbox": List(Value("float32"), length=4),
                "category": ClassLabel(names=THINGS),
                "area": Value("float32"),
                "iscrowd": Value("bool"),
                "segmentation": run_lengths.FEATURE,
            }
        ),
        "panoptic": Image(),
        "segments_info": List(
            {"id": Value("int64"), "category_id": Value("int64"), "area": Value("float32"), "iscrowd": Value("bool")}
        ),
    }
)


def digit_scenes(
    seed: int = 0, train: int = 2000, validation: int = 200, test: int = 400, size: int = 128
) -> DatasetDict:
    """Generate the scenes, several hundred per second; each depends only on (seed, split, number, size).

    Args:
        seed: 0 to 2^32 - 1; also determines which digit goes to which split.
        train, validation, test: number of scenes in each split.
        size: height and width in pixels.

    Returns:
        Splits "train", "validation" and "test" with the columns ``image`` (RGB, PNG), ``image_id``, ``width``,
        ``height``, ``objects`` (bbox, category, area, iscrowd, segmentation), ``panoptic`` (PNG of segment ids) and
        ``segments_info`` (id, category_id of `CATEGORIES`, area, iscrowd). Digits in front occlude those behind;
        boxes, outlines and areas cover the visible part only.

    Raises:
        ValueError: if a size or the seed is out of range.
    """
    splits = {"train": train, "validation": validation, "test": test}
    for name, value, least in (*((name, count, 0) for name, count in splits.items()), ("size", size, 32)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    sources = digits(seed, size=8)  # raises if the seed is out of range
    found = DatasetDict()
    for number, (name, count) in enumerate(splits.items()):
        source = sources[name]
        greys = np.stack([np.array(image.convert("L")) for image in source["image"]])
        labels = np.array(source["label"])
        # NumPy guarantees a stable stream across versions for this legacy generator, but not for default_rng.
        rows = [scene(np.random.RandomState([seed, number, i]), greys, labels, size, i) for i in range(count)]
        found[name] = Dataset.from_dict({key: [row[key] for row in rows] for key in FEATURES}, features=FEATURES)
    return found


def scene(random: np.random.RandomState, greys: np.ndarray, labels: np.ndarray, size: int, image_id: int) -> dict:
    """Generate one row.

    Args:
        greys: (K, 8, 8) uint8 digits to choose from.
        labels: (K,) their classes.
    """
    pixels, ground = paint_ground(random, size)
    front = np.zeros((size, size), np.uint8)  # 0 is background, k the k-th digit
    shown: list[int] = []
    for top, left, side in layout(random, size, random.randint(1, LARGEST_NUMBER + 1)):
        chosen = random.randint(len(greys))
        digit = PILImage.fromarray(greys[chosen]).resize((side, side), PILImage.Resampling.BICUBIC)
        ink = np.asarray(digit, np.float32) / 255
        shown.append(int(labels[chosen]))
        window = np.s_[top : top + side, left : left + side]
        colour = random.randint(140, 256, 3)
        pixels[window] += ink[..., None] * (colour - pixels[window])
        front[window][ink > INK] = len(shown)
    objects, kinds = [], []
    segments = np.zeros((size, size), np.uint32)
    masks = [(front == k + 1, label) for k, label in enumerate(shown)]
    masks += [((front == 0) & (ground == k), len(THINGS) + k) for k in range(len(STUFF))]
    for mask, category in masks:
        if not mask.any():
            continue
        # Consecutive ids would give colours that cannot be told apart by eye.
        name = (len(kinds) + 1) * 2_654_435 % 2**24
        segments[mask] = name
        area = float(mask.sum())
        kinds.append({"id": name, "category_id": category, "area": area, "iscrowd": False})
        if category < len(THINGS):
            objects.append(
                {
                    "bbox": box(mask),
                    "category": category,
                    "area": area,
                    "iscrowd": False,
                    "segmentation": run_lengths.encode(mask),
                }
            )
    colours = segments.astype("<u4").view(np.uint8).reshape(size, size, 4)[..., :3]
    return {
        "image": png(np.rint(pixels)),
        "image_id": image_id,
        "width": size,
        "height": size,
        "objects": objects,
        "panoptic": png(colours),
        "segments_info": kinds,
    }


def layout(random: np.random.RandomState, size: int, count: int) -> list[tuple[int, int, int]]:
    """Return top, left and side of up to ``count`` squares with little overlap; those that do not fit are skipped."""
    found: list[tuple[int, int, int]] = []
    for _ in range(count):
        side = int(random.uniform(*SIDES) * size)
        for top, left in random.randint(0, size - side + 1, (20, 2)).tolist():
            if all(shared((top, left, side), other) <= OVERLAP * min(side, other[2]) ** 2 for other in found):
                found.append((top, left, side))
                break
    return found


def shared(first: tuple[int, int, int], second: tuple[int, int, int]) -> int:
    """Return the number of pixels shared by two squares."""
    sides = [min(a + first[2], b + second[2]) - max(a, b) for a, b in zip(first[:2], second[:2], strict=True)]
    return max(sides[0], 0) * max(sides[1], 0)


def paint_ground(random: np.random.RandomState, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint a dark background with one texture, or with two separated by a straight line.

    Returns:
        pixels: (size, size, 3) float32 in [0, 255]; kinds: (size, size) uint8, index into `STUFF`.
    """
    x = (np.arange(size, dtype=np.float32) / size - 0.5)[None]  # 0 is the centre, ±0.5 the edges
    first, second = random.permutation(len(STUFF))[:2].tolist()
    angle, distance = random.uniform(0, 2 * np.pi), random.uniform(-0.5, 0.3)
    behind = np.cos(angle) * x + np.sin(angle) * x.T < distance
    if behind.mean() < LEAST_GROUND:
        behind[:] = False
    pixels = np.where(behind[..., None], texture(random, STUFF[second], x), texture(random, STUFF[first], x))
    return pixels.clip(0, 255), np.where(behind, np.uint8(second), np.uint8(first))


def texture(random: np.random.RandomState, kind: str, x: np.ndarray) -> np.ndarray:
    """Return one of the textures `STUFF` in a dark colour; ``x`` (1, size) holds the column (and row) coordinates."""
    colour, contrast = random.uniform(20, 90, 3), random.uniform(15, 30)
    if kind == "stripes":
        direction, waves = random.uniform(0, np.pi), 2 * np.pi / random.uniform(0.05, 0.12)
        pattern = np.sign(np.sin(waves * np.cos(direction) * x + waves * np.sin(direction) * x.T))
    elif kind == "noise":
        pattern = random.uniform(-1, 1, (x.size, x.size))
    else:
        pattern = np.zeros((x.size, x.size))
    return colour.astype(np.float32) + np.float32(contrast) * pattern[..., None].astype(np.float32)


def box(mask: np.ndarray) -> list[float]:
    """Return x, y, width and height of the True region."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return [float(v) for v in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]


def png(pixels: np.ndarray) -> dict[str, Any]:
    """Encode (h, w, 3) values of 0 to 255 as a PNG image."""
    file = BytesIO()
    PILImage.fromarray(pixels.astype(np.uint8)).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}
