"""Distillation losses, each summed over its items (rows, tokens or objects).

    student signal, teacher signal -> loss per item -> weighted sum

Shapes: n rows with a target; C classes or vocabulary size; B samples; T tokens per sample; D features; H heads.
``weights`` (B, T) weights each token: for texts 1 for a token and 0 for padding; for images 1 / T, because an item is
an image. Scores are -inf at masked positions. Sums are computed in float32, whatever the dtype of the signals.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    kl_div,
    log_softmax,
)

from ..models.class_scoring import scoring_name
from ..models.set_loss import Objects, assign, box_losses, hungarian_match, matching_cost, term_weights


def require_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes match, and return both tensors in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have equal shapes, got {(*student.shape,)} and {(*teacher.shape,)}"
        )
    return student.float(), teacher.float()


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` of logits (n, C), summed over rows.

    Hinton et al. 2015 (arXiv:1503.02531), section 2; L_ce of DistilBERT (arXiv:1910.01108, section 2). T^2 keeps the
    gradient magnitude independent of T. TinyBERT (arXiv:1909.10351, equation 10) uses the cross-entropy, which has the
    same gradients except for the factor T^2. With a single output (regression) there is no softmax: the loss is then
    `logit_loss`, to which T^2 does not apply.
    """
    if student.shape[-1] == 1:
        return logit_loss(student, teacher)
    student, teacher = require_shape(student, teacher)
    ours, theirs = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def soft_target_top_loss(
    student: Tensor, top: Tensor, indices: Tensor, rest: Tensor, temperature: float = 1.0
) -> Tensor:
    """Compute `soft_target_loss` from the teacher's k largest logits, with all other classes merged into one.

    The k probabilities are then exactly the teacher's. Renormalising over the k classes would inflate them and train
    the student to be overconfident. Merging classes never increases a divergence.

    Args:
        student: (n, C) logits.
        top: (n, k) logits; indices: (n, k) int64, their classes.
        rest: (n,) log of the sum of ``exp(z / T)`` over all other classes, at this same temperature; k < C.
    """
    student, top = student.float() / temperature, top.float() / temperature
    others = student.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True)
    ours = log_softmax(torch.cat([student.gather(1, indices), others], 1), 1)
    theirs = log_softmax(torch.cat([top, rest.float()[:, None]], 1), 1)
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def hard_target_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cross-entropy of logits (n, C) with the teacher's argmax as label, summed over rows.

    DeiT (Touvron et al. 2021, arXiv:2012.12877), equation 3, where it and the true-label loss have weight 1/2 each.
    """
    student, teacher = require_shape(student, teacher)
    return cross_entropy(student, teacher.argmax(-1), reduction="sum")


def hard_target_top_loss(student: Tensor, top: Tensor, indices: Tensor, rest: Tensor) -> Tensor:
    """Compute `hard_target_loss` from the teacher's k largest logits, in descending order; see
    `soft_target_top_loss`."""
    return cross_entropy(student.float(), indices[:, 0], reduction="sum")


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared error of logits (n, C), averaged over classes and summed over rows (Ba and Caruana 2014,
    arXiv:1312.6184, section 2.1). The only loss on logits that suits regression, where a single output has no
    softmax."""
    student, teacher = require_shape(student, teacher)
    return (student - teacher).square().mean(-1).sum()


def hidden_state_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute the squared error of hidden states (B, T, D), averaged over features and summed over tokens (TinyBERT,
    equation 8).

    The student's states are already projected with W_h. Padding is excluded; the authors' code includes it.
    """
    student, teacher = require_shape(student, teacher)
    return ((student - teacher).square().mean(-1) * weights).sum()


def embedding_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute `hidden_state_loss` of the input of the first layer, with a separate projection W_e (TinyBERT, equation
    9)."""
    return hidden_state_loss(student, teacher, weights)


def cosine_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute ``1 - cos`` of hidden states (B, T, D), summed over tokens (L_cos of DistilBERT, section 2)."""
    student, teacher = require_shape(student, teacher)
    return ((1.0 - cosine_similarity(student, teacher, dim=-1)) * weights).sum()


def attention_score_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute the squared error of scores (B, H, T, T) before the softmax, averaged over heads and visible keys and
    summed over queries (TinyBERT, equation 7, which finds raw scores better than probabilities).

    Padding is excluded as key and as query. The authors' code sets the scores of masked keys to 0 on both sides, so
    they contribute no error, but it divides by the number of all keys and includes padding queries.
    """
    student, teacher = require_shape(student, teacher)
    error = student - teacher
    seen = error.detach().abs() < torch.inf  # False where either score is -inf; cheaper than isfinite of both
    error = torch.where(seen, error, 0.0).square()
    return ((error.sum(-1) / seen.sum(-1, dtype=torch.int32).clamp_min(1)).mean(1) * weights).sum()


def attention_probability_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute ``KL(a_t || a_s)`` of the attention probabilities of scores (B, H, T, T), averaged over heads and summed
    over queries (MiniLM, Wang et al. 2020, arXiv:2002.10957, equation 5)."""
    student, teacher = require_shape(student, teacher)
    seen = teacher.isfinite() & student.isfinite()
    # The lowest finite number, not -inf: a padding query may be fully masked, and a weight of 0 does not cancel NaN.
    ours, theirs = (log_softmax(x.where(seen, torch.finfo(x.dtype).min), -1) for x in (student, teacher))
    divergence = kl_div(ours, theirs, reduction="none", log_target=True).where(seen, 0.0).sum(-1)
    return (divergence.mean(1) * weights).sum()


def feature_map_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Compute the squared error of feature maps (B, D, h, w), averaged over channels and summed over cells (FitNets,
    Romero et al. 2015, arXiv:1412.6550, equation 3); weights (B, h w) in row-major order."""
    student, teacher = require_shape(student, teacher)
    return ((student - teacher).square().mean(1).flatten(1) * weights).sum()


def soft_binary_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute ``T^2 KL`` of independent probabilities ``sigmoid(z / T)`` of logits (n, C), summed over rows and
    classes: `soft_target_loss` for models that score each class on its own."""
    student, teacher = require_shape(student, teacher)
    theirs = teacher / temperature
    target = theirs.sigmoid()
    entropy = binary_cross_entropy_with_logits(theirs, target, reduction="sum")
    cross = binary_cross_entropy_with_logits(student / temperature, target, reduction="sum")
    return (cross - entropy) * temperature**2


def query_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels: list[dict[str, Tensor]],
    config: Any,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the loss of all student decoder layers against the teacher's predictions for the labelled objects.

    The teacher query matched to an object provides the target: its class probabilities and its box. Student queries
    are matched to these targets separately in every layer (DETRDistill, Chang et al. 2023, arXiv:2211.10156, section
    3.2, positive targets). The result is the sum over objects of the class loss, see `SOFT_CLASS_LOSSES`, and of the
    L1 and GIoU box losses, with the weights of the model's own loss. Unmatched queries are left to the labels.

    Args:
        student: logits (L, B, Q, outputs) and boxes (L, B, Q, 4) cxcywh of L layers; there are C + 1 or C outputs, see
            `ClassScoring`.
        teacher: logits (B, R, outputs) and boxes (B, R, 4); R may differ from Q.
        labels: see `match_sets`.
        config: provides ``num_labels``, the scoring of the classes and the weights of matching cost and loss.
    """
    (logits, boxes), (their_logits, their_boxes) = student, (part.float() for part in teacher)
    R, Q = their_boxes.shape[1], boxes.shape[2]
    (chosen,), objects = hungarian_match(their_logits[None], their_boxes[None], labels, config)[1::-1]  # (B, M)
    indices = chosen.clamp_max(R - 1)[..., None]
    targets = Objects(objects.classes, their_boxes.gather(1, indices.expand(-1, -1, 4)), objects.counts)
    cost = matching_cost(logits, boxes, targets, config)
    queries = torch.from_numpy(assign(cost, objects.counts)).to(chosen)  # (L, B, M)
    queries = queries.where(chosen < R, Q)  # no student query for objects without a teacher query
    classes = their_logits.gather(1, indices.expand(-1, -1, their_logits.shape[-1])).expand(len(logits), -1, -1, -1)
    own = logits.gather(2, queries.clamp_max(Q - 1)[..., None].expand_as(classes))
    matched = queries < Q
    distance, overlap = box_losses(boxes.float(), queries, targets)
    weight = term_weights(config)
    box = weight["loss_bbox"] * distance.sum() + weight["loss_giou"] * overlap.sum()
    class_loss = SOFT_CLASS_LOSSES[scoring_name(config, own.shape[-1])](own[matched], classes[matched], temperature)
    return weight["loss_ce"] * class_loss + box


# Losses of the classes of matched queries, by the scoring of the models; with "softmax" including "no object".
SOFT_CLASS_LOSSES = {"softmax": soft_target_loss, "sigmoid": soft_binary_loss}
