"""Each planted fault is found by its check and reported with the right sample; healthy data passes."""

import numpy as np
import pytest
from datasets import ClassLabel, Value
from PIL import Image
from planted import HEIGHT, NAMES, WIDTH, as_splits, boxes_of, decode_png, examine, healthy, only, plant, png

from hf_tfm.data.box_checks import EVIDENCE


def test_healthy_data_passes(monkeypatch):
    found = examine(monkeypatch, as_splits(healthy()))
    assert {finding.level for finding in found} == {"ok"}
    per_split = [finding for finding in found if finding.check == "box_format"]
    assert [finding.split for finding in per_split] == ["train", "validation"]
    assert "72 boxes" in per_split[0].message


# --- faults in the rows: name, change, check, level, image id, message


def to_corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def to_shares(box):
    x, y, w, h = box
    return [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def swap(box):
    x, y, w, h = box
    return [y, x, h, w]


def every_box(change):
    """Change all boxes of the training split."""

    def planted(rows):
        for found in boxes_of(rows):
            found["bbox"] = change(found["bbox"])

    return planted


def one_box(box, image=3, index=1):
    """Change one box of a training image."""

    def planted(rows):
        rows["train"][image]["objects"][index]["bbox"] = box

    return planted


def category_of_one(value):
    def planted(rows):
        rows["train"][5]["objects"][2]["category"] = value

    return planted


def from_1(rows):
    for found in boxes_of(rows):
        found["category"] += 1


def copy_a_box(rows):
    objects = rows["train"][7]["objects"]
    objects.append(dict(objects[0]))


def copy_a_box_as_another_class(rows):
    objects = rows["train"][7]["objects"]
    objects.append(objects[0] | {"category": (objects[0]["category"] + 1) % 3})


def empty(rows):
    for row in rows["train"]:
        row["objects"] = []


def mostly_empty(rows):
    for row in rows["train"][2:]:
        row["objects"] = []


def shrink(share):
    def planted(rows):
        for found in boxes_of(rows)[: round(share * 72)]:
            found["bbox"][2:] = [6, 6]
        rows["train"][4]["objects"][1]["bbox"][2:] = [2, 2]

    return planted


def crowded(rows):
    rows["train"][6]["objects"] = [{"bbox": [7 * k, 3 * k, 20, 24], "category": k % 3} for k in range(11)]


def broken(count, first=2):
    def planted(rows):
        for row in rows["train"][first : first + count]:
            row["image"] = row["image"][:100]

    return planted


def stated_size(height, width):
    def planted(rows):
        for row in rows["train"]:
            row |= {"height": HEIGHT, "width": WIDTH}
        rows["train"][9] |= {"height": height, "width": width}

    return planted


def rotated(state_sizes):
    """An image stored sideways with an EXIF rotation, and boxes for the stored pixels."""

    def planted(rows):
        row = rows["train"][8]
        exif = Image.Exif()
        exif[0x0112] = 6
        row["image"] = png(decode_png(row["image"]), exif=exif)
        if state_sizes:
            for own in rows["train"]:
                own |= {"height": HEIGHT, "width": WIDTH}

    return planted


def upside_down(rows):
    exif = Image.Exif()
    exif[0x0112] = 3
    rows["train"][8]["image"] = png(decode_png(rows["train"][8]["image"]), exif=exif)


def thumbnails(count):
    def planted(rows):
        for row in rows["train"][10 : 10 + count]:
            row["image"] = png(decode_png(row["image"])[::8, ::8])
            for found in row["objects"]:
                found["bbox"] = [side / 8 for side in found["bbox"]]

    return planted


def leak(rows):
    rows["validation"][2]["image"] = rows["train"][11]["image"]


def never_blue(rows):
    for row in rows["train"]:
        row["objects"] = [found for found in row["objects"] if found["category"] != 2]


def blue_in_training_alone(rows):
    for row in rows["validation"]:
        row["objects"] = [found for found in row["objects"] if found["category"] != 2]


def rarely_blue(rows):
    for row in rows["train"][1:]:
        row["objects"] = [found for found in row["objects"] if found["category"] != 2]


def all_crowds(rows):
    for row in rows["train"]:
        for found in row["objects"]:
            found["iscrowd"] = True


FAULTS = {
    "corner coordinates": (every_box(to_corners), "box_format", "failed", 100, "read as xyxy in pixels, 100% do"),
    "relative coordinates": (
        every_box(to_shares),
        "box_format",
        "failed",
        100,
        "no coordinate of 72 boxes is above 1.5",
    ),
    "swapped axes": (every_box(swap), "box_axes", "failed", 100, "100% with x and y swapped"),
    "outside": (one_box([200, 10, 20, 20]), "box_range", "failed", 103, "1 of 72 boxes are dropped: outside"),
    "over the edge": (one_box([80, 10, 30, 20]), "box_range", "failed", 103, "clipped: reach out of"),
    "no width": (one_box([40, 10, 0, 20]), "box_range", "failed", 103, "dropped: width or height not above 0"),
    "not a number": (one_box([40, 10, float("nan"), 9]), "box_range", "failed", 103, "dropped: not finite"),
    "duplicate box": (
        copy_a_box,
        "duplicate_boxes",
        "failed",
        107,
        "1 of 73 boxes are duplicates, with the same class",
    ),
    "duplicate box of another class": (
        copy_a_box_as_another_class,
        "duplicate_boxes",
        "failed",
        107,
        "duplicates, with another class",
    ),
    "no objects": (empty, "empty_images", "failed", 100, "24 of 24 images have no objects"),
    "all crowds": (all_crowds, "empty_images", "failed", 100, "all 72 objects are crowds (iscrowd)"),
    "few images with objects": (mostly_empty, "empty_images", "warning", 102, "22 of 24 images have no objects"),
    "tiny objects": (
        shrink(1.0),
        "tiny_objects",
        "failed",
        104,
        "100.0% of 72 objects are smaller than a cell of 16 x 16",
    ),
    "some tiny objects": (shrink(0.2), "tiny_objects", "warning", 104, "smaller than a cell of 16 x 16"),
    "too many objects": (
        crowded,
        "box_count",
        "failed",
        106,
        "at most 11 and on average 3.3 objects per image, 10 queries",
    ),
    "ids from 1": (from_1, "category_ids", "failed", 100, "have category 3"),
    "unknown id": (category_of_one(17), "category_ids", "failed", 105, "1 of 72 objects have category 17"),
    "no category": (category_of_one(-1), "category_ids", "failed", 105, "1 of 72 objects have no category"),
    "unreadable": (broken(1), "unreadable_images", "warning", 102, "24 of 24 images decoded, 1 are unreadable"),
    "all unreadable": (
        broken(24, 0),
        "unreadable_images",
        "failed",
        100,
        "24 of 24 images decoded, 24 are unread",
    ),
    "many unreadable": (broken(11), "unreadable_images", "failed", 102, "11 are unreadable (limit: max_bad_images"),
    "other size": (stated_size(32, 48), "image_size", "failed", 109, "64 x 96 pixels instead of 32 x 48"),
    "swapped size": (stated_size(96, 64), "image_size", "failed", 109, "64 x 96 pixels instead of 96 x 64"),
    "rotated image": (rotated(True), "image_size", "failed", 108, "EXIF orientation 6 rotates it"),
    "unrotated boxes": (rotated(False), "image_orientation", "failed", 108, "upright, it has 96 x 64 pixels"),
    "upside down": (upside_down, "image_orientation", "warning", 108, "1 have an EXIF orientation"),
    "thumbnail": (thumbnails(1), "tiny_images", "warning", 110, "1 of 24 images are enlarged more than 4 times"),
    "thumbnails": (thumbnails(13), "tiny_images", "failed", 110, "the smallest, 8 x 12 pixels, 8.0 times"),
    "leak": (
        leak,
        "shared_images",
        "failed",
        902,
        "1 of 8 images of validation are also in train, the first as image 111",
    ),
    "class missing in training": (
        never_blue,
        "classes_in_one_split",
        "failed",
        900,
        "1 classes have objects in validation and none",
    ),
    "class missing in validation": (
        blue_in_training_alone,
        "classes_in_one_split",
        "warning",
        100,
        "1 classes have no objects in valid",
    ),
    "rare class": (rarely_blue, "class_balance", "warning", 100, "1 of 3 classes have fewer than 10 objects: blue"),
}


# Further values, limits and levels of a check of which another fault is tested.
SLOW = (
    *("no width", "not a number", "duplicate box of another class", "some tiny objects", "few images with objects"),
    *("no category", "all unreadable", "many unreadable", "swapped size", "upside down", "thumbnail"),
    *("class missing in validation", "all crowds"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAULTS]
)
def test_planted_fault_is_found(name, monkeypatch):
    change, check, level, image_id, message = FAULTS[name]
    found = only(examine(monkeypatch, as_splits(plant(change))), check, level)
    assert found.sample.image_id == image_id
    assert message in found.message
    assert found.remedy


def test_sample_is_the_faulty_box(monkeypatch):
    found = only(examine(monkeypatch, as_splits(plant(one_box([80, 10, 30, 20])))), "box_range")
    assert found.sample.box == (80, 10, 30, 20) and found.sample.split == "train"
    rows = plant(every_box(to_corners))
    found = only(examine(monkeypatch, as_splits(rows)), "box_format")
    assert list(found.sample.box) in [box["bbox"] for box in rows["train"][0]["objects"]]


def test_misread_boxes_give_only_a_format_failure(monkeypatch):
    found = examine(monkeypatch, as_splits(plant(every_box(to_shares))))
    assert {finding.check for finding in found if finding.level == "failed"} == {"box_format"}
    skipped = {finding.check for finding in found if finding.level == "skipped"}
    assert skipped == {"box_axes", "box_range", "duplicate_boxes", "tiny_objects"}


def test_remedies_name_the_mistake(monkeypatch):
    assert "subtract 1" in only(examine(monkeypatch, as_splits(plant(from_1))), "category_ids").remedy
    assert "swapped" in only(examine(monkeypatch, as_splits(plant(stated_size(96, 64)))), "image_size").remedy
    assert "EXIF" in only(examine(monkeypatch, as_splits(plant(rotated(True)))), "image_size").remedy


def test_few_swapped_boxes_are_not_swapped_axes(monkeypatch):
    def planted(rows):
        for found in boxes_of(rows)[: EVIDENCE - 1]:
            found["bbox"] = swap(found["bbox"])

    found = examine(monkeypatch, as_splits(plant(planted)))
    assert not [finding for finding in found if finding.check == "box_axes" and finding.level != "ok"]
    assert [finding for finding in found if finding.check == "box_range" and finding.level == "failed"]


# --- categories across splits


def test_sparse_ids_give_a_warning(monkeypatch):
    def planted(rows):
        for split in rows:
            for found in boxes_of(rows, split):
                found["category"] = [1, 18, 90][found["category"]]

    found = examine(monkeypatch, as_splits(plant(planted), category=Value("int64")))
    warnings = [finding for finding in found if finding.check == "category_ids"]
    assert [finding.level for finding in warnings] == ["warning", "warning"]
    assert "ids 1 to 90 with 87 gaps are read as classes 0 to 2" in warnings[0].message
    assert not [finding for finding in found if finding.level == "failed"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["green", "red", "blue"], 'validation has "green" where train has "red"'),
        (["red", "green", "bleu"], 'validation has 1 classes that train does not have, the first is "bleu"'),
    ],
)
def test_different_id_map_of_a_split_is_found(names, message, monkeypatch):
    found = only(examine(monkeypatch, as_splits(healthy(), names={"validation": names})), "class_names")
    assert message in found.message
    assert found.sample.split == "validation" and found.sample.image_id >= 900


def test_background_class_and_unused_class_give_a_warning(monkeypatch):
    names = [*NAMES, "background"]
    found = examine(monkeypatch, as_splits(healthy(), category=ClassLabel(names=names)))
    assert '"background"' in only(found, "background_class", "warning").message
    assert (
        "1 classes have no objects in any split: background" in only(found, "classes_in_one_split", "warning").message
    )


def test_imbalanced_classes_give_a_warning(monkeypatch):
    def planted(rows):
        for row in rows["train"]:
            red = [found for found in row["objects"] if found["category"] == 0]
            row["objects"] = [dict(red[0], bbox=[k, k, 30, 30]) for k in range(10)]
        rows["train"][3]["objects"][0]["category"] = 1
        rows["train"][3]["objects"][1]["category"] = 2

    found = [f for f in examine(monkeypatch, as_splits(plant(planted))) if f.check == "class_balance"]
    assert [f.level for f in found] == ["warning", "warning"]
    assert '"red" has 238 objects, "green" 1 (limit: 100 times as many)' in found[0].message


def test_validating_on_the_training_split_gives_a_warning(monkeypatch):
    found = examine(monkeypatch, as_splits(healthy()), validation_split="train")
    assert "train is the training split: its AP" in only(found, "shared_images", "warning").message


def test_unreadable_data_is_one_failed_check(monkeypatch):
    data = as_splits(healthy())
    (found,) = examine(monkeypatch, data, validation_split="dev")
    assert (found.check, found.level) == ("data", "failed")
    assert 'validation_split "dev" is not a split' in found.message
    (found,) = examine(monkeypatch, data, objects_column="things")
    assert 'objects_column "things" is not a column' in found.message


def test_images_are_decoded_once_and_large_splits_sampled(monkeypatch):
    seen = []
    monkeypatch.setattr("hf_tfm.doctor.splits.LOOKED_AT", 5)
    monkeypatch.setattr("hf_tfm.doctor.splits.decode", lambda data: seen.append(data) or np.zeros((3, HEIGHT, WIDTH)))
    found = examine(monkeypatch, as_splits(healthy()))
    assert len(seen) == 10
    assert "5 of 24 images decoded" in next(f for f in found if f.check == "image_size").message
