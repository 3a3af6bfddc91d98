"""Box formats and generalised IoU.

A box is (centre x, centre y, width, height), "cxcywh", or (left, top, right, bottom), "xyxy", normalised by the image
size. Shapes: ... any leading dimensions; N, M boxes.
"""

import torch
from torch import Tensor

NO_LOGIT = -1e4  # the softmax of such a logit beside 0 is exactly 0


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


def detections_as_queries(
    found: list[dict[str, Tensor]], sizes: list[tuple[int, int]], num_labels: int
) -> tuple[Tensor, Tensor]:
    """Convert detections of torchvision to the output of a DETR, from which a softmax makes the same scores again.

    Args:
        found: for each image ``boxes`` (n, 4) xyxy in pixels, ``scores`` (n,) and ``labels`` (n,), counted from 1;
            detections of label 0, "no object", are left out.
        sizes: height and width of each image in pixels.
        num_labels: C.

    Returns:
        Logits (B, Q, C + 1) and boxes (B, Q, 4) cxcywh in [0, 1], Q being the highest number of detections in an
        image, but at least 1; other queries of an image have score 0.
    """
    kept = [one["labels"] > 0 for one in found]
    counts = [int(mask.sum()) for mask in kept]
    boxes = found[0]["boxes"].new_zeros(len(found), max(1, *counts), 4, dtype=torch.float32)
    logits = boxes.new_full((*boxes.shape[:2], num_labels + 1), NO_LOGIT)
    logits[..., -1] = 0.0
    for i, (one, mask, n, (height, width)) in enumerate(zip(found, kept, counts, sizes, strict=True)):
        sides = boxes.new_tensor([width, height, width, height])
        boxes[i, :n] = xyxy_to_cxcywh(one["boxes"][mask].float()) / sides
        scores = one["scores"][mask].float().clamp(0.0, 1.0)
        logits[i, :n, -1] = torch.log1p(-scores).clamp_min(NO_LOGIT)
        logits[i, :n].scatter_(1, one["labels"][mask][:, None] - 1, scores.log().clamp_min(NO_LOGIT)[:, None])
    return logits, boxes
