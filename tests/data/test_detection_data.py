"""Objects from every source have the same form; categories are matched by name."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from annotated_images import NAMES, OBJECTS, SIZES, expected, jpeg, segment_map
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Sequence, Value
from PIL import Image as PILImage

from hf_tfm.data import run_lengths
from hf_tfm.data.box_checks import BoxFormat
from hf_tfm.data.detection import category_ids, class_names, fingerprint, scene_rows
from hf_tfm.data.images import BadImage
from hf_tfm.data.scenes import read_scene, require_scenes
from hf_tfm.data.source import load_splits

SHARED = Path(__file__).parents[3] / "shared" / "data"
BOX = List(Value("float32"), length=4)


def columns(index, category="category", label=lambda c: c, extra=True):
    """The objects of an image as in Hub data sets."""
    rows = []
    for x, y, w, h, c, area, crowd in OBJECTS[index]:
        row = {"bbox": [x, y, w, h], category: label(c)}
        rows.append(row | {"area": area, "iscrowd": crowd} if extra else row)
    return rows


def hub(category_feature=None, category="category", label=lambda c: c, extra=True, lists=False, **others):
    """A data set in memory; ``lists`` stores objects as a struct of lists."""
    fields = {"bbox": BOX, category: category_feature or ClassLabel(names=NAMES)}
    fields |= {"area": Value("float32"), "iscrowd": Value("bool")} if extra else {}
    objects = [columns(i, category, label, extra) for i in range(3)]
    if lists:
        objects = [{name: [row[name] for row in rows] for name in fields} for rows in objects]
        kind = Sequence(fields)
    else:
        kind = List(fields)
    features = Features({"image": Image(), "objects": kind} | {k: Value("int64") for k in others})
    files = [{"bytes": jpeg(i), "path": None} for i in range(3)]
    return Dataset.from_dict({"image": files, "objects": objects, **others}, features=features)


def objects_of(rows):
    return [row["objects"] for row in rows]


# --- a common form


@pytest.mark.parametrize("lists", [False, True], ids=["structs", "lists"])
def test_structs_of_lists_and_lists_of_structs_are_equal(lists):
    rows, report = scene_rows(hub(lists=lists))
    assert objects_of(rows) == [expected(i) for i in range(3)]
    assert class_names(rows) == NAMES
    assert [(row["height"], row["width"]) for row in rows] == SIZES  # read from the image headers
    assert rows["image_id"][:] == [0, 1, 2]
    assert rows[2]["image"]["bytes"] == jpeg(2)
    assert (report.images, report.boxes, report.kept) == (3, 3, 3)


def test_only_boxes_and_categories_are_required():
    rows, _ = scene_rows(hub(extra=False))
    assert [o["area"] for o in rows[0]["objects"]] == [200.0, 375.0]  # area of the box
    assert not any(o["iscrowd"] for o in rows[0]["objects"])


@pytest.mark.parametrize(
    ("feature", "field", "label", "names"),
    [
        (Value("int64"), "categories", lambda c: [3, 18, 90][c], ["3", "18", "90"]),
        (Value("string"), "label", lambda c: NAMES[c], NAMES),
        (Value("int32"), "category_id", lambda c: [90, 3, 18][c], ["3", "18", "90"]),
    ],
)
def test_categories_of_every_kind_are_numbered_from_0(feature, field, label, names):
    rows, _ = scene_rows(hub(feature, field, label))
    assert class_names(rows) == names
    found = [[names[o["category"]] for o in row["objects"]] for row in rows]
    assert found == [[str(label(o[4])) for o in objects] for objects in OBJECTS]


def test_id_and_size_columns_are_used():
    sizes = {"height": [40, 48, 50], "width": [60, 32, 50]}
    rows, _ = scene_rows(hub(image_id=[9, 25, 7], **sizes))
    assert rows["image_id"][:] == [9, 25, 7]
    assert [(row["height"], row["width"]) for row in rows] == SIZES
    assert scene_rows(hub(image_id=[9, 9, 7]))[0]["image_id"][:] == [0, 1, 2]  # not distinct


def test_selected_and_reordered_rows_stay_consistent():
    rows, _ = scene_rows(hub(image_id=[9, 25, 7]).select([2, 0]))
    assert objects_of(rows) == [expected(2), expected(0)]
    assert rows["image_id"][:] == [7, 9] and rows[0]["image"]["bytes"] == jpeg(2)


def test_imagefolder_with_metadata(tmp_path):
    lines = []
    for i in range(3):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{i}.jpg").write_bytes(jpeg(i))
        found = columns(i, extra=False)
        objects = {"bbox": [o["bbox"] for o in found], "categories": [o["category"] for o in found]}
        lines.append(json.dumps({"file_name": f"{i}.jpg", "objects": objects}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    rows, _ = scene_rows(load_splits(str(tmp_path))["train"])
    assert [[o["bbox"] for o in row["objects"]] for row in rows] == [
        [o["bbox"] for o in expected(i)] for i in range(3)
    ]
    assert class_names(rows) == ["0", "1", "2"]


# --- checks


def broken():
    rows = hub(Value("int64"), "category", lambda c: c if c else -1)
    boxes = rows["objects"][:]
    boxes[0][0]["bbox"] = [50, 6, 20, 10]  # extends beyond an image of width 60
    boxes[0][1]["bbox"] = [30, 20, 0, 15]
    return Dataset.from_dict({"image": rows["image"][:], "objects": boxes}, features=rows.features)


def test_invalid_boxes_and_missing_categories_are_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        rows, report = scene_rows(broken())
    assert [[o["bbox"] for o in row["objects"]] for row in rows] == [[[50, 6, 10, 10]], [], []]
    assert (report.boxes, report.kept) == (3, 1)
    assert caplog.messages == list(report.lines())
    assert "1 of 3 boxes clipped: reach out of the image (first in image 0)" in caplog.messages
    assert "1 of 3 boxes left out: without a category (first in image 2)" in caplog.messages
    caplog.clear()
    assert scene_rows(broken(), strict=False)[1] == report and not caplog.messages


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data")
@pytest.mark.parametrize("name", ["bccd", "coco128"])
@pytest.mark.parametrize("corners", ["xyxy", "cxcywh"])
def test_real_boxes_in_another_format_are_refused_with_a_suggestion(name, corners):
    source = load_splits(str(SHARED / name))["train"].select_columns(
        ["image", "image_id", "width", "height", "objects"]
    )
    right, report = scene_rows(source)
    assert not list(report.lines())

    def change(row):
        for o in row["objects"]:
            x, y, w, h = o["bbox"]
            o["bbox"] = [x, y, x + w, y + h] if corners == "xyxy" else [x + w / 2, y + h / 2, w, h]
        return row

    features = source.features
    changed = source.select_columns(["objects", "width", "height"]).map(change)
    wrong = Dataset.from_dict(
        {"image": [b""] * len(source), **{k: changed[k][:] for k in ("width", "height", "objects")}},
        features=Features({"image": Value("binary"), **{k: features[k] for k in ("width", "height", "objects")}}),
    )
    with pytest.raises(ValueError, match=f'give box_format="{corners}" and relative_boxes=False'):
        scene_rows(wrong)
    found = scene_rows(wrong, box_format=BoxFormat(corners))[0]
    pairs = zip(objects_of(right), objects_of(found), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose([o["bbox"] for o in a], [o["bbox"] for o in b], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.to_iterable_dataset(), "are a stream"),
        (lambda d: d.select([]), "the data set has no rows"),
        (lambda d: d.rename_column("objects", "things").add_column("n", [1, 2, 3]), None),
        (lambda d: d.remove_columns("objects"), "objects_column must name a column, .* the data set has image"),
    ],
)
def test_invalid_rows(change, message):
    if message is None:  # the column with boxes is found under any name
        assert objects_of(scene_rows(change(hub()))[0]) == [expected(i) for i in range(3)]
        return
    with pytest.raises(ValueError, match=message):
        scene_rows(change(hub()))


def test_invalid_fields():
    with pytest.raises(ValueError, match='objects_column "annotations" is not a column of the data set; it has image'):
        scene_rows(hub(), objects_column="annotations")
    with pytest.raises(ValueError, match='objects_column "image" must hold lists of objects'):
        scene_rows(hub(), objects_column="image")
    with pytest.raises(ValueError, match=r"must have a field category or .*; it has bbox, kind, area, iscrowd"):
        scene_rows(hub(category="kind"))
    with pytest.raises(ValueError, match="must hold integers or strings as category, got double"):
        scene_rows(hub(Value("float64"), "category", float))
    three = Dataset.from_dict({"image": [jpeg(0)], "objects": [[{"bbox": [1.0, 2.0, 3.0], "category": 0}]]})
    with pytest.raises(ValueError, match="must hold four numbers as bbox, got 3 in row 0"):
        scene_rows(three)
    uneven = Dataset.from_dict({"image": [jpeg(0)], "objects": [{"bbox": [[1.0, 2, 3, 4]], "category": [0, 1]}]})
    with pytest.raises(
        ValueError, match='"objects" must have equal numbers of bbox and category in each row, got 1 and 2'
    ):
        scene_rows(uneven)
    from_1 = hub(Value("int64"), label=lambda c: c + 1)  # but the file names three classes from 0
    named = Dataset(from_1.data, info=DatasetInfo(features=hub().features))
    with pytest.raises(ValueError, match='column "objects" has category 3, but there are names for only 3'):
        scene_rows(named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.update(iscrowd=True), r"3 boxes in 3 images; 3 are crowds \(iscrowd\)"),
        (lambda o: o.update(bbox=[float("nan")] * 4), "3 boxes in 3 images; 3 of 3 boxes left out: not finite"),
        (lambda o: o.update(bbox=[1e4, 1e4, 5, 5]), "3 of 3 boxes left out: outside the image"),
        (lambda o: o.update(bbox=[5, 5, -3, 4]), "3 of 3 boxes left out: width or height not above 0"),
        (None, "0 boxes in 3 images; check that image_id of the annotations matches id of the images"),
    ],
)
def test_data_without_usable_objects_is_refused_with_counts(change, message):
    rows = hub()
    objects = rows["objects"][:]
    for found in objects:
        for one in found:
            if change is not None:
                change(one)
    objects = [[] for _ in objects] if change is None else objects
    rows = Dataset.from_dict({"image": rows["image"][:], "objects": objects}, features=rows.features)
    with pytest.raises(ValueError, match=f"there is no object to detect: .*{message}"):
        scene_rows(rows)
    assert scene_rows(rows, strict=False)[1].boxes == sum(map(len, objects))  # the doctor reports more


def test_splits_are_checked_before_a_run():
    rows, _ = scene_rows(hub())
    require_scenes({"train": rows, "validation": rows.select([2])}, 0)
    with pytest.raises(ValueError, match="no object to detect in validation: its 1 images have 0 objects, 0 of them"):
        require_scenes({"train": rows, "validation": rows.select([1])}, 0)
    broken_rows = Dataset.from_dict({"image": [b"no image"] * 3, "objects": hub()["objects"][:]})
    rows = scene_rows(broken_rows.cast(hub().features))[0]
    with pytest.raises(
        ValueError, match=r"no image of test can be read: the first 2 of 3 were tried \(max_bad_images"
    ):
        require_scenes({"test": rows}, 1)


def test_map_with_missing_segments_is_unreadable():
    ids, segments = segment_map(0)
    grey = np.repeat(ids.astype(np.uint8)[:, :, None], 3, axis=2)
    file = io.BytesIO()
    PILImage.fromarray(grey).save(file, "PNG")
    known = [{"id": s["id"], "category": 0, "area": 1.0, "iscrowd": False} for s in segments]
    row = {"image": jpeg(0), "height": 40, "width": 60, "panoptic": file.getvalue(), "segments_info": known}
    with pytest.raises(BadImage, match="none of its 3 segments is in its panoptic map"):
        read_scene(row)


# --- by name


def test_another_data_set_is_matched_by_name():
    rows, _ = scene_rows(hub())
    assert category_ids(rows, ["zebra", "apple", "cat", "dog"]) == [1, 3, 0]
    with pytest.raises(ValueError, match=r'1 of 3 categories are not .* the first is "dog"; it has zebra, apple'):
        category_ids(rows, ["zebra", "apple"])


def test_fingerprint_depends_on_the_content():
    rows, _ = scene_rows(hub())
    others = [scene_rows(hub(extra=False))[0], rows.select([0, 1]), scene_rows(hub(label=lambda c: 2 - c))[0]]
    again = scene_rows(hub(lists=True))[0]
    assert fingerprint(rows) == fingerprint(again)
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 4


# --- outlines


def test_outline_formats_give_the_same_mask():
    mask = np.zeros((20, 30), bool)
    mask[4:10, 6:17] = True
    packed = run_lengths.encode(mask)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int), [0]])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    corners = [6, 4, 17, 4, 17, 10, 6, 10]
    for outline in (packed, {**packed, "counts": packed["counts"].encode()}, {"size": [20, 30], "counts": counts}):
        assert run_lengths.run_lengths(outline, 20, 30) == packed
    for outline in ([corners], corners, [corners, [8, 5, 10, 5, 10, 7]]):
        found = run_lengths.decode([run_lengths.run_lengths(outline, 20, 30)], 20, 30)
        np.testing.assert_array_equal(found[0], mask)
    assert run_lengths.run_lengths([], 20, 30) is None and run_lengths.run_lengths(None, 20, 30) is None
    assert run_lengths.decode([], 20, 30).shape == (0, 20, 30)


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ([[0, 0, 1e7, 0, 5, 5]], "edges of the polygons are 2e.07 pixels long, the limit is 1,000,000"),
        ([[1, 2, 3, 4]], "x and y of at least 3 corners, got 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "got 7 numbers"),
        ({"size": [30, 20], "counts": [600]}, r"has size \[30, 20\], but its image has \[20, 30\]"),
        ({"size": [20, 30], "counts": [599]}, "counts 599 pixels, but its image has 600"),
    ],
)
def test_invalid_outlines(outline, message):
    with pytest.raises(ValueError, match=message):
        run_lengths.run_lengths(outline, 20, 30)


def test_masks_are_loaded_on_request():
    polygon = [[4.0, 6.0, 24.0, 6.0, 24.0, 16.0, 4.0, 16.0]]
    objects = [{"bbox": [4, 6, 20, 10], "category": "a", "segmentation": o} for o in (polygon, [])]
    source = Dataset.from_dict({"image": [jpeg(0)], "objects": [objects]})
    rows, report = scene_rows(source, masks=True)
    (found,) = rows[0]["objects"]
    assert run_lengths.decode([found["segmentation"]], *SIZES[0])[0, 6:16, 4:24].all()
    assert report.dropped["without an outline"].count == 1
    assert "segmentation" not in scene_rows(source)[0][0]["objects"][0]
    with pytest.raises(ValueError, match='masks need a field segmentation in column "objects"'):
        scene_rows(hub(), masks=True)


def test_unreadable_image_has_no_size():
    source = Dataset.from_dict({"image": [b"no image", jpeg(1)], "objects": [columns(0), columns(1)]})
    rows, _ = scene_rows(source)
    assert [(row["height"], row["width"]) for row in rows] == [(0, 0), SIZES[1]]
    assert [len(row["objects"]) for row in rows] == [2, 0]
