"""The losses of all heads: a sum over items, divided by their number.

    logits, labels -> sum of losses of labelled items -> / items

An item is a token, a sequence, an image or, where numbers are predicted, one number. ``num_items_in_batch`` is the
number of items of a whole optimizer step; with it the losses, and gradients, of micro-batches and ranks add up to
those of the step computed at once. By default it is the number of items of the batch. `IGNORE_INDEX` marks an item
without a label in every head; a batch without labels has a loss of 0.

The arguments are those of transformers' loss functions (`transformers.loss.loss_utils`), and `model.loss_function` can
be replaced as there.

Shapes: B sequences or images; T tokens; C = config.num_labels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cross_entropy import IGNORE_INDEX
from .input_checks import require_elements, require_numbers, require_range, require_tensor

Items = int | float | Tensor


def per_item(total: Tensor, here: Items, num_items_in_batch: Items | None = None) -> Tensor:
    """A sum of losses divided by the number of items: 0, with gradients of 0, where there are none.

    Args:
        here: items of this batch.
        num_items_in_batch: items of the whole step; default, those of this batch.
    """
    items = here if num_items_in_batch is None else num_items_in_batch
    if not isinstance(items, Tensor):
        return total / (items or 1)
    items = items.to(total.device)
    return total / items.masked_fill(items == 0, 1)


def labelled(labels: Tensor) -> Tensor:
    """Which labels are there: bool of their shape."""
    return labels != IGNORE_INDEX


def require_labels(
    labels: Tensor, vocab_size: int, shape: tuple[int, ...] | None = None, name: str = "labels"
) -> None:
    """Refuse labels of tokens (B, T) that are empty, of another shape or, on a CPU, not in the vocabulary.

    Raises:
        TypeError, ValueError: with the value and its limit.
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
    """Cross-entropy of logits (n, C) and labels (n,), in float32.

    Args:
        name: of the argument, for errors.
        weights: (n,), of the losses in a sum that is not divided by anything.

    Raises:
        TypeError, ValueError: there are more or fewer labels than rows of logits, labels are no integers, or, on a
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
    """Cross-entropy against probabilities, as mixup makes them.

    Args:
        logits, labels: (B, C).
        num_items_in_batch: entries of the labels, C an image, as Trainer counts them.
    """
    require_tensor("labels", labels, tuple(logits.shape))
    require_numbers("labels", labels, 0.0, 1.0)
    labels = labels.to(logits.device).float()
    known = labelled(labels)
    total = -(labels * nn.functional.log_softmax(logits.float(), dim=-1)).where(known, 0.0).sum()
    return per_item(total, known.sum(), num_items_in_batch) * logits.shape[-1]


def number_loss(kind: str, logits: Tensor, labels: Tensor, num_items_in_batch: Items | None = None) -> Tensor:
    """Mean over all numbers of the squared error ("regression") or of the binary cross-entropy (else).

    Args:
        logits: (B, C).
        labels: (B, C), or (B,) where C is 1.

    Raises:
        TypeError, ValueError: labels have another shape or, on a CPU, are not finite or, of classes, not in [0, 1].
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
    """The loss of a classifier of sequences or images, by ``config.problem_type``.

    Without one it is, as in transformers, "regression" for one class, "single_label_classification" for integers and
    "multi_label_classification" else, and is then written into the configuration.

    Args:
        labels: (B,) classes; (B, C) probabilities with "single_label_classification"; (B, C) of 0 to 1 with
            "multi_label_classification"; (B,) or (B, C) numbers with "regression".
        logits: (B, C).

    Raises:
        TypeError, ValueError: labels have another shape or type or, on a CPU, values out of range.
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
    """Cross-entropy of a classifier of tokens: logits (B, T, C), labels (B, T).

    Raises:
        TypeError, ValueError: see `class_loss`.
    """
    require_tensor("labels", labels, tuple(logits.shape[:-1]))
    return class_loss(logits.flatten(0, -2), labels, num_items_in_batch)


def choice_loss(
    labels: Tensor, logits: Tensor, config: Any, num_items_in_batch: Items | None = None, **kwargs
) -> Tensor:
    """Cross-entropy of the right one (B,) among n choices: logits (B, n).

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
    """Mean of the cross-entropies of an answer's start and end.

    Args:
        start_logits, end_logits: (B, T).
        start_positions, end_positions: (B,); none from T on, as where a long text was cut, or with `IGNORE_INDEX`.
        num_items_in_batch: answers.

    Raises:
        TypeError, ValueError: there are more or fewer positions than texts, or, on a CPU, a position is negative.
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
    """Each row's share (B,) of the labelled tokens (B, T) of a step: the weights of a term with one item a row, where
    only the tokens of the step are counted. The rows of all micro-batches of a step together weigh 1."""
    return per_item(labelled(labels).sum(dim=1).float(), 0, num_items_in_batch)
