"""Bipartite matching of predictions and objects: matching cost and minimum-cost assignment
(Carion et al. 2020, arXiv:2005.12872, section 3.1).

    predictions of all layers and images, padded objects -> cost (L, B, Q, M) -> host -> query of each object (L, B, M)

Shapes: L decoder layers; B images; Q object queries; M maximum number of objects per image, with padding; C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_scipy_available, logging

from .boxes import cxcywh_to_xyxy, generalized_iou
from .input_checks import ROUNDING, readable, require_tensor

logger = logging.get_logger(__name__)

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
        f"labels[{image}]['boxes'] must be (centre x, centre y, width, height) in shares of the image, in [0, 1], got "
        f"({box})"
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
def matching_cost(
    logits: Tensor, boxes: Tensor, objects: Objects, class_cost: float, bbox_cost: float, giou_cost: float
) -> Tensor:
    """Compute the cost of matching each query to each object: ``-p(class) + L1 + (-GIoU)``, weighted (section 3.1).

    Args:
        logits: (L, B, Q, C + 1).
        boxes: (L, B, Q, 4) cxcywh.
        class_cost, bbox_cost, giou_cost: weights of the terms.

    Returns:
        (L, B, Q, M) float32; undefined for padding.
    """
    classes = objects.classes[None, :, None].expand(*logits.shape[:3], -1)  # (L, B, Q, M)
    cost = logits.float().softmax(-1).gather(-1, classes).mul_(-class_cost)
    ours, theirs = boxes.float()[:, :, :, None], objects.boxes[None, :, None]
    cost += bbox_cost * (ours - theirs).abs().sum(-1)
    cost -= giou_cost * generalized_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs))
    return cost


def highest_cost(config: Any) -> float:
    """Return an upper bound on the cost of boxes in [0, 1]: an L1 distance of 4, a GIoU of -1, a probability of 0."""
    return 4.0 * config.bbox_cost + config.giou_cost + 1.0


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
                    f"labels[{image}]['boxes'][{number}] must be (centre x, centre y, width, height) in shares of the "
                    "image, in [0, 1]: its distance to every prediction is not finite or above 4"
                )


def assign(cost: Tensor, counts: list[int], limit: float = np.inf) -> np.ndarray:
    """Assign queries to objects at minimum cost, for every layer and image (equation 1).

    The costs are copied to the host once. Costs that are not finite are treated as very high and reported.

    Args:
        cost: (L, B, Q, M).
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
    host = cost.cpu().numpy()
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


def hungarian_match(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], config: Any) -> Matching:
    """Match the predictions of all layers to the objects of a batch.

    Args:
        logits: (L, B, Q, C + 1).
        boxes: (L, B, Q, 4) cxcywh.
        labels: one dict per image with ``class_labels`` (n,) int64 and ``boxes`` (n, 4) cxcywh in [0, 1].
        config: has ``num_labels`` and the weights of the cost.

    Raises:
        ValueError: the number of labels differs from the number of images, or labels are invalid, see `pad_objects`.
    """
    if not isinstance(labels, Sequence):
        raise TypeError(f"labels must be a list of dictionaries, one for each image, got {type(labels).__name__}")
    if len(labels) != logits.shape[1]:
        raise ValueError(f"labels must be of {logits.shape[1]} images, got {len(labels)}")
    objects = pad_objects(labels, config.num_labels, logits.device)
    cost = matching_cost(logits, boxes, objects, config.class_cost, config.bbox_cost, config.giou_cost)
    queries = assign(cost, objects.counts, highest_cost(config))
    return Matching(objects, torch.from_numpy(queries).to(logits.device, non_blocking=True), queries)


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
