"""The embedded scenes: consistent boxes, outlines and segments; no digit is in two splits."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hf_tfm.data import digit_scenes as module
from hf_tfm.data import run_lengths
from hf_tfm.data.detection import class_names, scene_rows
from hf_tfm.data.digit_scenes import CATEGORIES, LEAST_GROUND, OVERLAP, STUFF, THINGS, digit_scenes, layout
from hf_tfm.data.digits import digits
from hf_tfm.data.panoptic import decode_segments, panoptic_categories, panoptic_rows
from hf_tfm.data.source import DIGIT_SCENES, load_splits


@pytest.fixture(scope="module")
def scenes():
    return digit_scenes(train=80, validation=5, test=5)


def test_splits_and_categories(scenes):
    assert {name: len(rows) for name, rows in scenes.items()} == {"train": 80, "validation": 5, "test": 5}
    assert scenes["train"][0]["image"].size == (128, 128)
    assert panoptic_categories("digit-scenes") == CATEGORIES
    assert [c.name for c in CATEGORIES if c.isthing] == THINGS == list("0123456789")
    assert [c.name for c in CATEGORIES if not c.isthing] == STUFF
    found = {s["category_id"] for row in scenes["train"] for s in row["segments_info"]}
    assert found == set(range(13))
    counts = np.bincount([len(row["objects"]) for row in scenes["train"]], minlength=7)
    assert counts[0] == 0 and (counts[1:] > 0).all()


def test_boxes_outlines_and_segments_are_consistent(scenes):
    objects, report = scene_rows(scenes["train"], masks=True)
    segments = panoptic_rows(scenes["train"], CATEGORIES)
    assert report.kept == report.boxes and not list(report.lines())
    assert class_names(objects) == THINGS and class_names(segments) == THINGS + STUFF
    for one, other in zip(objects, segments, strict=True):
        ids = decode_segments(other["panoptic"])
        assert set(np.unique(ids)) == {s["id"] for s in other["segments_info"]}  # every pixel belongs to a segment
        assert [s["area"] for s in other["segments_info"]] == [(ids == s["id"]).sum() for s in other["segments_info"]]
        things = [s for s in other["segments_info"] if s["category"] < len(THINGS)]
        masks = run_lengths.decode([o["segmentation"] for o in one["objects"]], 128, 128)
        for thing, found, mask in zip(things, one["objects"], masks, strict=True):
            np.testing.assert_array_equal(mask, ids == thing["id"])
            assert (thing["category"], thing["area"]) == (found["category"], found["area"])
            y, x = np.nonzero(mask)
            left, top, width, height = found["bbox"]
            assert (left, top, left + width, top + height) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        stuff = [s for s in other["segments_info"] if s["category"] >= len(THINGS)]
        assert len({s["category"] for s in stuff}) == len(stuff) in (1, 2)


def test_digits_are_visible(scenes):
    """Bright on a dark background; a second background is not a sliver."""
    for row in scenes["train"]:
        image = np.array(row["image"]).astype(int)
        masks = run_lengths.decode([o["segmentation"] for o in row["objects"]], 128, 128)
        ground = image[~masks.any(axis=0)].mean()
        assert all(image[mask].mean() > ground + 40 for mask in masks)
        areas = [s["area"] for s in row["segments_info"] if s["category_id"] >= len(THINGS)]
        assert min(areas) > (LEAST_GROUND / 2) * 128**2


def test_digits_hardly_overlap():
    random, found = np.random.RandomState(0), []
    for _ in range(50):
        squares = layout(random, 128, 6)
        found.append(len(squares))
        for i, (top, left, side) in enumerate(squares):
            assert 0 <= top <= 128 - side and 0 <= left <= 128 - side
            for other_top, other_left, other_side in squares[:i]:
                pixels = np.zeros((128, 128), int)
                pixels[top : top + side, left : left + side] += 1
                pixels[other_top : other_top + other_side, other_left : other_left + other_side] += 1
                assert (pixels == 2).sum() <= OVERLAP * min(side, other_side) ** 2
    assert max(found) == 6


def test_scene_depends_only_on_seed_split_and_number():
    first, more, other = digit_scenes(3, 2, 1, 1), digit_scenes(3, 4, 2, 1), digit_scenes(4, 2, 1, 1)
    for name, rows in first.items():
        for row, same in zip(rows, more[name], strict=False):
            assert row["image"].tobytes() == same["image"].tobytes() and row["objects"] == same["objects"]
        assert rows[0]["image"].tobytes() != other[name][0]["image"].tobytes()
    images = [row["image"].tobytes() for rows in more.values() for row in rows]
    assert len(set(images)) == len(images) == 7
    assert digit_scenes(train=1, validation=0, test=0, size=64)["train"][0]["image"].size == (64, 64)


def test_splits_share_no_digit(monkeypatch):
    def one_class_a_split(seed, size):
        splits = digits(seed, size=size)
        marked = {
            name: {"image": rows["image"][:9], "label": [k] * 9} for k, (name, rows) in enumerate(splits.items())
        }
        return DatasetDict({name: Dataset.from_dict(rows, splits["train"].features) for name, rows in marked.items()})

    monkeypatch.setattr(module, "digits", one_class_a_split)
    for k, rows in enumerate(digit_scenes(train=6, validation=6, test=6).values()):
        assert {o["category"] for row in rows for o in row["objects"]} == {k}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": -1}, "train must be at least 0, got -1"),
        ({"size": 31}, "size must be at least 32, got 31"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        digit_scenes(**options)


def test_larger_number_of_scenes_extends_the_smaller(monkeypatch):
    monkeypatch.setitem(DIGIT_SCENES, "digit-scenes", 2)
    monkeypatch.setitem(DIGIT_SCENES, "digit-scenes-large", 4)
    monkeypatch.setattr(module.digit_scenes, "__defaults__", (0, 2, 1, 1, 64))
    few, many = (load_splits(name) for name in DIGIT_SCENES)
    assert few["train"][:] == many["train"].select(range(2))[:] and len(many["train"]) == 4
    assert many["test"][:] == few["test"][:]
    assert panoptic_categories("digit-scenes-large") == CATEGORIES


def test_they_are_generated_once_in_a_process(monkeypatch):
    monkeypatch.setitem(DIGIT_SCENES, "digit-scenes", 3)
    monkeypatch.setattr(module.digit_scenes, "__defaults__", (0, 2, 1, 1, 64))
    first, second = (load_splits("digit-scenes") for _ in range(2))
    assert len(first["train"]) == 3 and first["train"] is second["train"]
    del first["train"]
    assert set(second) == set(load_splits("digit-scenes")) == {"train", "validation", "test"}
