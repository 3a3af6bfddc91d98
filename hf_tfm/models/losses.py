"""Losses of all heads: a sum over items, divided by the number of items.

    logits, labels -> sum of losses of labelled items -> / items

An item is a token, a sequence, an image or, for regression and multi-label classification, one number.
``num_items_in_batch`` is the number of items of a whole optimizer step; with it the losses and gradients of
micro-batches and ranks add up to those of the step computed at once. By default it is the number of items of the
batch. In every head `IGNORE_INDEX` marks an item without a label; a batch without labels has a loss of 0.

The arguments are those of transformers' loss functions (`transformers.loss.loss_utils`), and `model.loss_function` can
be replaced in the same way.

Shapes: B sequences or images; T tokens; C = config.num_labels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cross_entropy import IGNORE_INDEX
from .input_checks import require_elements, require_numbers, require_range, require_tensor

Items = int | float | Tensor


def per_item(total: Tensor, here: Items, num_items_in_batch: Items | None = None) -> Tensor:
    """Divide a sum of losses by the number of items; return 0, with zero gradients, if there are none.

    Args:
        here: number of items of this batch.
        num_items_in_batch: number of items of the whole step; default: those of this batch.
    """
    items = here if num_items_in_batch is None else num_items_in_batch
    if not isinstance(items, Tensor):
        return total / (items or 1)
    items = items.to(total.device)
    return total / items.masked_fill(items == 0, 1)


def labelled(labels: Tensor) -> Tensor:
    """Return a bool mask of the labels that are not `IGNORE_INDEX`, in their shape."""
    return labels != IGNORE_INDEX


def require_labels(
    labels: Tensor, vocab_size: int, shape: tuple[int, ...] | None = None, name: str = "labels"
) -> None:
    """Raise if token labels (B, T) are empty, have a wrong shape or, on a CPU, are not in the vocabulary.

    Raises:
        TypeError, ValueError: with the value and the limit.
    """
    require_tensor(name, labels, shape)
    require_elements(name, labels)
    require_range(name, labels, vocab_size, "vocab_size", ignore=True)


def class_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Items | None = None,
    name: str = "labels",
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of logits (n, C) and labels (n,), in float32.

    Args:
        name: name of the labels argument, for errors.
        weights: (n,) weights of the losses; with them the weighted sum is returned, without division.

    Raises:
        TypeError, ValueError: the number of labels differs from the rows of logits, labels are not integers, or, on a
            CPU, a label is not in [0, C).
    """
    require_tensor(name, labels)
    if labels.is_floating_point():
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.numel() != logits.shape[0]:
        raise ValueError(f"{name} must have {logits.shape[0]} elements, got shape {tuple(labels.shape)}")
    labels = labels.reshape(-1).to(logits.device, torch.int64)
    require_range(name, labels, logits.shape[1], "number of classes", ignore=True)
    reduction = "sum" if weights is None else "none"
    loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return per_item(loss, labelled(labels).sum(), num_items_in_batch) if weights is None else (loss * weights).sum()


def soft_label_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Items | None = None) -> Tensor:
    """Compute the cross-entropy with target probabilities, as produced by mixup.

    Args:
        logits, labels: (B, C).
        num_items_in_batch: number of entries of the labels, C per image, as counted by Trainer.
    """
    require_tensor("labels", labels, tuple(logits.shape))
    require_numbers("labels", labels, 0.0, 1.0)
    labels = labels.to(logits.device).float()
    known = labelled(labels)
    total = -(labels * nn.functional.log_softmax(logits.float(), dim=-1)).where(known, 0.0).sum()
    return per_item(total, known.sum(), num_items_in_batch) * logits.shape[-1]


def number_loss(kind: str, logits: Tensor, labels: Tensor, num_items_in_batch: Items | None = None) -> Tensor:
    """Compute the mean over all numbers of the squared error ("regression") or binary cross-entropy (otherwise).

    Args:
        logits: (B, C).
        labels: (B, C), or (B,) if C is 1.

    Raises:
        TypeError, ValueError: labels have a wrong shape or, on a CPU, are not finite or, for binary cross-entropy, not
            in [0, 1].
    """
    require_tensor("labels", labels)
    if labels.numel() != logits.numel() or labels.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape)} for problem_type={kind}, got {tuple(labels.shape)}"
        )
    labels = labels.view(logits.shape).to(logits.device).float()
    if kind == "regression":
        require_numbers("labels", labels)
    else:
        require_numbers("labels", labels, 0.0, 1.0)
    known = labelled(labels)
    target, logits = labels.where(known, 0.0), logits.float()
    if kind == "regression":
        each = (logits - target).square()
    else:
        each = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return per_item(each.where(known, 0.0).sum(), known.sum(), num_items_in_batch)


def sequence_loss(
    labels: Tensor, logits: Tensor, config: Any, num_items_in_batch: Items | None = None, **kwargs
) -> Tensor:
    """Compute the loss of a sequence or image classifier according to ``config.problem_type``.

    If unset it is inferred as in transformers and written to the configuration: "regression" for one class,
    "single_label_classification" for integer labels, otherwise "multi_label_classification".

    Args:
        labels: (B,) classes, or (B, C) probabilities, for "single_label_classification"; (B, C) in [0, 1] for
            "multi_label_classification"; (B,) or (B, C) numbers for "regression".
        logits: (B, C).

    Raises:
        TypeError, ValueError: labels have a wrong shape or type or, on a CPU, values out of range.
    """
    require_tensor("labels", labels)
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    if config.problem_type != "single_label_classification":
        return number_loss(config.problem_type, logits, labels, num_items_in_batch)
    if labels.is_floating_point():
        return soft_label_loss(logits, labels, num_items_in_batch)
    return class_loss(logits, labels, num_items_in_batch)


def token_loss(
    logits: Tensor, labels: Tensor, config: Any, num_items_in_batch: Items | None = None, **kwargs
) -> Tensor:
    """Compute the cross-entropy of a token classifier: logits (B, T, C), labels (B, T).

    Raises:
        TypeError, ValueError: see `class_loss`.
    """
    require_tensor("labels", labels, tuple(logits.shape[:-1]))
    return class_loss(logits.flatten(0, -2), labels, num_items_in_batch)


def choice_loss(
    labels: Tensor, logits: Tensor, config: Any, num_items_in_batch: Items | None = None, **kwargs
) -> Tensor:
    """Compute the cross-entropy of a multiple-choice model: logits (B, n), correct choices (B,).

    Raises:
        TypeError, ValueError: see `class_loss`.
    """
    return class_loss(logits, labels, num_items_in_batch)


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    num_items_in_batch: Items | None = None,
    **kwargs,
) -> Tensor:
    """Compute the mean of the cross-entropies of an answer's start and end positions.

    Args:
        start_logits, end_logits: (B, T).
        start_positions, end_positions: (B,); positions of T or more (the answer was truncated) and `IGNORE_INDEX` are
            ignored.
        num_items_in_batch: number of answers.

    Raises:
        TypeError, ValueError: the number of positions differs from the number of texts, or, on a CPU, a position is
            negative.
    """
    total, length = 0.0, start_logits.shape[1]
    for name, logits, positions in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        require_tensor(name, positions)
        positions = positions.masked_fill(positions >= length, IGNORE_INDEX)
        total = total + class_loss(logits, positions, num_items_in_batch, name) / 2
    return total


def weights_of_rows(labels: Tensor, num_items_in_batch: Items) -> Tensor:
    """Return each row's share (B,) of the labelled tokens (B, T) of a step.

    These are the weights of a loss term with one item per row when only the tokens of the step are counted. Over all
    micro-batches of a step they sum to 1.
    """
    return per_item(labelled(labels).sum(dim=1).float(), 0, num_items_in_batch)
