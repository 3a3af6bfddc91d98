"""Box operations against torchvision, and cases in which torchvision has no result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import largest_difference
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from hf_tfm.models.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes (count, 4) as xyxy in [0, 1], at least 0.01 on each side."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    first, last = corners.min(dim=1).values, corners.max(dim=1).values
    return torch.cat([first, last + 0.01], dim=1)


def test_box_format_conversion():
    boxes = random_boxes(50, 0)
    centred = xyxy_to_cxcywh(boxes)
    assert largest_difference(centred, box_convert(boxes, "xyxy", "cxcywh")) < 1e-6
    assert largest_difference(cxcywh_to_xyxy(centred), box_convert(centred, "cxcywh", "xyxy")) < 1e-6
    assert largest_difference(cxcywh_to_xyxy(centred.view(5, 10, 4)), boxes.view(5, 10, 4)) < 1e-6
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])


def test_pairwise_generalized_iou():
    boxes, others = random_boxes(40, 1), random_boxes(30, 2)
    found, expected = generalized_iou(boxes[:, None], others[None]), generalized_box_iou(boxes, others)
    assert found.shape == (40, 30) and largest_difference(found, expected) < 1e-5
    assert (expected < 0).any() and (expected > 0.3).any(), "boxes apart and boxes that overlap"
    assert largest_difference(generalized_iou(boxes[:30], others), expected[:30].diagonal()) < 1e-5


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5], 1.0),  # identical
        ([0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75], 0.25),  # one inside the other: plain IoU
        ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], 0.0),  # side by side: no empty space in the hull
        ([0.0, 0.0, 0.1, 0.1], [0.9, 0.9, 1.0, 1.0], -0.98),  # 0.02 of the hull is covered
        ([0.0, 0.0, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6], 0.04 / 0.28 - 0.08 / 0.36),
    ],
)
def test_generalized_iou_by_hand(box, other, expected):
    box, other = torch.tensor(box), torch.tensor(other)
    assert generalized_iou(box, other).item() == pytest.approx(expected, abs=1e-6)
    assert generalized_iou(other, box).item() == pytest.approx(expected, abs=1e-6)


def test_generalized_iou_gradients():
    found = []
    for function in (
        lambda a, b: generalized_iou(a[:, None], b[None]),
        generalized_box_iou,
    ):
        boxes, others = (random_boxes(20, seed, torch.float64).requires_grad_() for seed in (3, 4))
        function(boxes, others).square().sum().backward()
        found.append(torch.cat([boxes.grad, others.grad]))
    assert found[1].abs().max() > 0.1 and largest_difference(*found) < 1e-9
    pair = [random_boxes(6, seed, torch.float64).requires_grad_() for seed in (5, 6)]
    assert torch.autograd.gradcheck(generalized_iou, pair)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 0.0),  # the same point; NaN in torchvision
        ([0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.8, 0.8], -1.0),  # two points
        ([0.2, 0.5, 0.8, 0.5], [0.2, 0.5, 0.8, 0.5], 0.0),  # the same line; NaN in torchvision
        ([0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.6, 0.6], 0.0),  # a point inside a box
        ([0.6, 0.6, 0.4, 0.4], [0.4, 0.4, 0.6, 0.6], None),  # inverted corners; an error in torchvision
    ],
)
def test_boxes_without_area(box, other, expected):
    box, other = (torch.tensor(corners, requires_grad=True) for corners in (box, other))
    value = generalized_iou(box, other)
    value.backward()
    assert value.isfinite() and box.grad.isfinite().all() and other.grad.isfinite().all()
    assert -1.0 <= value <= 1.0 and (expected is None or value.item() == pytest.approx(expected, abs=1e-5))


def test_generalized_iou_range():
    """Also for boxes with almost no area and with arbitrary corners."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 2000, 4, generator=generator) * 10.0 ** -torch.randint(
        0, 6, (2, 2000, 1), generator=generator
    )
    values = generalized_iou(*boxes)
    assert values.isfinite().all() and values.min() >= -1.0 and values.max() <= 1.0 + 1e-6


shares = st.floats(0, 1, width=32)
box_lists = st.lists(st.tuples(shares, shares, shares, shares), min_size=1, max_size=8)


def ordered(boxes: list[tuple]) -> Tensor:
    """Any four numbers as a box xyxy (n, 4), some without area."""
    corners = torch.tensor(boxes, dtype=torch.float64).view(-1, 2, 2)
    return torch.cat([corners.min(dim=1).values, corners.max(dim=1).values], dim=1)


@settings(deadline=None)
@given(box_lists)
def test_conversions_are_inverse(boxes):
    boxes = ordered(boxes)
    assert largest_difference(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes) < 1e-12
    centred = xyxy_to_cxcywh(boxes)
    assert (centred[:, 2:] >= 0).all() and largest_difference(xyxy_to_cxcywh(cxcywh_to_xyxy(centred)), centred) < 1e-12


@settings(deadline=None)
@given(box_lists, st.floats(0.1, 10), st.tuples(shares, shares))
def test_iou_properties_of_any_boxes(boxes, scale, shift):
    """Finite, in [-1, 1], symmetric, translation-invariant, and 1 for a box with area and itself."""
    boxes = ordered(boxes)
    found = generalized_iou(boxes[:, None], boxes[None])
    assert found.isfinite().all() and (found >= -1 - 1e-9).all() and (found <= 1 + 1e-9).all()
    assert torch.equal(found, found.T)
    large = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) > 1e-3  # smaller ones feel the epsilon of 1e-7
    moved = boxes[large] * scale + torch.tensor([*shift, *shift], dtype=torch.float64)
    pairs = generalized_iou(moved[:, None], moved[None])
    if len(moved):
        assert largest_difference(pairs, found[large][:, large]) < 1e-4
        assert largest_difference(pairs.diagonal(), torch.ones(len(moved), dtype=torch.float64)) < 1e-9
