"""COCO's, Roboflow's and Pascal VOC's folders are read as the same rows, and said to be wrong where they are."""

import json
import os

import numpy as np
import pytest
from annotated_images import CATEGORIES, NAMES, OBJECTS, SIZES, colours, expected, picture, segment_map

from hf_tfm.data import run_lengths
from hf_tfm.data.coco import split_names
from hf_tfm.data.detection import class_names, fingerprint, scene_rows
from hf_tfm.data.images import decode
from hf_tfm.data.panoptic import decode_segments, panoptic_categories, panoptic_rows
from hf_tfm.data.source import load_splits

IDS = [1, 2, 4]  # of categories, with a gap as COCO's have
IMAGE_IDS = [139, 25, 7]


def pictures_in(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(picture(i))


def instances(**change):
    """The content of an instances file."""
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
    return content | change


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def coco(folder, place="train2017", **change):
    pictures_in(folder / place)
    write(folder / "annotations" / "instances_train2017.json", instances(**change))
    return folder


def roboflow(folder):
    for split in ("train", "valid"):
        pictures_in(folder / split)
        write(folder / split / "_annotations.coco.json", instances())
    return folder


def panoptic(folder, maps="annotations/panoptic_train2017", change=lambda content: content):
    """Beside what is in the folder already; the image 25 has no map."""
    pictures_in(folder / "train2017")
    (folder / maps).mkdir(parents=True)
    annotations = []
    for i in (0, 2):
        ids, segments = segment_map(i)
        (folder / maps / f"{i}.png").write_bytes(colours(ids))
        annotations.append({"image_id": IMAGE_IDS[i], "file_name": f"{i}.png", "segments_info": segments})
    content = {"images": instances()["images"], "annotations": annotations, "categories": CATEGORIES}
    write(folder / "annotations" / "panoptic_train2017.json", change(content))
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
    pictures_in(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for i in range(3):
        (folder / "Annotations" / f"{i}.xml").write_text(xml(i, **options))
    if lists:
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for split, names in (("train", "0\n1\n"), ("val", "2\n"), ("dog_train", "0 1\n1 -1\n")):
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return folder


# --- one form


@pytest.mark.parametrize("place", ["train2017", "images/train2017", "images", "."])
def test_coco(tmp_path, place):
    splits = load_splits(str(coco(tmp_path, place)))
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
        np.testing.assert_array_equal(decode(row["image"]), decode(picture(i)))
    assert report.kept == 3


def test_roboflow_splits_have_their_usual_names(tmp_path):
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


def test_a_changed_file_is_read_again(tmp_path):
    folder = coco(tmp_path)
    before = load_splits(str(folder))["train"]
    assert before.cache_files[0]["filename"] == load_splits(str(folder))["train"].cache_files[0]["filename"]
    content = instances()
    content["annotations"][0]["bbox"] = [1, 1, 5, 5]
    file = folder / "annotations" / "instances_train2017.json"
    write(file, content)
    os.utime(file, ns=(1, 1))  # some file systems count whole seconds
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


def test_panoptic_categories_beside_the_data(tmp_path):
    write(tmp_path / "panoptic_categories.json", CATEGORIES[::-1])
    assert [c.name for c in panoptic_categories(str(tmp_path))] == [*NAMES, "grass"]  # by their ids
    write(tmp_path / "panoptic_categories.json", [{"id": 1, "name": "a"}])
    with pytest.raises(ValueError, match=r"panoptic_categories.json must hold categories .*KeyError\('isthing'\)"):
        panoptic_categories(str(tmp_path))
    write(tmp_path / "panoptic_categories.json", [*CATEGORIES, CATEGORIES[0]])
    with pytest.raises(ValueError, match="has two categories with id 1"):
        panoptic_categories(str(tmp_path))
    (tmp_path / "panoptic_categories.json").unlink()
    with pytest.raises(ValueError, match=r"panoptic_categories.json is missing"):
        panoptic_categories(str(tmp_path))
    with pytest.raises(ValueError, match='dataset "digits" has no panoptic maps'):
        panoptic_categories("digits")


def test_panoptic_rows_that_do_not_fit(tmp_path):
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


# --- files that do not fit


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
        (instances(categories=[*CATEGORIES, {"id": 9, "name": "dog"}]), "has 'dog' for two categories"),
        (without(instances(), "bbox"), 'has an entry without "bbox"'),
        (without(instances(), "file_name", "images"), 'has an entry without "file_name"'),
        (instances(images=[{"id": 1, "file_name": "gone.jpg"}]), "names gone.jpg, which is in none of"),
        (instances(annotations=[{**instances()["annotations"][0], "segmentation": [[1, 2]]}]), "at least 3 corners"),
    ],
)
def test_coco_files_that_do_not_fit(tmp_path, content, message):
    pictures_in(tmp_path / "train2017")
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path))


def test_a_file_that_is_no_json(tmp_path):
    folder = coco(tmp_path)
    (folder / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017.json is not JSON"):
        load_splits(str(folder))


def test_annotations_of_unknown_images_are_left_out_with_a_word(tmp_path, caplog):
    rows = load_splits(str(coco(tmp_path, images=instances()["images"][:1])))["train"]
    assert len(rows) == 1
    assert "1 annotations of images that it does not list are left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one": ""}, "0.xml cannot be read: mismatched tag"),
        ({"one": "<name/><name>"}, r"0.xml has no name in <object>"),
        ({"sides": ("xmin", "ymin", "xmax", "bottom")}, r"0.xml has no bndbox/ymax in <object>"),
    ],
)
def test_voc_files_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_splits(str(voc(tmp_path, **options)))


def test_a_list_that_names_a_missing_annotation(tmp_path):
    folder = voc(tmp_path)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("5\n")
    with pytest.raises(ValueError, match=r"5.xml cannot be read: .*No such file"):
        load_splits(str(folder))
    (folder / "ImageSets" / "Main" / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"val.txt names no image"):
        load_splits(str(folder))


def test_such_folders_take_no_options_of_others(tmp_path):
    with pytest.raises(ValueError, match="is a folder of images with annotations: it takes no name"):
        load_splits(str(coco(tmp_path)), streaming=True)
