"""Box formats and generalised IoU.

A box is (centre x, centre y, width, height), "cxcywh", or (left, top, right, bottom), "xyxy", normalised by the image
size. Shapes: ... any leading dimensions; N, M boxes.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert cxcywh boxes to xyxy: (..., 4) -> (..., 4)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert xyxy boxes to cxcywh: (..., 4) -> (..., 4)."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the logits of values in [0, 1], with both the value and its complement at least ``eps``: any shape."""
    values = values.clamp(0.0, 1.0)
    return values.clamp_min(eps).log() - (1.0 - values).clamp_min(eps).log()


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the generalised intersection over union (Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1).

    Boxes without area give finite values and gradients: denominators are at least 1e-7.

    Args:
        boxes, others: (..., 4) xyxy, broadcastable; (..., N, 1, 4) and (..., 1, M, 4) give all pairs.

    Returns:
        (...), values in (-1, 1].
    """

    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first).clamp_min(0).prod(dim=-1)

    overlap = area(torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:]))
    hull = area(torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:]))
    union = area(boxes[..., :2], boxes[..., 2:]) + area(others[..., :2], others[..., 2:]) - overlap
    union, hull = union.clamp_min(1e-7), hull.clamp_min(1e-7)
    return overlap / union - (hull - union) / hull
