"""Set prediction loss over matched pairs of queries and objects (Carion et al. 2020, arXiv:2005.12872, section 3.1,
equation 2; masks: section 4.4).

    logits, boxes of all layers, labels -> assignment -> {term: sum over items of each layer}

Every term is a sum, so that a training loop can divide by the items of a whole step: class terms by the total weight
of the queries (`query_weight`), box and mask terms by the number of objects.

Shapes: L decoder layers; B images; Q object queries; M maximum number of objects per image; C classes; h, w size of
mask logits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .boxes import cxcywh_to_xyxy, generalized_iou
from .losses import per_item
from .matching import Matching, Objects


def query_weight(counts: list[int], num_queries: int, eos_coefficient: float) -> float:
    """Return the total weight of queries in the class loss: 1 if matched to an object, else ``eos_coefficient``."""
    matched = sum(min(count, num_queries) for count in counts)
    return matched + eos_coefficient * (num_queries * len(counts) - matched)


def class_loss(logits: Tensor, queries: Tensor, objects: Objects, eos_coefficient: float) -> Tensor:
    """Compute the weighted cross-entropy of the queries, summed per layer: (L,).

    Args:
        logits: (L, B, Q, C + 1), the last class being "no object".
        queries: (L, B, M), see `assign`.
    """
    L, B, Q, classes = logits.shape
    nothing = classes - 1
    target = objects.classes.new_full((L, B, Q + 1), nothing)  # the last slot collects objects without a query
    target = target.scatter(2, queries, objects.classes.expand(L, -1, -1))[:, :, :Q]
    loss = nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(L, -1)
    return (loss * torch.where(target == nothing, eos_coefficient, 1.0).view(L, -1)).sum(dim=1)


def box_losses(boxes: Tensor, queries: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """Sum the L1 distance and 1 - GIoU over matched pairs: (L,) each.

    Args:
        boxes: (L, B, Q, 4) cxcywh.
        queries: (L, B, M), see `assign`.
    """
    Q = boxes.shape[2]
    matched = queries < Q
    found = boxes.gather(2, queries.clamp_max(Q - 1)[..., None].expand(-1, -1, -1, 4))  # (L, B, M, 4)
    distance = (found - objects.boxes).abs().sum(-1)
    overlap = generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(objects.boxes))
    return (distance * matched).sum((1, 2)), ((1.0 - overlap) * matched).sum((1, 2))


@torch.no_grad()
def cardinality_error(logits: Tensor, counts: list[int]) -> Tensor:
    """Sum the absolute error of the number of predicted objects over images, for logging (no gradient): (L,)."""
    seen = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # (L, B)
    return (seen - torch.tensor(counts, device=seen.device)).abs().float().sum(1)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of masks, averaged over pixels (Lin et al. 2017, arXiv:1708.02002, equation 5): (n,).

    Args:
        logits, targets: (n, pixels); targets 0 or 1.
    """
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = (logits.sigmoid() - targets).abs()  # 1 - p of the true class
    return (loss * wrong**gamma * (alpha * targets + (1 - alpha) * (1 - targets))).mean(-1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - the Dice coefficient of masks, smoothed by 1 (Milletari et al. 2016, arXiv:1606.04797): (n,).

    1 is added to both the numerator and the denominator.

    Args:
        logits, targets: (n, pixels); targets 0 or 1.
    """
    found = logits.sigmoid()
    return 1.0 - (2.0 * (found * targets).sum(-1) + 1.0) / (found.sum(-1) + targets.sum(-1) + 1.0)


def target_masks(
    labels: list[dict[str, Tensor]], size: tuple[int, int], counts: list[int], device: torch.device
) -> Tensor:
    """Concatenate the masks of the objects of all images, padded at the bottom and right: (n, H, W) float32.

    Args:
        size: H and W of the images.
        counts: number of objects of each image.

    Raises:
        ValueError: an image has no masks, its number of masks differs from its number of objects, or its masks are
            larger than the images.
    """
    padded = []
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        if "masks" not in label:
            raise ValueError(f"labels[{i}] must have masks, got {', '.join(label) or 'nothing'}")
        shape = tuple(label["masks"].shape)
        if len(shape) != 3 or shape[0] != count or shape[1] > size[0] or shape[2] > size[1]:
            raise ValueError(
                f"labels[{i}]['masks'] must have shape ({count}, H, W), one for each object and at most {size[0]} x "
                f"{size[1]}, got {shape}"
            )
        masks = label["masks"].to(device, torch.float32)
        padded.append(nn.functional.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2])))
    return torch.cat(padded)


def mask_losses(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Sum the focal and Dice losses over masks, upsampling the logits to the target size: {term: (1,)}.

    Args:
        logits: (n, h, w).
        targets: (n, H, W).
    """
    size = targets.shape[-2:]
    enlarged = nn.functional.interpolate(logits.float()[:, None], size=size, mode="bilinear", align_corners=False)
    enlarged, targets = enlarged.flatten(1), targets.flatten(1)
    return {
        "loss_mask": focal_loss(enlarged, targets).sum()[None],
        "loss_dice": dice_loss(enlarged, targets).sum()[None],
    }


def set_losses(logits: Tensor, boxes: Tensor, matching: Matching, config: Any) -> dict[str, Tensor]:
    """Sum every loss term except the mask losses for each layer, in float32: {term: (L,)}.

    Args:
        logits: (L, B, Q, C + 1).
        boxes: (L, B, Q, 4) cxcywh.
        config: has ``eos_coefficient``.
    """
    logits, objects = logits.float(), matching.objects
    distance, overlap = box_losses(boxes.float(), matching.queries, objects)
    return {
        "loss_ce": class_loss(logits, matching.queries, objects, config.eos_coefficient),
        "loss_bbox": distance,
        "loss_giou": overlap,
        "cardinality_error": cardinality_error(logits, objects.counts),
    }


def normalizers(counts: list[int], num_queries: int, eos_coefficient: float) -> dict[str, float]:
    """Return the divisors of the sums of `set_losses` and `mask_losses` from the object counts: {term: items}.

    For boxes and masks it is the number of objects, which may be 0. Divisors of micro-batches add up to those of the
    step.
    """
    terms = dict.fromkeys(("loss_bbox", "loss_giou", "loss_mask", "loss_dice"), float(sum(counts)))
    return {
        "loss_ce": query_weight(counts, num_queries, eos_coefficient),
        "cardinality_error": float(len(counts)),
        **terms,
    }


def term_weights(config: Any) -> dict[str, float]:
    """Return the weight of every loss term (equation 2)."""
    return {
        "loss_ce": 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask": config.mask_loss_coefficient,
        "loss_dice": config.dice_loss_coefficient,
    }


def by_layer(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name terms (L,) as in transformers' DETR: plain names for the last layer, a layer index suffix for others."""
    named = {}
    for name, values in terms.items():
        named[name] = values[-1]
        named |= {f"{name}_{i}": value for i, value in enumerate(values[:-1])}
    return named


def total_loss(
    terms: dict[str, Tensor], matching: Matching, config: Any, items: Mapping[str, float | Tensor] | None
) -> dict[str, Any]:
    """Weight and normalise the terms of `set_losses` and `mask_losses`.

    Args:
        items: divisor of each term; default: `normalizers` of this batch.

    Returns:
        ``loss``, the weighted sum of all terms and layers, each divided by its items; ``loss_dict``, every term of
        every layer, divided by its items and unweighted, see `by_layer`; ``loss_sums``, {term: weighted sum over its
        items and all layers}, not divided, for a training loop that divides by the items of a whole step.

    Raises:
        ValueError: ``items`` lacks a term.
    """
    here = normalizers(matching.objects.counts, config.num_queries, config.eos_coefficient)
    if items is not None and not (isinstance(items, Mapping) and terms.keys() <= items.keys()):
        given = ", ".join(items) if isinstance(items, Mapping) else items
        raise ValueError(f"num_items_in_batch must hold a number for each of {', '.join(terms)}, got {given}")
    items = here if items is None else items
    sums = {name: weight * terms[name].sum() for name, weight in term_weights(config).items() if name in terms}
    return {
        "loss": sum(per_item(value, items[name]) for name, value in sums.items()),
        "loss_dict": by_layer({name: per_item(values, items[name]) for name, values in terms.items()}),
        "loss_sums": sums,
    }
