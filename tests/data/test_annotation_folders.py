"""COCO, Roboflow and Pascal VOC folders are read as the same rows; errors name file and entry."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from annotated_images import CATEGORIES, NAMES, OBJECTS, SIZES, colours, expected, jpeg, segment_map

from hf_tfm.data import run_lengths
from hf_tfm.data.coco import split_names
from hf_tfm.data.detection import class_names, fingerprint, scene_rows
from hf_tfm.data.images import decode
from hf_tfm.data.panoptic import decode_segments, panoptic_categories, panoptic_rows
from hf_tfm.data.source import load_splits

IDS = [1, 2, 4]  # category ids, with a gap as in COCO
IMAGE_IDS = [139, 25, 7]


def images_of(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))


def instances(**change):
    """Content of an instances file."""
    images = [
        {"id": IMAGE_IDS[i], "file_name": f"{i}.jpg", "height": SIZES[i][0], "width": SIZES[i][1]} for i in range(3)
    ]
    annotations = [
        {
            "id": 10 * i + k,
            "image_id": IMAGE_IDS[i],
            "category_id": IDS[c],
            "bbox": [x, y, w, h],
            "area": area,
            "iscrowd": int(crowd),
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i in range(3)
        for k, (x, y, w, h, c, area, crowd) in enumerate(OBJECTS[i])
    ]
    content = {"images": images, "annotations": annotations[::-1], "categories": CATEGORIES[2::-1]}
    return copy.deepcopy(content | change)


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def coco(folder, image_folder="train2017", **change):
    images_of(folder / image_folder)
    write(folder / "annotations" / "instances_train2017.json", instances(**change))
    return folder


def roboflow(folder):
    for split in ("train", "valid"):
        images_of(folder / split)
        write(folder / split / "_annotations.coco.json", instances())
    return folder


def panoptic(folder, maps="annotations/panoptic_train2017", change=lambda content: content):
    """Panoptic files, added to the folder's other content; image 25 has no map."""
    images_of(folder / "train2017")
    (folder / maps).mkdir(parents=True)
    annotations = []
    for i in (0, 2):
        ids, segments = segment_map(i)
        (folder / maps / f"{i}.png").write_bytes(colours(ids))
        annotations.append({"image_id": IMAGE_IDS[i], "file_name": f"{i}.png", "segments_info": segments})
    content = {"images": instances()["images"], "annotations": annotations, "categories": CATEGORIES}
    write(folder / "annotations" / "panoptic_train2017.json", change(copy.deepcopy(content)))
    return folder


def xml(index, one="<name>", size=True, sides=("xmin", "ymin", "xmax", "ymax")):
    objects = ""
    for x, y, w, h, c, _, crowd in OBJECTS[index]:
        numbers = zip(sides, (x + 1, y + 1, x + w, y + h), strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in numbers)
        objects += f"<object>{one}{NAMES[c]}</name><difficult>{int(crowd)}</difficult><bndbox>{box}</bndbox></object>"
    height, width = SIZES[index] if size else (0, 0)
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def voc(folder, lists=True, **options):
    images_of(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for i in range(3):
        (folder / "Annotations" / f"{i}.xml").write_text(xml(i, **options))
    if lists:
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for split, names in (("train", "0\n1\n"), ("val", "2\n"), ("dog_train", "0 1\n1 -1\n")):
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return folder


# --- a common form


@pytest.mark.parametrize("image_folder", ["train2017", "images/train2017", "images", "."])
def test_coco(tmp_path, image_folder):
    splits = load_splits(str(coco(tmp_path, image_folder)))
    assert list(splits) == ["train"]
    rows, report = scene_rows(splits["train"], masks=True)
    assert class_names(rows) == NAMES
    assert rows["image_id"][:] == IMAGE_IDS
    for i, row in enumerate(rows):
        objects = sorted(row["objects"], key=lambda o: o["iscrowd"])
        masks = run_lengths.decode([o.pop("segmentation") for o in objects], *SIZES[i])
        assert objects == expected(i)
        for mask, (x, y, w, h, *_) in zip(masks, OBJECTS[i], strict=True):
            assert mask[y : y + h, x : x + w].all() and mask.sum() == w * h
        np.testing.assert_array_equal(decode(row["image"]), decode(jpeg(i)))
    assert report.kept == 3


def test_roboflow_splits_get_standard_names(tmp_path):
    splits = load_splits(str(roboflow(tmp_path)))
    assert sorted(splits) == ["train", "validation"]
    assert fingerprint(scene_rows(splits["train"])[0]) == fingerprint(scene_rows(splits["validation"])[0])
    assert split_names(["train2017", "val2017"]) == {"train2017": "train", "val2017": "validation"}
    assert split_names(["val2014", "val2017"]) == {"val2014": "val2014", "val2017": "val2017"}
    assert split_names(["valid", "test", "left"]) == {"valid": "validation", "test": "test", "left": "left"}


def test_voc(tmp_path):
    splits = load_splits(str(voc(tmp_path)))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "validation": 1}
    found = []
    for split in splits.values():
        rows, _ = scene_rows(split)
        assert class_names(rows) == NAMES
        for row in rows:
            found.append([{k: v for k, v in o.items() if k != "area"} for o in row["objects"]])
    assert found == [[{k: v for k, v in o.items() if k != "area"} for o in expected(i)] for i in range(3)]


def test_voc_without_lists_or_sizes(tmp_path):
    rows, _ = scene_rows(load_splits(str(voc(tmp_path, lists=False, size=False)))["train"])
    assert [(row["height"], row["width"]) for row in rows] == SIZES
    assert [len(row["objects"]) for row in rows] == [2, 0, 1]


def test_changed_file_is_read_again(tmp_path):
    folder = coco(tmp_path)
    before = load_splits(str(folder))["train"]
    assert before.cache_files[0]["filename"] == load_splits(str(folder))["train"].cache_files[0]["filename"]
    content = instances()
    content["annotations"][0]["bbox"] = [1, 1, 5, 5]
    file = folder / "annotations" / "instances_train2017.json"
    write(file, content)
    os.utime(file, ns=(1, 1))  # some file systems store whole seconds only
    assert [1, 1, 5, 5] in [o["bbox"] for row in load_splits(str(folder))["train"] for o in row["objects"]]
    other = voc(tmp_path / "voc")
    first = fingerprint(scene_rows(load_splits(str(other))["train"])[0])
    (other / "Annotations" / "0.xml").write_text(xml(2))
    assert fingerprint(scene_rows(load_splits(str(other))["train"])[0]) != first


# --- panoptic


@pytest.mark.parametrize("with_instances", [True, False])
@pytest.mark.parametrize("maps", ["annotations/panoptic_train2017", "panoptic_train2017"])
def test_panoptic(tmp_path, caplog, maps, with_instances):
    folder = panoptic(coco(tmp_path) if with_instances else tmp_path, maps)
    source = load_splits(str(folder))["train"]
    assert ("objects" in source.features) == with_instances
    categories = panoptic_categories(str(folder))
    assert [(c.id, c.name, c.isthing) for c in categories] == [
        (c["id"], c["name"], bool(c["isthing"])) for c in CATEGORIES
    ]
    rows = panoptic_rows(source, categories)
    assert "1 of 3 images have no panoptic map and are left out" in caplog.text
    assert class_names(rows) == [*NAMES, "grass"]
    assert rows["image_id"][:] == [139, 7]
    for row, i in zip(rows, (0, 2), strict=True):
        ids, segments = segment_map(i)
        np.testing.assert_array_equal(decode_segments(row["panoptic"]), ids)
        assert row["segments_info"] == [
            {
                "id": s["id"],
                "category": {1: 0, 2: 1, 4: 2, 7: 3}[s["category_id"]],
                "area": s["area"],
                "iscrowd": bool(s["iscrowd"]),
            }
            for s in segments
        ]


def test_panoptic_categories_file(tmp_path):
    write(tmp_path / "panoptic_categories.json", CATEGORIES[::-1])
    assert [c.name for c in panoptic_categories(str(tmp_path))] == [*NAMES, "grass"]  # by id
    write(tmp_path / "panoptic_categories.json", [{"id": 1, "name": "a"}])
    with pytest.raises(ValueError, match=r'panoptic_categories.json, category 1 has no "isthing"'):
        panoptic_categories(str(tmp_path))
    write(tmp_path / "panoptic_categories.json", [*CATEGORIES, CATEGORIES[0]])
    with pytest.raises(ValueError, match="has two categories with id 1"):
        panoptic_categories(str(tmp_path))
    (tmp_path / "panoptic_categories.json").unlink()
    with pytest.raises(ValueError, match=r"panoptic_categories.json is missing"):
        panoptic_categories(str(tmp_path))
    with pytest.raises(ValueError, match='dataset_name "digits" has no panoptic maps'):
        panoptic_categories("digits")


def test_invalid_panoptic_rows(tmp_path):
    source = load_splits(str(panoptic(coco(tmp_path))))["train"]
    categories = panoptic_categories(str(tmp_path))
    with pytest.raises(ValueError, match="category_id 7 in segments_info is not one of the 3 categories"):
        panoptic_rows(source, categories[:3])
    with pytest.raises(ValueError, match='panoptic_column "maps" is not a column of the data set; it has image'):
        panoptic_rows(source, categories, panoptic_column="maps")
    with pytest.raises(ValueError, match='panoptic_column "width" must hold images'):
        panoptic_rows(source, categories, panoptic_column="width")
    with pytest.raises(ValueError, match="none of the 1 images has a panoptic map"):
        panoptic_rows(source.select([1]), categories)


# --- invalid files


def of_the_first(part, **change):
    """The instances with changed fields in the first entry of a list."""
    content = instances()
    content[part][0].update(change)
    return content


def without(content, key, part="annotations"):
    entries = [{k: v for k, v in entry.items() if k != key} for entry in content[part]]
    return content | {part: entries}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'has no list "categories"'),
        ({"images": []}, 'has no list "categories"'),
        (instances(images=[]), "has no images"),
        (instances(categories=CATEGORIES[:2]), "category_id 4, which is not one of its 2 categories"),
        (instances(categories=[*CATEGORIES, {"id": 9, "name": "dog"}]), 'has two categories with name "dog"'),
        (instances(categories=[*CATEGORIES, {"id": "4", "name": "cat"}]), "has two categories with id 4"),
        (without(instances(), "bbox"), 'annotation 20 has no "bbox"; it has id, image_id'),
        (without(instances(), "file_name", "images"), 'image 139 has no "file_name"'),
        (instances(images=[{"id": 1, "file_name": "gone.jpg"}]), "names gone.jpg, which is in none of"),
        (instances(images=instances()["images"] * 2), "has two images with id 139"),
        (instances(annotations=instances()["annotations"] * 2), "has two annotations with id 20"),
        (instances(images=[3]), 'instances_train2017.json: "images" must be a list of objects, got 3 at place 0'),
        (instances(images="0.jpg"), 'has no list "images"'),
        *[
            (of_the_first(part, **{key: value}), f'instances_train2017.json, {name}: "{key}" must be {wanted}')
            for part, name, key, value, wanted in [
                ("images", "image 139", "file_name", 7, "text that is not empty, got 7"),
                ("images", "image 139", "file_name", "", "text that is not empty, got ''"),
                ("images", "image 139", "file_name", "a\0.jpg", "text that is not empty"),
                ("images", "image 139", "width", -60, r"in \[0, 1000000\], got -60"),
                ("images", "image 139", "width", 10**12, r"in \[0, 1000000\], got 10{12}"),
                ("images", "image 139", "height", "tall", "an integer of 64 bits, got 'tall'"),
                ("images", "image 139", "height", 40.5, "an integer of 64 bits, got 40.5"),
                ("images", r"image \[1\]", "id", [1], r"an integer or text, got \[1\]"),
                ("annotations", "annotation 20", "image_id", {"$oid": 1}, "an integer or text"),
                ("annotations", "annotation 20", "category_id", True, "an integer or text, got True"),
                ("annotations", "annotation 20", "bbox", [1, 2, 3], r"four numbers, got \[1, 2, 3\]"),
                ("annotations", "annotation 20", "bbox", ["a", 1, 2, 3], "four numbers"),
                ("annotations", "annotation 20", "bbox", {"x": 1}, "four numbers"),
                ("annotations", "annotation 20", "bbox", [[1], [2], [3], [4]], "four numbers"),
                ("annotations", "annotation 20", "area", "large", "a number, got 'large'"),
                ("annotations", "annotation 20", "iscrowd", "perhaps", "true or false, got 'perhaps'"),
                ("annotations", "annotation 20", "iscrowd", 2, "true or false, got 2"),
                ("categories", "category 4", "name", ["zebra"], "text that is not empty"),
                ("categories", "category 4", "name", 5, "text that is not empty, got 5"),
                ("categories", "category 4", "name", "\ud800", "text that is not empty"),
            ]
        ],
    ],
)
def test_invalid_coco_files(tmp_path, content, message):
    images_of(tmp_path / "train2017")
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path))


def test_invalid_json_file(tmp_path):
    folder = coco(tmp_path)
    (folder / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017.json is not JSON"):
        load_splits(str(folder))


def test_annotations_of_unknown_images_are_skipped_with_a_warning(tmp_path, caplog):
    rows = load_splits(str(coco(tmp_path, images=instances()["images"][:1])))["train"]
    assert len(rows) == 1
    assert "1 annotations of images that it does not list are left out" in caplog.text


def objects_of(folder, **options):
    """Objects of image 139, and of all images."""
    rows, _ = scene_rows(load_splits(str(folder))["train"], **options)
    every = {row["image_id"]: row["objects"] for row in rows}
    return every[139], [o for objects in every.values() for o in objects]


OUTLINES = {
    "no polygon": [[]],
    "two points": [[5, 5, 25, 20]],
    "an odd coordinate": [[5, 5, 25, 5, 25]],
    "no numbers": [["a", "b", 1, 2, 3, 4]],
    "not finite": [[5, 5, float("nan"), 5, 25, 20]],
    "far away": [[5, 5, 1e8, 5, 25, 20]],
    "a number": 7,
    "text": "polygon",
    "a flag": True,
    "of another size": {"size": [60, 40], "counts": [2400]},
    "huge": {"size": [10**9, 10**9], "counts": [10**18]},
    "too few pixels": {"size": [40, 60], "counts": [2399]},
    "a negative run": {"size": [40, 60], "counts": [2500, -100]},
    "no counts": {"size": [40, 60]},
    "counts that are none": {"size": [40, 60], "counts": {"a": 1}},
    "text of other letters": {"size": [40, 60], "counts": "\u00e9 !"},
    "text that is cut off": {"size": [40, 60], "counts": "oooo"},
    "text of another size": {"size": [40, 60], "counts": run_lengths.encode(np.ones((41, 60), bool))["counts"]},
}


@pytest.mark.parametrize("kind", OUTLINES)
def test_malformed_outline_is_dropped_but_its_box_is_read(tmp_path, caplog, kind):
    content = instances()
    content["annotations"] = sorted(content["annotations"], key=lambda a: a["id"])
    content["annotations"][0]["segmentation"] = OUTLINES[kind]
    images_of(tmp_path / "train2017")
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    for _ in range(2):  # also if the rows come from the cache
        caplog.clear()
        found, every = objects_of(tmp_path)
        assert len(every) == 3 and found[0]["bbox"] == [4, 6, 20, 10]
        assert "instances_train2017.json: 1 malformed outlines are left out, their boxes" in caplog.text
        assert "(first annotation 0: " in caplog.text
    found, every = objects_of(tmp_path, masks=True)
    assert len(every) == 2 and found[0]["bbox"] == [30, 20, 25, 15]
    assert "1 of 3 boxes left out: without an outline (first in image 139, " in caplog.text


def test_outlines_of_images_without_a_stated_size(tmp_path):
    content = instances()
    for image in content["images"]:
        del image["width"]
    images_of(tmp_path / "train2017")
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    assert len(objects_of(tmp_path, masks=True)[1]) == 3


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("annotations", lambda a: a.update(image_id=str(a["image_id"]), category_id=float(a["category_id"]))),
        ("images", lambda i: i.update(id=f" {i['id']}", width=float(i["width"]), height=str(i["height"]))),
        ("categories", lambda c: c.update(id=str(c["id"]))),
        ("annotations", lambda a: a.update(id=f"uuid-{a['id']}", bbox=[str(side) for side in a["bbox"]])),
        ("annotations", lambda a: a.update(iscrowd="yes" if a["iscrowd"] else "no", area=str(a["area"]))),
    ],
)
def test_ids_numbers_and_flags_may_be_strings(tmp_path, part, change):
    expected_rows = objects_of(coco(tmp_path / "plain"))
    content = instances()
    for entry in content[part]:
        change(entry)
    assert objects_of(coco(tmp_path / "text", **content)) == expected_rows


@pytest.mark.parametrize("large", [2**63, 10**30, "a"])
def test_other_ids_are_replaced_by_row_indices(tmp_path, large):
    content = instances()
    content["images"][0]["id"] = large
    for annotation in content["annotations"]:
        annotation["image_id"] = large if annotation["image_id"] == 139 else annotation["image_id"]
    rows = load_splits(str(coco(tmp_path, **content)))["train"]
    assert rows["image_id"][:] == [0, 1, 2]
    assert [len(objects) for objects in rows["objects"]] == [2, 0, 1]


def test_missing_image_does_not_affect_others(tmp_path):
    gone = {"id": 1, "file_name": "gone.jpg", "width": 9, "height": 9}
    rows = load_splits(str(coco(tmp_path, images=[gone, *instances()["images"]])))["train"]
    assert [decode(row["image"]).shape[1:] for row in rows.select([1, 2, 3])] == SIZES


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd", "a/../../../secret.jpg", "..\\..\\secret.jpg"])
def test_paths_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "data"
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    content = of_the_first("images", file_name=name)
    with pytest.raises(ValueError, match=r"image 139 names .* which is outside the data set's folder"):
        load_splits(str(coco(folder, **content)))
    with pytest.raises(ValueError, match=r"annotation of image 139 names .* which is outside the data set's folder"):
        load_splits(str(panoptic(tmp_path / "maps", change=lambda c: change_map(c, file_name=name))))
    spoilt = voc(tmp_path / "voc")
    annotation = spoilt / "Annotations" / "0.xml"
    annotation.write_text(annotation.read_text().replace("<size>", f"<filename>{name}</filename><size>"))
    with pytest.raises(ValueError, match=r"0.xml, filename names .* which is outside the data set's folder"):
        load_splits(str(spoilt))
    (spoilt / "ImageSets" / "Main" / "train.txt").write_text(f"{name.replace('..', '../..')}\n")
    with pytest.raises(
        ValueError, match=r"(train.txt, line 1 names .* outside the data set's|cannot be read: .*No such)"
    ):
        load_splits(str(spoilt))


def test_equivalent_paths_inside_the_folder_are_read(tmp_path):
    plain = objects_of(coco(tmp_path / "plain"))
    for name in ("../train2017/./0.jpg", str(tmp_path / "data" / "train2017" / "0.jpg"), "sub\\0.jpg"):
        folder = coco(tmp_path / "data", **of_the_first("images", file_name=name))
        (folder / "train2017" / "sub").mkdir(exist_ok=True)
        (folder / "train2017" / "sub" / "0.jpg").write_bytes(jpeg(0))
        rows = load_splits(str(folder))["train"]
        assert decode(rows[0]["image"]).shape == (3, 40, 60)
        assert objects_of(folder) == plain


def change_map(content, **change):
    content["annotations"][0].update(change)
    return content


def change_segment(content, **change):
    content["annotations"][0]["segments_info"][0].update(change)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: change_segment(c, id=-1), r'annotation of image 139, segment -1: "id" must be in \[1, 16777215\]'),
        (lambda c: change_segment(c, id=2**25), r'"id" must be in \[1, 16777215\], got 33554432'),
        (lambda c: change_segment(c, id=600), "annotation of image 139 has two segments with id 600"),
        (lambda c: change_segment(c, category_id="red"), '"category_id" must be an integer of 64 bits, got .red.'),
        (lambda c: change_segment(c, iscrowd="maybe"), '"iscrowd" must be true or false'),
        (lambda c: change_map(c, image_id="7"), "has two annotations of image 7"),
        (lambda c: change_map(c, segments_info={"id": 1}), '"segments_info" must be a list of objects'),
        (lambda c: change_map(c, file_name=3), '"file_name" must be text'),
    ],
)
def test_invalid_panoptic_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_splits(str(panoptic(tmp_path, change=change)))


def test_segments_of_any_source_have_distinct_ids(tmp_path):
    source = load_splits(str(panoptic(tmp_path)))["train"]
    categories = panoptic_categories(str(tmp_path))
    for index, value, message in (
        (1, 300, "has two segments with id 300 in image 139"),
        (0, -4, "got -4 in image 139"),
    ):
        segments = source["segments_info"][:]
        segments[0][index]["id"] = value
        features = source.features
        rows = source.remove_columns("segments_info").add_column("segments_info", segments).cast(features)
        with pytest.raises(ValueError, match=message):
            panoptic_rows(rows, categories)


@pytest.mark.parametrize(
    ("value", "expected_value"), [("no", False), ("yes", True), (0, False), (True, True), ("1", True)]
)
def test_category_flags_are_parsed(tmp_path, value, expected_value):
    write(tmp_path / "panoptic_categories.json", [{"id": "1", "name": "a", "isthing": value}])
    (category,) = panoptic_categories(str(tmp_path))
    assert (category.id, category.isthing) == (1, expected_value)


@pytest.mark.parametrize("value", ["perhaps", 2, None, [], "thing"])
def test_invalid_category_flags_are_refused(tmp_path, value):
    write(tmp_path / "panoptic_categories.json", [{"id": 1, "name": "a", "isthing": value}])
    with pytest.raises(ValueError, match=r'category 1.*"isthing"'):
        panoptic_categories(str(tmp_path))


def test_deeply_nested_json_is_refused(tmp_path):
    folder = coco(tmp_path)
    (folder / "annotations" / "instances_train2017.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"instances_train2017.json cannot be read as JSON"):
        load_splits(str(folder))


def test_files_that_are_not_regular_are_not_opened(tmp_path):
    folder = coco(tmp_path)
    file = folder / "annotations" / "instances_train2017.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"instances_train2017.json cannot be read: .* is not a regular file"):
        load_splits(str(folder))
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"instances_train2017.json cannot be read: .* is not a regular file"):
        load_splits(str(folder))


@pytest.mark.parametrize(
    "lines", ["0\n1\n", "0 1\n1  -1\n", "0.jpg\n1.jpg", "0.xml\n\n1.JPG\n", "\ufeff0\r\n1\r\n", "  0\n1  0\n"]
)
def test_voc_list_formats(tmp_path, lines):
    folder = voc(tmp_path)
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(lines.encode())
    assert [Path(row["image"]["path"]).name for row in load_splits(str(folder))["train"]] == ["0.jpg", "1.jpg"]


def test_names_with_spaces_in_lists(tmp_path):
    folder = voc(tmp_path)
    for name in ("my photo", "my photo 1", "v1.5"):
        (folder / "Annotations" / f"{name}.xml").write_text(xml(0))
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg(0))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("my photo.jpg\nmy photo 1\nv1.5\n2 -1\n")
    found = [Path(row["image"]["path"]).stem for row in load_splits(str(folder))["train"]]
    assert found == ["my photo", "my photo 1", "v1.5", "2"]
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n0.jpg\n")
    with pytest.raises(ValueError, match=r"train.txt names 0 twice"):
        load_splits(str(folder))
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(ValueError, match=r"train.txt is not UTF-8 text"):
        load_splits(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one": ""}, "0.xml cannot be read: mismatched tag"),
        ({"one": "<name/><name>"}, r"0.xml has no name in <object>"),
        ({"sides": ("xmin", "ymin", "xmax", "bottom")}, r"0.xml has no bndbox/ymax in <object>"),
    ],
)
def test_invalid_voc_files(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_splits(str(voc(tmp_path, **options)))


def test_list_with_a_missing_annotation(tmp_path):
    folder = voc(tmp_path)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("5\n")
    with pytest.raises(ValueError, match=r"5.xml cannot be read: .*No such file"):
        load_splits(str(folder))
    (folder / "ImageSets" / "Main" / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"val.txt names no image"):
        load_splits(str(folder))


def test_annotation_folders_refuse_other_options(tmp_path):
    with pytest.raises(ValueError, match="is a folder of images with annotations: it takes no dataset_config"):
        load_splits(str(coco(tmp_path)), streaming=True)


def test_images_with_the_same_file_name_are_counted(tmp_path, caplog):
    coco(tmp_path)
    file = next((tmp_path / "annotations").glob("instances_train*.json"))
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = content["images"][0]["file_name"]
    file.write_text(json.dumps(content))
    load_splits(str(tmp_path))
    assert f"{file.name}: 1 images have the file_name of another (first " in caplog.text
