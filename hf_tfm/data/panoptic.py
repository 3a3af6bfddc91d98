"""Panoptic segmentation from any data set: every pixel belongs to a segment, and every segment to a category.

    image, panoptic, segments_info + categories by COCO's ids -> `panoptic_rows` -> (h, w) segment ids

A panoptic map is a PNG whose colours encode segment ids, id = R + 256 G + 65536 B; 0 is void (Kirillov et al. 2019,
arXiv:1801.00868, and COCO's format).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Image, Value
from huggingface_hub import hf_hub_download

from .arrow_lists import FlatList, nest, whole
from .categories import Category
from .coco import LARGEST_SEGMENT
from .detection import SEGMENTS, assemble, picture_rows
from .embedded import DIGIT_SCENES, EMBEDDED
from .fields import Entry, load_json, shown, twice
from .images import decode, is_encoded, with_paths_in

log = logging.getLogger(__name__)

PANOPTIC = "panoptic"
CATEGORIES_FILE = "panoptic_categories.json"


def read_categories(entries: Any, source: str) -> list[Category]:
    """Parse the categories of a JSON file, sorted by id.

    Args:
        entries: list of {id, name, isthing}.
        source: name of the file in error messages.

    Raises:
        ValueError: if a field is missing or has the wrong type, or two categories share an id or a name.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{source} must hold a list of categories with id, name and isthing, got {shown(entries)}")
    found = Entry({"categories": entries}, source, "the file").entries("categories", "category")
    categories = [Category(entry.integer("id"), entry.text("name"), entry.flag("isthing")) for entry in found]
    for key in ("id", "name"):
        if (again := twice([getattr(category, key) for category in categories])) is not None:
            raise ValueError(f"{source} has two categories with {key} {again}")
    return sorted(categories, key=lambda category: category.id)


def panoptic_categories(dataset: str, revision: str | None = None) -> list[Category]:
    """Load the categories of a data set's panoptic maps.

    Args:
        dataset: as for `load_splits`. Categories are read from COCO's annotations/panoptic_*.json, or from a file
            panoptic_categories.json next to the data: a list of {id, name, isthing}.
        revision: commit, tag or branch on the Hub.

    Raises:
        ValueError: if there is no such file.
    """
    if dataset in EMBEDDED:
        from . import digit_scenes

        if dataset in DIGIT_SCENES:
            return digit_scenes.CATEGORIES
        raise ValueError(f'dataset_name "{dataset}" has no panoptic maps')
    folder = Path(dataset)
    if files := sorted(folder.glob("annotations/panoptic_*.json")):
        found = [read_categories(listed(load_json(file)), str(file)) for file in files]
        for file, categories in zip(files, found, strict=True):
            if categories != found[0]:
                raise ValueError(f"{file} has different categories than {files[0]}")
        return found[0]
    file = folder / CATEGORIES_FILE
    if not file.is_file():
        if folder.exists() or "/" not in dataset:
            raise ValueError(f"{file} is missing: a list of id, name and isthing of each panoptic category")
        try:
            file = Path(hf_hub_download(dataset, CATEGORIES_FILE, repo_type="dataset", revision=revision))
        except OSError as error:
            raise ValueError(f'dataset_name "{dataset}" has no {CATEGORIES_FILE}: {error}') from error
    return read_categories(load_json(file), str(file))


def listed(content: Any) -> Any:
    """Return the categories in the content of a COCO file; None if it has none."""
    return content.get("categories") if isinstance(content, dict) else None


def panoptic_rows(
    rows: datasets.Dataset,
    categories: Sequence[Category],
    image_column: str | None = None,
    panoptic_column: str = PANOPTIC,
    segments_column: str = SEGMENTS,
    roots: Sequence[str] | None = None,
    told: set[str] | None = None,
) -> datasets.Dataset:
    """Return rows with ``panoptic`` and ``segments_info``; images without a map are dropped and counted in the log.

    Args:
        rows: a `datasets` split; the ``category_id`` of segments refers to the ids of ``categories``.
        categories: see `panoptic_categories`; their order becomes 0..N-1.
        roots: see `image_rows`.
        told: if given, the rows are a part of a split: they need no map, and those without one are logged only if this
            set is empty, which then is not.

    Raises:
        ValueError: if there are no rows or the rows are a stream, a column or field is missing, a category is unknown,
            or a segment id is out of range or repeated within an image.
    """
    for name, argument in ((panoptic_column, "panoptic_column"), (segments_column, "segments_column")):
        if name not in rows.features:
            raise ValueError(
                f'{argument} "{name}" is not a column of the data set; it has {", ".join(rows.column_names)}'
            )
    kind = rows.features[panoptic_column]
    if not (isinstance(kind, Image) or is_encoded(kind)):
        raise ValueError(f'panoptic_column "{panoptic_column}" must hold images, got {kind}')
    pictures, ids, sizes = picture_rows(rows, image_column, roots)
    maps = rows.select_columns([panoptic_column]).rename_columns(
        {panoptic_column: PANOPTIC} if panoptic_column != PANOPTIC else {}
    )
    maps = maps.cast_column(PANOPTIC, Image(decode=False))
    if roots is not None:
        maps = with_paths_in(maps, PANOPTIC, roots, f'panoptic_column "{panoptic_column}"')
    found = FlatList.of(rows, segments_column)
    segment_ids = found.numbers(found.find(("id",)), -1.0).astype(np.int64)
    check_segment_ids(segment_ids, ids[found.rows()], segments_column)
    values = {c.id: place for place, c in enumerate(categories)}
    stored = found.numbers(found.find(("category_id", "category")), -1.0).astype(np.int64)
    if unknown := sorted(set(np.unique(stored).tolist()) - values.keys()):
        raise ValueError(f"category_id {unknown[0]} in {segments_column} is not one of the {len(values)} categories")
    fields = {
        "id": pa.array(segment_ids),
        "category": pa.array([values[value] for value in stored.tolist()], pa.int64()),
        "area": pa.array(found.numbers("area", 0.0), pa.float32()),
        "iscrowd": pa.array(found.numbers("iscrowd", 0.0) > 0),
    }
    kinds = {
        "id": Value("int64"),
        "category": ClassLabel(names=[c.name for c in categories]),
        "area": Value("float32"),
        "iscrowd": Value("bool"),
    }
    whole_rows = assemble([pictures, maps], ids, sizes, SEGMENTS, nest(fields, found.counts), kinds)
    there = np.flatnonzero((found.counts > 0) & whole(maps, PANOPTIC).is_valid().to_numpy(zero_copy_only=False))
    if not len(there) and told is None:
        raise ValueError(f"none of the {len(rows)} images has a panoptic map")
    if len(there) < len(rows) and not told:
        log.warning("%d of %d images have no panoptic map and are left out", len(rows) - len(there), len(rows))
        if told is not None:
            told.add("no map")
    return whole_rows.select(there)


def check_segment_ids(segment_ids: np.ndarray, image_ids: np.ndarray, column: str) -> None:
    """Raise if a segment id cannot be encoded as a colour, or occurs twice in an image.

    Args:
        segment_ids, image_ids: (M,) of each segment.

    Raises:
        ValueError: if so; the message names the image and the id.
    """
    if (odd := (segment_ids < 1) | (segment_ids > LARGEST_SEGMENT)).any():
        k = int(odd.argmax())
        raise ValueError(
            f"id in {column} must be in [1, {LARGEST_SEGMENT}], got {segment_ids[k]} in image {image_ids[k]}"
        )
    pairs, counts = np.unique(np.stack([image_ids, segment_ids], axis=1), axis=0, return_counts=True)
    if (counts > 1).any():
        image, segment = pairs[counts.argmax()]
        raise ValueError(f"{column} has two segments with id {segment} in image {image}")


def decode_segments(value: Any) -> np.ndarray:
    """Decode a panoptic PNG to segment ids, int32 (h, w).

    Raises:
        BadImage: if it cannot be read.
    """
    colours = decode(value).permute(1, 2, 0).numpy()
    numbers = np.zeros((*colours.shape[:2], 4), np.uint8)
    numbers[..., :3] = colours
    return numbers.view("<i4")[..., 0]  # red is the lowest byte
