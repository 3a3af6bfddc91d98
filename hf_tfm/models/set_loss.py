"""Set prediction loss: bipartite matching of queries and objects, and the loss over matched pairs (Carion et al. 2020,
arXiv:2005.12872, section 3.1, equations 1 and 2; masks: section 4.4).

    predictions of all layers and images, padded objects -> cost (L, B, Q, M) -> host -> query of each object (L, B, M)
    logits, boxes of all layers, labels -> assignment -> {term: sum over items of each layer}

Every term is a sum, so that a training loop can divide by the items of a whole step: class terms by the items of the
model's scoring (see `ClassScoring`), box and mask terms by the number of objects.

Shapes: L decoder layers; B images; Q object queries; M maximum number of objects per image, with padding; C classes;
"outputs", the number of logits of a query; h, w size of mask logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_scipy_available, logging

from .boxes import cxcywh_to_xyxy, generalized_iou
from .class_scoring import ClassScoring, scoring_of
from .input_checks import ROUNDING, readable, require_tensor
from .losses import per_item

logger = logging.get_logger(__name__)

# Fields of configurations with the weights of the terms.
COEFFICIENTS = {
    "loss_ce": "class_loss_coefficient",
    "loss_bbox": "bbox_loss_coefficient",
    "loss_giou": "giou_loss_coefficient",
    "loss_mask": "mask_loss_coefficient",
    "loss_dice": "dice_loss_coefficient",
}
NEVER = 1e6  # replaces costs that are not finite; far above any other cost


class Objects(NamedTuple):
    """Objects of a batch, padded to the maximum number per image.

    Args:
        classes: (B, M) int64.
        boxes: (B, M, 4) cxcywh in [0, 1].
        counts: number of objects of each image, on the host.
    """

    classes: Tensor
    boxes: Tensor
    counts: list[int]


def require_values(classes: Tensor, boxes: Tensor, num_labels: int) -> None:
    """Raise if, on a CPU, a class (B, M) is outside [0, ``num_labels``) or a box (B, M, 4) outside [0, 1].

    Raises:
        ValueError: with the image and the first such class or box.
    """
    if not readable(classes) or not classes.numel():
        return
    outside = (classes < 0) | (classes >= num_labels)
    wrong = ~((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(dim=2)  # also true for NaN
    if not (outside | wrong).any():
        return
    if outside.any():
        image, number = outside.nonzero()[0].tolist()
        raise ValueError(
            f"labels[{image}]['class_labels'] must be in [0, {num_labels}), the model's num_labels, got "
            f"{classes[image, number].item()}"
        )
    image, number = wrong.nonzero()[0].tolist()
    box = ", ".join(f"{value:g}" for value in boxes[image, number].tolist())
    raise ValueError(
        f"labels[{image}]['boxes'] must be (centre x, centre y, width, height) in fractions of the image "
        f"size, in [0, 1], got ({box})"
    )


def pad_objects(labels: list[dict[str, Tensor]], num_labels: int, device: torch.device) -> Objects:
    """Batch the labels of the images, ``class_labels`` (n,) and ``boxes`` (n, 4) each.

    Raises:
        TypeError: the labels of an image are not a dictionary of tensors.
        ValueError: an image has no classes or boxes, its boxes are not (n, 4) for its n classes, or, if labels can be
            read without synchronising a GPU, a class does not exist or a box is not in [0, 1].
    """
    for i, label in enumerate(labels):
        if not isinstance(label, Mapping):
            raise TypeError(f"labels[{i}] must be a dictionary of tensors, got {type(label).__name__}")
        if not {"class_labels", "boxes"} <= label.keys():
            raise ValueError(f"labels[{i}] must have class_labels and boxes, got {', '.join(label) or 'nothing'}")
        classes, boxes = label["class_labels"], label["boxes"]
        for name, values, dims in (("class_labels", classes, 1), ("boxes", boxes, 2)):
            require_tensor(f"labels[{i}]['{name}']", values)
            if values.dim() != dims:
                raise ValueError(
                    f"labels[{i}]['{name}'] must have {dims} dimension{'s' * (dims > 1)}, got shape "
                    f"{tuple(values.shape)}"
                )
        if classes.is_floating_point():
            raise ValueError(f"labels[{i}]['class_labels'] must be integers, got {classes.dtype}")
        if boxes.shape != (len(classes), 4):
            raise ValueError(
                f"labels[{i}]['boxes'] must have shape {(len(classes), 4)}, one box for each of its class_labels, got "
                f"{tuple(boxes.shape)}"
            )
    classes = pad_sequence([label["class_labels"] for label in labels], batch_first=True).to(device, torch.int64)
    boxes = pad_sequence([label["boxes"] for label in labels], batch_first=True).to(device, torch.float32)
    require_values(classes, boxes, num_labels)
    return Objects(classes, boxes, [len(label["class_labels"]) for label in labels])


@torch.no_grad()
def matching_cost(logits: Tensor, boxes: Tensor, objects: Objects, config: Any) -> Tensor:
    """Compute the cost of matching each query to each object: class + L1 + (-GIoU), weighted (section 3.1).

    Args:
        logits: (L, B, Q, outputs).
        boxes: (L, B, Q, 4) cxcywh.
        config: has the scoring of the classes and the weights of the cost.

    Returns:
        (L, B, Q, M) float32; undefined for padding.
    """
    cost = scoring_of(config).cost(logits.float(), objects.classes).mul_(config.class_cost)  # (L, B, Q, M)
    ours, theirs = boxes.float()[:, :, :, None], objects.boxes[None, :, None]
    cost += config.bbox_cost * (ours - theirs).abs().sum(-1)
    cost -= config.giou_cost * generalized_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs))
    return cost


def highest_cost(config: Any) -> float:
    """Return an upper bound on the cost of boxes in [0, 1]: an L1 distance of 4, a GIoU of -1, the worst class."""
    worst = config.class_cost * scoring_of(config).highest_cost
    return 4.0 * config.bbox_cost + config.giou_cost + worst + 1.0


def require_costs(cost: np.ndarray, counts: list[int], limit: float) -> None:
    """Raise if an object has no query with a valid cost although other objects do: its label is wrong.

    On a GPU labels cannot be read without synchronising; the costs are on the host at this point anyway.

    Raises:
        ValueError: with the image and the object.
    """
    possible = (cost < limit).any(axis=(0, 2))  # (B, M)
    predicted = np.isfinite(cost).any()
    for image, count in enumerate(counts):
        for number in range(count):
            if predicted and not possible[image, number]:
                raise ValueError(
                    f"labels[{image}]['boxes'][{number}] must be (centre x, centre y, width, height) in fractions "
                    "of the image size, in [0, 1]: its distance to every prediction is not finite or above 4"
                )


def assign(cost: Tensor, counts: list[int], limit: float = np.inf) -> np.ndarray:
    """Assign queries to objects at minimum cost, for every layer and image (equation 1).

    The costs are copied to the host once. Costs that are not finite are treated as very high and reported.

    Args:
        cost: (L, B, Q, M), on any device.
        counts: number of objects of each image.
        limit: upper bound on the cost of boxes in [0, 1], see `highest_cost`.

    Returns:
        (L, B, M) int64: the query of each object; Q for padding, and for objects left unmatched because an image has
        more objects than there are queries.

    Raises:
        ImportError: scipy is not installed.
        ValueError: an object has no query with a finite cost below ``limit`` while another object does: its box in the
            labels is out of range.
    """
    if not is_scipy_available():
        raise ImportError("matching predictions to objects needs scipy: pip install scipy")
    if is_scipy_available():  # local import; this condition is required by transformers' import check
        from scipy.optimize import linear_sum_assignment

    L, _, Q, M = cost.shape
    host = (cost if cost.device.type == "cpu" else cost.cpu()).numpy()
    queries = np.full((L, len(counts), M), Q)
    if host.size and not host.max() < limit:  # also true for NaN
        require_costs(host, counts, limit)
    if not np.isfinite(host).all():
        real = np.concatenate([host[:, i, :, :count].ravel() for i, count in enumerate(counts)])
        if bad := np.count_nonzero(~np.isfinite(real)):
            logger.warning(f"{bad} of {real.size} matching costs are not finite: logits or boxes of the model are not")
        host = np.nan_to_num(host, nan=NEVER, posinf=NEVER, neginf=NEVER)
    for layer in range(L):
        for image, count in enumerate(counts):
            chosen, matched = linear_sum_assignment(host[layer, image, :, :count])
            queries[layer, image, matched] = chosen
    return queries


def on_host(costs: list[Tensor]) -> list[Tensor]:
    """Copy tensors to the host in a single transfer."""
    if len(costs) == 1:
        return [costs[0].cpu()]
    parts = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
    return [part.view_as(cost) for part, cost in zip(parts, costs, strict=True)]


class Matching(NamedTuple):
    """Assignment of queries to objects.

    Args:
        objects: objects of the batch.
        queries: (L, B, M) int64, see `assign`, on the device.
        on_host: the same on the host.
    """

    objects: Objects
    queries: Tensor
    on_host: np.ndarray


class Predictions(NamedTuple):
    """Predictions that are matched to the objects of a batch.

    Args:
        logits: (L, B, Q, outputs), with groups (G L, B, Q, outputs), all layers of the first group first.
        boxes: the same, (L, B, Q, 4) cxcywh.
        one_class: match regardless of the class: all objects have class 0, as for the proposals of an encoder.
        groups: number G of sets of queries, each matched on its own; their losses are averaged.
    """

    logits: Tensor
    boxes: Tensor
    one_class: bool = False
    groups: int = 1


def hungarian_match(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], config: Any) -> Matching:
    """Match the predictions of all layers to the objects of a batch.

    Args:
        logits: (L, B, Q, outputs).
        boxes: (L, B, Q, 4) cxcywh.
        labels, config: see `match_sets`.
    """
    return match_sets([Predictions(logits, boxes)], labels, config)[0]


def match_sets(sets: Sequence[Predictions], labels: list[dict[str, Tensor]], config: Any) -> list[Matching]:
    """Match several sets of predictions to the objects of a batch; the host waits for the device once.

    Args:
        labels: one dict per image with ``class_labels`` (n,) int64 and ``boxes`` (n, 4) cxcywh in [0, 1].
        config: has ``num_labels``, the scoring of the classes and the weights of the cost. If
            its ``finite_predictions`` is true, predictions that are infinite or NaN are refused.

    Raises:
        ValueError: the number of labels differs from the number of images, labels are invalid, see `pad_objects`, or
            see `require_predictions`.
    """
    if not isinstance(labels, Sequence):
        raise TypeError(f"labels must be a list of dictionaries, one for each image, got {type(labels).__name__}")
    images, device = sets[0].logits.shape[1], sets[0].logits.device
    if len(labels) != images:
        raise ValueError(f"labels must have an entry for each of {images} images, got {len(labels)}")
    known = pad_objects(labels, config.num_labels, device)
    objects = [known._replace(classes=torch.zeros_like(known.classes)) if one.one_class else known for one in sets]
    costs = on_host(
        [matching_cost(one.logits, one.boxes, own, config) for one, own in zip(sets, objects, strict=True)]
    )
    found = []
    for one, own, cost in zip(sets, objects, costs, strict=True):
        if getattr(config, "finite_predictions", False) and not np.isfinite(cost.numpy()).all():
            require_predictions(one, labels)
        queries = assign(cost, own.counts, highest_cost(config))
        found.append(Matching(own, torch.from_numpy(queries).to(device, non_blocking=True), queries))
    return found


def require_predictions(predictions: Predictions, labels: list[dict[str, Tensor]]) -> None:
    """Raise if predictions are infinite or NaN, naming the image; reads them from the device.

    Raises:
        ValueError: with the first such image, by the ``image_id`` of its labels if they have one.
    """
    for name, values in (("boxes", predictions.boxes), ("class logits", predictions.logits)):
        wrong = (~values.isfinite()).flatten(2).any(-1)  # (L, B)
        if wrong.any():
            image = int(wrong.any(0).nonzero()[0])
            index = int(wrong[:, image].nonzero()[0]) % (len(wrong) // predictions.groups)
            layer = "encoder" if predictions.one_class else f"decoder layer {index}"
            number = labels[image].get("image_id")
            known = "" if number is None else f"image {int(number)}, "
            raise ValueError(
                f"the {name} predicted for {known}labels[{image}], are not finite ({layer}): training has diverged, "
                "or the image has values that are not finite; lower learning_rate or max_grad_norm"
            )


def matched_pairs(matching: Matching, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, query and object index of every matched object of the last layer: (n,) each."""
    device, counts = matching.queries.device, matching.objects.counts
    images, queries, objects = [], [], []
    first = 0
    for image, count in enumerate(counts):
        for i, query in enumerate(matching.on_host[-1, image, :count].tolist()):
            if query < num_queries:
                images.append(image)
                queries.append(query)
                objects.append(first + i)
        first += count
    pairs = torch.tensor([images, queries, objects], dtype=torch.int64).to(device, non_blocking=True)
    return pairs[0], pairs[1], pairs[2]


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
def cardinality_error(logits: Tensor, counts: list[int], scoring: ClassScoring) -> Tensor:
    """Sum the absolute error of the number of predicted objects over images, for logging (no gradient): (L,)."""
    seen = scoring.detects(logits).sum(-1)  # (L, B)
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
        logits: (L, B, Q, outputs).
        boxes: (L, B, Q, 4) cxcywh.
        config: has the scoring of the classes.
    """
    logits, objects, scoring = logits.float(), matching.objects, scoring_of(config)
    distance, overlap = box_losses(boxes.float(), matching.queries, objects)
    return {
        "loss_ce": scoring.loss(logits, matching.queries, objects.classes),
        "loss_bbox": distance,
        "loss_giou": overlap,
        "cardinality_error": cardinality_error(logits, objects.counts, scoring),
    }


def normalizers(counts: list[int], config: Any) -> dict[str, float]:
    """Return the divisors of the sums of `set_losses` and `mask_losses` from the object counts: {term: items}.

    For boxes and masks it is the number of objects, which may be 0. Divisors of micro-batches add up to those of the
    step.
    """
    terms = dict.fromkeys(("loss_bbox", "loss_giou", "loss_mask", "loss_dice"), float(sum(counts)))
    return {
        "loss_ce": scoring_of(config).items(counts, config.num_queries),
        "cardinality_error": float(len(counts)),
        **terms,
    }


def term_weights(config: Any) -> dict[str, float]:
    """Return the weight of every loss term that the model has (equation 2); of the class loss 1 by default."""
    given = {name: getattr(config, field) for name, field in COEFFICIENTS.items() if hasattr(config, field)}
    return {"loss_ce": 1.0, **given}


def by_layer(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name terms (L,) as in transformers' DETR: plain names for the last layer, a layer index suffix for others."""
    named = {}
    for name, values in terms.items():
        named[name] = values[-1]
        named |= {f"{name}_{i}": value for i, value in enumerate(values[:-1])}
    return named


def detection_losses(
    predictions: Predictions,
    labels: list[dict[str, Tensor]],
    config: Any,
    items: Mapping[str, float | Tensor] | None,
    proposals: Predictions | None = None,
) -> dict[str, Any]:
    """Match predictions to objects and compute all losses of a detector without masks.

    Args:
        predictions: of all decoder layers.
        labels, config: see `match_sets`.
        items: see `total_loss`.
        proposals: of the encoder, for a detector in two stages; their losses add to the same terms.

    Returns:
        See `total_loss`.
    """
    sets = [predictions] if proposals is None else [predictions, proposals]
    matchings = match_sets(sets, labels, config)
    terms = [set_losses(one.logits, one.boxes, own, config) for one, own in zip(sets, matchings, strict=True)]
    if (groups := predictions.groups) > 1:
        terms[0] = {name: values.unflatten(0, (groups, -1)).mean(0) for name, values in terms[0].items()}
    return total_loss(terms[0], matchings[0], config, items, *terms[1:])


def total_loss(
    terms: dict[str, Tensor],
    matching: Matching,
    config: Any,
    items: Mapping[str, float | Tensor] | None,
    of_encoder: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Weight and normalise the terms of `set_losses` and `mask_losses`.

    Args:
        items: divisor of each term; default: `normalizers` of this batch.
        of_encoder: terms of the encoder's proposals, with the same weights and divisors.

    Returns:
        ``loss``, the weighted sum of all terms and layers, each divided by its items; ``loss_dict``, every term of
        every layer, divided by its items and unweighted, see `by_layer`, those of the encoder with the suffix
        "_enc"; ``loss_sums``, {term: weighted sum over its items and all layers}, not divided, for a training loop
        that divides by the items of a whole step.

    Raises:
        ValueError: ``items`` lacks a term.
    """
    here = normalizers(matching.objects.counts, config)
    if items is not None and not (isinstance(items, Mapping) and terms.keys() <= items.keys()):
        given = ", ".join(items) if isinstance(items, Mapping) else items
        raise ValueError(f"num_items_in_batch must hold a number for each of {', '.join(terms)}, got {given}")
    items = here if items is None else items
    first = of_encoder or {}
    totals = {name: values.sum() + first[name].sum() if first else values.sum() for name, values in terms.items()}
    sums = {name: weight * totals[name] for name, weight in term_weights(config).items() if name in terms}
    named = by_layer({name: per_item(values, items[name]) for name, values in terms.items()})
    named |= {f"{name}_enc": per_item(values.sum(), items[name]) for name, values in first.items()}
    return {
        "loss": sum(per_item(value, items[name]) for name, value in sums.items()),
        "loss_dict": named,
        "loss_sums": sums,
    }
