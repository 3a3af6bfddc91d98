"""Properties of boxes, masks, outlines and sizes for arbitrary inputs (hypothesis)."""

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from hf_tfm.data import run_lengths
from hf_tfm.data.box_checks import BoxFormat, check_boxes
from hf_tfm.data.fields import Entry, as_int64, flag, identity
from hf_tfm.data.files import inside
from hf_tfm.data.scenes import Scene, boxes_like, fitted, scaled

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis, of the extra test")
st = hypothesis.strategies


def given(*drawn):
    """`hypothesis.given` with the same inputs in every run, and without a deadline."""
    settings = hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=60)
    return lambda test: settings(hypothesis.given(*drawn)(test))


SIDES = st.integers(1, 40)
RARE = st.one_of(st.integers(1, 100_000), st.sampled_from([1, 2, 3, 999_999, 1_000_000]))


@st.composite
def masks(draw):
    """(h, w) bool."""
    size = draw(SIDES), draw(SIDES)
    bits = draw(st.binary(min_size=size[0] * size[1], max_size=size[0] * size[1]))
    return (np.frombuffer(bits, np.uint8) < draw(st.integers(0, 256))).reshape(size)


@st.composite
def scenes(draw):
    """Rectangles that are consistent in image, box and mask."""
    height, width = draw(SIDES), draw(SIDES)
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append((left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))))
    found = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(found, boxes, strict=True):
        mask[top:bottom, left:right] = True
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Scene(
        ImageTensor(torch.arange(3 * height * width).remainder(251).byte().view(3, height, width)),
        boxes_like(corners, (height, width)),
        torch.arange(len(boxes)),
        (corners[:, 2:] - corners[:, :2]).prod(dim=1),
        torch.zeros(len(boxes), dtype=torch.bool),
        Mask(found),
    )


def around(mask):
    """The bounding box of a rectangular mask."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@given(masks())
def test_masks_survive_run_length_encoding(mask):
    packed = run_lengths.encode(mask)
    assert run_lengths.run_lengths(packed, *mask.shape) == packed
    np.testing.assert_array_equal(run_lengths.decode([packed], *mask.shape)[0], mask)
    counts = run_lengths.unpacked(packed["counts"])
    assert counts.sum() == mask.size
    assert run_lengths.run_lengths({"size": list(mask.shape), "counts": counts.tolist()}, *mask.shape) == packed


@given(st.one_of(st.text(), st.binary(max_size=50)), SIDES, SIDES)
def test_any_counts_string_is_a_mask_or_an_error(counts, height, width):
    try:
        packed = run_lengths.run_lengths({"size": [height, width], "counts": counts}, height, width)
    except ValueError:
        return
    assert run_lengths.decode([packed], height, width).shape == (1, height, width)


@given(st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=16).filter(lambda p: len(p) % 2 == 0), SIDES, SIDES)
def test_polygons_fill_only_pixels_of_their_box(polygon, height, width):
    mask = run_lengths.decode([run_lengths.run_lengths([polygon], height, width)], height, width)[0]
    rows, columns = np.nonzero(mask)
    for places, corners in ((columns, polygon[::2]), (rows, polygon[1::2])):
        if places.size:
            assert min(corners) - 1.5 <= places.min() and places.max() <= max(corners) + 1.5


@given(st.lists(st.floats(), max_size=12), SIDES, SIDES)
def test_any_polygon_is_a_mask_or_an_error(polygon, height, width):
    try:
        packed = run_lengths.run_lengths([polygon], height, width)
    except ValueError:
        return
    assert run_lengths.decode([packed], height, width).shape == (1, height, width)


@given(scenes(), st.booleans())
def test_flipping_twice_is_the_identity(scene, vertical):
    once = scene.flip(vertical)
    assert [around(mask) for mask in once.object_masks()] == once.boxes.long().tolist()
    twice = once.flip(vertical)
    assert torch.equal(twice.image, scene.image) and torch.equal(twice.boxes, scene.boxes)
    assert torch.equal(twice.object_masks(), scene.object_masks())


@given(scenes(), st.data())
def test_crop_keeps_boxes_masks_and_areas_consistent(scene, data):
    height, width = scene.size
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    part = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    cut = scene.crop(top, left, *part)
    assert cut.size == part and torch.equal(cut.image, scene.image[:, top : top + part[0], left : left + part[1]])
    assert [around(mask) for mask in cut.object_masks()] == cut.boxes.long().tolist()
    torch.testing.assert_close(cut.area, cut.object_masks().flatten(1).sum(dim=1).float())
    seen = scene.object_masks()[:, top : top + part[0], left : left + part[1]].flatten(1).any(dim=1)
    assert cut.labels.tolist() == seen.nonzero().flatten().tolist()


@given(scenes(), st.integers(1, 4), st.integers(1, 4))
def test_integer_upsampling_and_back_is_the_identity(scene, down, right):
    hypothesis.assume(scene.size != (1, 1))  # torch 2.14 cannot resize a contiguous image to a single pixel
    height, width = scene.size
    large = scene.resize(height * down, width * right)
    assert [around(mask) for mask in large.object_masks()] == large.boxes.long().tolist()
    back = large.resize(height, width)
    torch.testing.assert_close(back.boxes, scene.boxes)
    torch.testing.assert_close(back.area, scene.area)
    assert torch.equal(back.object_masks(), scene.object_masks())


@given(RARE, RARE, st.integers(1, 1333), st.integers(0, 2000))
def test_sizes_are_between_one_pixel_and_the_limit(height, width, shortest, more):
    longest = shortest + more
    (found,) = scaled(np.array([[height, width]]), shortest, longest).tolist()
    # An image with the right shortest side is unchanged; rounding may have cut its longest side to the limit.
    assert min(found) >= 1 and (max(found) <= longest or max(found) * (min(found) - 0.5) <= longest * min(found))
    canvas = (shortest, longest)
    assert all(1 <= side <= limit for side, limit in zip(fitted((height, width), canvas), canvas, strict=True))


@given(
    st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6), SIDES, SIDES, st.data()
)
def test_checked_boxes_are_in_their_image_or_dropped(boxes, height, width, data):
    stated = BoxFormat(data.draw(st.sampled_from(["xywh", "xyxy", "cxcywh"])), data.draw(st.booleans()))
    sizes = np.tile([[height, width]], (len(boxes), 1))
    with np.errstate(all="ignore"):
        xywh, keep, report = check_boxes(np.array(boxes), sizes, np.arange(len(boxes)), len(boxes), stated)
    kept = xywh[keep]
    assert report.kept == len(kept) and np.isfinite(kept).all()
    assert (kept >= 0).all() and (kept[:, 2:] > 0).all()
    assert (kept[:, :2] + kept[:, 2:] <= np.array([width, height]) * (1 + 1e-9)).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_any_field_value_is_converted_or_refused_by_name(value):
    entry = Entry({"key": value}, "file.json", "entry 7")
    kinds = {"identity": str, "integer": int, "number": float, "text": str, "flag": bool, "box": (list, type(None))}
    for name, kind in kinds.items():
        try:
            assert isinstance(getattr(entry, name)("key"), kind)
        except ValueError as error:
            assert str(error).startswith('file.json, entry 7: "key" ') and "\n" not in str(error)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_ids_as_numbers_and_text_are_equal(number):
    assert identity(number) == identity(str(number)) == str(number) and as_int64(str(number)) == number
    assert flag(number) == {0: False, 1: True}.get(number)


@given(st.lists(st.sampled_from(["..", ".", "a", "b.jpg", "", "~", "..\\..", "a\\b", "/etc", "C:"]), max_size=6))
def test_no_path_leaves_the_folder(parts):
    try:
        path = inside("/data/set", "/".join(parts), "file.json", "/data/set/train")
    except ValueError:
        return
    assert path.startswith("/data/set/") and ".." not in path.split("/")
