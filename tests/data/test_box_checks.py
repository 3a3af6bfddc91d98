"""Boxes: wrong formats are detected and the suggested fix works; invalid boxes are clipped or dropped and counted."""

import logging

import numpy as np
import pytest

from hf_tfm.data.box_checks import FORMATS, BoxFormat, check_boxes

ALL = [BoxFormat(corners, relative) for corners in FORMATS for relative in (False, True)]


def boxes_and_sizes(count=60, seed=0, height=240, width=320):
    """Boxes anywhere in their images: left, top, right, bottom, and sizes (count, 2)."""
    random = np.random.default_rng(seed)
    ends = np.sort(random.random((count, 2, 2)), axis=1)
    ends[:, 1] = np.maximum(ends[:, 1], ends[:, 0] + 0.02).clip(0, 1)
    ends[:, 0] = np.minimum(ends[:, 0], ends[:, 1] - 0.01)
    sizes = np.tile([height, width], (count, 1))
    return (ends * sizes[:, None, ::-1]).reshape(count, 4), sizes


def stored(corners, sizes, kind):
    """Corners in pixels converted to another format: the inverse of `BoxFormat.to_corners`."""
    first, second = corners[:, :2], corners[:, 2:]
    if kind.corners == "cxcywh":
        first, second = (first + second) / 2, second - first
    elif kind.corners == "xywh":
        second = second - first
    scale = sizes[:, ::-1] if kind.relative else 1
    return np.concatenate([first / scale, second / scale], axis=1)


def check(boxes, sizes, kind=None):
    return check_boxes(boxes, sizes, np.arange(len(boxes)) + 100, len(boxes), kind or BoxFormat())


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_every_format_is_read(kind):
    corners, sizes = boxes_and_sizes()
    xywh, keep, report = check(stored(corners, sizes, kind), sizes, kind)
    np.testing.assert_allclose(xywh, np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1), atol=1e-9)
    assert keep.all() and report.kept == 60 and report.suspected is None and not list(report.lines())
    report.require_format()


@pytest.mark.parametrize("stated", ALL, ids=str)
@pytest.mark.parametrize("true", ALL, ids=str)
def test_wrong_format_is_detected_and_the_right_one_suggested(true, stated):
    corners, sizes = boxes_and_sizes()
    boxes = stored(corners, sizes, true)
    report = check(boxes, sizes, stated)[2]
    assert report.suspected == (None if true == stated else true)
    if true != stated:
        remedy = f'give box_format="{true.corners}" and relative_boxes={true.relative}'
        with pytest.raises(ValueError, match=f"read as {stated}, .*{remedy}"):
            report.require_format()
        check(boxes, sizes, report.suspected)[2].require_format()  # the suggested fix


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bad", [0, 3])
def test_valid_boxes_are_accepted(seed, bad):
    """Also if a few are outside or empty, or if all are small and near the center or a corner."""
    corners, sizes = boxes_and_sizes(seed=seed)
    xywh = stored(corners, sizes, BoxFormat())
    xywh[:bad] += [200, 0, 100, 0]
    for boxes in (xywh, xywh[:4], [[150, 110, 10, 8]] * 20, [[0, 0, 12, 9]] * 20, [[0, 0, 320, 240]] * 20):
        boxes = np.asarray(boxes, float)
        assert check(boxes, np.tile([240, 320], (len(boxes), 1)))[2].suspected is None


def test_invalid_boxes_are_clipped_or_dropped_and_counted(caplog):
    boxes = np.array(
        [
            [10, 10, 20, 20],
            [-5, 10, 20, 20],  # clipped on the left
            [300, 230, 50, 50],  # clipped on the right and at the bottom
            [0, 0, 320.4, 240.2],  # a rounding error, clipped silently
            [10, 10, 0, 20],  # zero width
            [10, 10, 20, -3],  # negative height
            [400, 10, 20, 20],  # outside
            [np.nan, 10, 20, 20],
            [10, np.inf, 20, 20],
        ],
        float,
    )
    xywh, keep, report = check(boxes, np.tile([240, 320], (9, 1)))
    assert keep.tolist() == [True] * 4 + [False] * 5
    assert xywh[keep].tolist() == [[10, 10, 20, 20], [0, 10, 15, 20], [300, 230, 20, 10], [0, 0, 320, 240]]
    assert (report.boxes, report.kept) == (9, 4)
    with caplog.at_level(logging.WARNING):
        report.log()
    assert caplog.messages == [
        "2 of 9 boxes clipped: reach out of the image (first in image 101)",
        "2 of 9 boxes left out: not finite (first in image 107)",
        "2 of 9 boxes left out: width or height not above 0 (first in image 104)",
        "1 of 9 boxes left out: outside the image (first in image 106)",
    ]


def test_unknown_sizes_and_empty_boxes():
    xywh, keep, report = check(np.array([[5.0, 5, 1000, 10]]), np.zeros((1, 2), int))
    assert keep.all() and xywh.tolist() == [[5, 5, 1000, 10]] and not list(report.lines())
    xywh, keep, report = check(np.zeros((0, 4)), np.zeros((0, 2), int))
    assert xywh.shape == (0, 4) and report.kept == 0 and report.suspected is None


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match='box_format must be one of xywh, xyxy, cxcywh, got "yxyx"'):
        BoxFormat("yxyx")
