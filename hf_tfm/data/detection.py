"""Objects in images from any data set in one common form, with categories matched by name.

    image, objects                  -> flat arrays -> `check_boxes`                  -> `scene_rows`
    image, panoptic, segments_info  -> flat arrays -> categories by COCO's ids       -> `panoptic_rows`

Rows have ``image`` (encoded, see `images`), ``image_id`` (int64), ``width`` and ``height`` (of the upright image), and

    objects        list of bbox [x, y, w, h] in pixels, category 0..N-1 (a ClassLabel), area, iscrowd and, if masks
                   are requested, segmentation (see `run_lengths`)
  or
    panoptic       PNG of segment ids, id = R + 256 G + 65536 B, and
    segments_info  list of id, category 0..N-1 (a ClassLabel), area, iscrowd
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, List, Value

from . import images
from .arrow_lists import FlatList, nest, subfields, whole
from .box_checks import BoxFormat, BoxReport, Problem, check_boxes
from .categories import BOX_FIELDS, CATEGORY_FIELDS, OBJECTS
from .image_sizes import image_sizes
from .images import IMAGE, image_rows, path_of_image
from .run_lengths import ARROW_TYPE, FEATURE, run_lengths

log = logging.getLogger(__name__)

SEGMENTS = "segments_info"
ENOUGH_BOXES = 100  # of a part of a split, to infer that all have another format than stated


def scene_rows(
    rows: datasets.Dataset,
    image_column: str | None = None,
    objects_column: str | None = None,
    masks: bool = False,
    box_format: BoxFormat | None = None,
    strict: bool = True,
    roots: Sequence[str] | None = None,
    told: set[str] | None = None,
) -> tuple[datasets.Dataset, BoxReport]:
    """Return rows with ``objects``: boxes validated and categories numbered; images are not decoded.

    Args:
        rows: a `datasets` split with a list of structs, or a struct of lists, per image. Categories are a ClassLabel,
            integers with or without gaps, or strings.
        image_column: see `image_rows`.
        objects_column: column of the objects; default: the only column with boxes.
        masks: also keep segmentation masks; objects without one are dropped.
        box_format: format of the boxes; default: x, y, width and height in pixels.
        strict: raise if boxes have another format, a category has no name or there is no object to find, and log which
            boxes were clipped or dropped. If False, these findings are only in the report.
        roots: see `image_rows`.
        told: if given, the rows are a part of a split: they need no object, a wrong format is only inferred from
            `ENOUGH_BOXES`, and each kind of problem is logged once, see `BoxReport.log`.

    Returns:
        The rows, and the report on the boxes.

    Raises:
        ValueError: if there are no rows or the rows are a stream, a column or field is missing or has the wrong type,
            or the boxes do not have the stated format.
    """
    pictures, ids, sizes = picture_rows(rows, image_column, roots)
    found = FlatList.of(rows, find_objects(rows.features, objects_column))
    place = found.rows()
    boxes = found.fours(found.find(BOX_FIELDS))
    xywh, good, report = check_boxes(boxes, sizes[place], ids[place], len(rows), box_format or BoxFormat())
    names, categories = number_categories(found)
    crowd = found.numbers("iscrowd", 0.0) > 0
    good = leave_out(report, "without a category", good, categories < 0, ids[place])
    outlines = None
    if masks:
        outlines, odd = outlines_of(found, sizes[place])
        if odd and strict:
            log.warning(
                'column "%s" has malformed outlines, whose objects are left out, first in %s', found.column, odd
            )
        good = leave_out(report, "without an outline", good, np.array([o is None for o in outlines], bool), ids[place])
    for problem in (*report.clipped.values(), *report.dropped.values()):
        problem.path = path_of_image(pictures[int((ids == problem.image_id).argmax())][IMAGE])
    if strict:
        if (categories >= len(names)).any():
            raise ValueError(
                f'column "{found.column}" has category {categories.max()}, but there are names for only {len(names)}'
            )
        if told is None or report.boxes >= ENOUGH_BOXES:
            report.require_format()
        report.log(told)
        if told is None:
            require_objects(report, good, crowd)
    area = found.numbers("area", np.nan)
    area = np.where(np.isfinite(area) & (area > 0), area, xywh[:, 2] * xywh[:, 3])
    fields = {
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(xywh[good].ravel(), pa.float32()), 4),
        "category": pa.array(categories[good]),
        "area": pa.array(area[good], pa.float32()),
        "iscrowd": pa.array(crowd[good]),
    }
    kinds = {
        "bbox": List(Value("float32"), length=4),
        "category": ClassLabel(names=names),
        "area": Value("float32"),
        "iscrowd": Value("bool"),
    }
    if outlines is not None:
        fields["segmentation"] = pa.array([outlines[i] for i in np.flatnonzero(good)], ARROW_TYPE)
        kinds["segmentation"] = FEATURE
    objects = nest(fields, np.bincount(place[good], minlength=len(rows)))
    return assemble([pictures], ids, sizes, OBJECTS, objects, kinds), report


def require_objects(report: BoxReport, good: np.ndarray, crowd: np.ndarray) -> None:
    """Raise if the rows contain no object to detect.

    Args:
        good, crowd: (M,) bool, which objects are kept and which are crowds.

    Raises:
        ValueError: if all objects are crowds or dropped, or there are none; the message counts them.
    """
    if (good & ~crowd).any():
        return
    told = [f"{report.boxes} boxes in {report.images} images", *report.lines()]
    if (good & crowd).any():
        told.append(f"{int((good & crowd).sum())} are crowds (iscrowd), which are neither trained on nor scored")
    if not report.boxes:
        told.append("check that image_id of the annotations matches id of the images")
    raise ValueError(f"there is no object to detect: {'; '.join(told)}")


def leave_out(report: BoxReport, name: str, good: np.ndarray, bad: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
    """Return which elements are good and not bad; record the dropped ones in the report."""
    out = good & bad
    if out.any():
        report.dropped[name] = Problem(int(out.sum()), int(image_ids[out.argmax()]))
    return good & ~bad


def picture_rows(
    rows: datasets.Dataset, image_column: str | None, roots: Sequence[str] | None = None
) -> tuple[datasets.Dataset, np.ndarray, np.ndarray]:
    """Return the images of rows, their ids (N,) and their sizes (N, 2), height and width in pixels, 0 if unreadable.

    Ids come from the column "image_id" if it holds distinct integers, otherwise they are the row numbers. Sizes come
    from the columns "height" and "width" if these are complete, otherwise from the image headers.

    Raises:
        ValueError: if the rows are a stream (see `scene_streams`), are empty or have no images.
    """
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError("the rows are a stream: its objects are read in pieces, see scene_streams")
    pictures = image_rows(rows, image_column, labelled=False, roots=roots)
    ids = integers(rows, "image_id")
    if ids is None or len(np.unique(ids)) < len(ids):
        ids = np.arange(len(rows))
    columns = [integers(rows, name) for name in ("height", "width")]
    if any(column is None or column.min() < 1 for column in columns):
        return pictures, ids, image_sizes(pictures)
    return pictures, ids, np.stack(columns, axis=1)


def integers(rows: datasets.Dataset, column: str) -> np.ndarray | None:
    """Return a column of integers without nulls as (N,) int64; None if there is no such column."""
    if column not in rows.column_names:
        return None
    values = whole(rows, column)
    return values.to_numpy().astype(np.int64) if pa.types.is_integer(values.type) and not values.null_count else None


def find_objects(features: Features, name: str | None) -> str:
    """Return the column called ``name``, or the only column with boxes if ``name`` is None.

    Raises:
        ValueError: if there is none, or several; the message lists the columns.
    """
    columns = ", ".join(features)
    if name is not None:
        if name not in features:
            raise ValueError(f'objects_column "{name}" is not a column of the data set; it has {columns}')
        if not subfields(features[name]):
            raise ValueError(f'objects_column "{name}" must hold lists of objects, got {features[name]}')
        return name
    # In a panoptic data set, segments_info has boxes as well.
    found = [c for c in features if c != SEGMENTS and set(BOX_FIELDS) & subfields(features[c]).keys()]
    if len(found) != 1:
        raise ValueError(
            f"objects_column must name a column, unless exactly one has boxes; the data set has {columns}"
        )
    return found[0]


def number_categories(found: FlatList) -> tuple[list[str], np.ndarray]:
    """Return the category names, and the index of each object's category, -1 if it has none.

    Names are those of the ClassLabel, or the sorted distinct values.

    Raises:
        ValueError: if categories are neither integers nor strings.
    """
    field = found.find(CATEGORY_FIELDS)
    values, kind = found.fields[field], found.kinds[field]
    if isinstance(kind, ClassLabel):
        return list(kind.names), pc.fill_null(values, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_integer(values.type):
        values = pc.if_else(pc.greater_equal(values, 0), values, pa.scalar(None, values.type))
    elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(f'column "{found.column}" must hold integers or strings as {field}, got {values.type}')
    there = sorted(value for value in pc.unique(values).to_pylist() if value is not None)
    indices = pc.index_in(values, pa.array(there, values.type))
    return [str(value) for value in there], pc.fill_null(indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def outlines_of(found: FlatList, sizes: np.ndarray) -> tuple[list[dict[str, Any] | None], str | None]:
    """Return the run lengths of every object, None if it has none; and a message about the first malformed outline.

    Raises:
        ValueError: if there is no segmentation field.
    """
    if "segmentation" not in found.fields:
        raise ValueError(
            f'masks need a field segmentation in column "{found.column}"; it has {", ".join(found.fields)}'
        )
    outlines: list[dict[str, Any] | None] = []
    odd = None
    for row, outline, size in zip(found.rows(), found.fields["segmentation"].to_pylist(), sizes.tolist(), strict=True):
        try:
            outlines.append(run_lengths(outline, *size) if min(size) else None)
        except ValueError as error:
            outlines.append(None)
            odd = odd or f"row {row}: {error}"
    return outlines, odd


def assemble(
    parts: list[datasets.Dataset],
    ids: np.ndarray,
    sizes: np.ndarray,
    column: str,
    elements: pa.ListArray,
    kinds: Mapping[str, Any],
) -> datasets.Dataset:
    """Concatenate the columns of ``parts``, which stay where they are stored, with new in-memory columns."""
    features = Features(
        {"image_id": Value("int64"), "width": Value("int32"), "height": Value("int32"), column: List(dict(kinds))}
    )
    table = pa.table(
        {
            "image_id": pa.array(ids, pa.int64()),
            "width": pa.array(sizes[:, 1], pa.int32()),
            "height": pa.array(sizes[:, 0], pa.int32()),
            column: elements,
        }
    )
    notes = datasets.Dataset(table.cast(features.arrow_schema), info=datasets.DatasetInfo(features=features))
    return datasets.concatenate_datasets([*parts, notes], axis=1)


def class_names(rows: datasets.Dataset) -> list[str]:
    """Return the category names of `scene_rows` or `panoptic_rows`, in the order of a model's ``id2label``."""
    return list(category_field(rows).names)


def category_field(rows: datasets.Dataset) -> ClassLabel:
    """Return the ClassLabel feature of the categories."""
    return subfields(rows.features[SEGMENTS if SEGMENTS in rows.features else OBJECTS])["category"]


def category_ids(rows: datasets.Dataset, names: Sequence[str]) -> list[int]:
    """Map each category of `scene_rows` or `panoptic_rows` to its index in ``names``, a model's classes.

    Args:
        names: `class_names` of the training data, or a model's ``id2label`` in order.

    Raises:
        ValueError: if a category is not among the names; the message lists the names.
    """
    numbers = {name: place for place, name in enumerate(names)}
    own = class_names(rows)
    if unknown := [name for name in own if name not in numbers]:
        raise ValueError(
            f"{len(unknown)} of {len(own)} categories are not classes of the model, the first is "
            f'"{unknown[0]}"; it has {", ".join(names)}'
        )
    return [numbers[name] for name in own]


def first_moved(names: Sequence[str], others: Sequence[str]) -> tuple[str, str] | None:
    """Return the first two names that appear in different order in two class lists; None if shared names agree."""
    shared = set(names) & set(others)
    pairs = zip(*([name for name in own if name in shared] for own in (names, others)), strict=False)
    return next(((ours, theirs) for ours, theirs in pairs if ours != theirs), None)


def check_order(rows: dict[str, datasets.Dataset], train_split: str) -> None:
    """Raise if a split numbers its categories in another order than the training split: one of the lists is wrong.

    Args:
        rows: {split name: rows}.

    Raises:
        ValueError: if so; the message names the split and the first such category.
    """
    ours = class_names(rows[train_split])
    for split, part in rows.items():
        if moved := first_moved(ours, class_names(part)):
            raise ValueError(
                f'categories are in another order in {split}: it has "{moved[1]}" where {train_split} has '
                f'"{moved[0]}", so the same id has different names; write the same list of categories, with the same '
                "ids, for every split"
            )


def fingerprint(rows: datasets.Dataset) -> str:
    """Return a hash of the number of rows, their objects or segments, and 1,000 images; see `images.fingerprint`."""
    digest = hashlib.sha256(images.fingerprint(rows.select_columns([IMAGE])).encode())
    found = FlatList.of(rows, SEGMENTS if SEGMENTS in rows.features else OBJECTS)
    digest.update(found.counts.tobytes())
    digest.update(repr(class_names(rows)).encode())
    for name in ("bbox", "id", "category", "area", "iscrowd"):
        if name in found.fields:
            values = found.fours(name) if name == "bbox" else found.numbers(name, 0.0)
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]
