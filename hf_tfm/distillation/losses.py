"""The terms that a distillation loss is made of, each a sum over its items.

    what a student gives, what a teacher gives -> their distance, item by item -> weighted sum

Shapes: n rows with a target; C classes, or tokens of a vocabulary; B samples; T tokens of each; D features; H heads.
``weights`` (B, T) says how much every token counts: 1 for a token and 0 for padding in texts; of images, whose item is
the image, 1 / T. Scores are -inf where a query may not look. Whatever the dtype of the signals, sums are in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from ..models.matching import Objects, assign, match, matching_cost
from ..models.set_loss import box_losses, term_weights


def require_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32.

    Raises:
        ValueError: their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have equal shapes, got {(*student.shape,)} and {(*teacher.shape,)}"
        )
    return student.float(), teacher.float()


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` of logits (n, C), summed over rows.

    Hinton et al. 2015 (arXiv:1503.02531), section 2; L_ce of DistilBERT (arXiv:1910.01108, section 2). T^2 keeps the
    size of gradients. TinyBERT (arXiv:1909.10351, equation 10) writes the cross-entropy, with the same gradients but
    for T^2. One output, of regression, has no softmax: of its logits it is `logit_loss`, which T^2 leaves as it is.
    """
    if student.shape[-1] == 1:
        return logit_loss(student, teacher)
    student, teacher = require_shape(student, teacher)
    ours, theirs = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def soft_target_top_loss(
    student: Tensor, top: Tensor, places: Tensor, rest: Tensor, temperature: float = 1.0
) -> Tensor:
    """`soft_target_loss` from the k largest logits of a teacher and the sum of the others, as one class more.

    The k probabilities are then the teacher's own. Normalising the k anew would make them larger, and the student
    would learn to be surer than its teacher of what is in the list. Summing classes up makes no divergence larger.

    Args:
        student: (n, C) logits.
        top: (n, k) logits; places: (n, k) int64, their classes.
        rest: (n,) log of the sum of ``exp(z / T)`` over all other classes, of this same temperature; k < C.
    """
    student, top = student.float() / temperature, top.float() / temperature
    others = student.scatter(1, places, -torch.inf).logsumexp(1, keepdim=True)
    ours = log_softmax(torch.cat([student.gather(1, places), others], 1), 1)
    theirs = log_softmax(torch.cat([top, rest.float()[:, None]], 1), 1)
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def hard_target_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits (n, C) with the teacher's best class as label, summed over rows.

    DeiT (Touvron et al. 2021, arXiv:2012.12877), equation 3; there with weight 1/2, as the true labels.
    """
    student, teacher = require_shape(student, teacher)
    return cross_entropy(student, teacher.argmax(-1), reduction="sum")


def hard_target_top_loss(student: Tensor, top: Tensor, places: Tensor, rest: Tensor) -> Tensor:
    """`hard_target_loss` from the k largest logits of a teacher, best first; see `soft_target_top_loss`."""
    return cross_entropy(student.float(), places[:, 0], reduction="sum")


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of logits (n, C), the mean over classes, summed over rows (Ba and Caruana 2014, arXiv:1312.6184,
    section 2.1). For regression, where one output has no softmax, the only one that fits."""
    student, teacher = require_shape(student, teacher)
    return (student - teacher).square().mean(-1).sum()


def hidden_state_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Squared error of states (B, T, D), the mean over features, summed over tokens (TinyBERT, equation 8).

    The student's stand behind the projection W_h already. Padding is left out; the authors' code counts it too.
    """
    student, teacher = require_shape(student, teacher)
    return ((student - teacher).square().mean(-1) * weights).sum()


def embedding_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """`hidden_state_loss` of what the first layer reads, with a projection of its own, W_e (TinyBERT, equation 9)."""
    return hidden_state_loss(student, teacher, weights)


def cosine_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """``1 - cos`` of states (B, T, D), summed over tokens (L_cos of DistilBERT, section 2)."""
    student, teacher = require_shape(student, teacher)
    return ((1.0 - cosine_similarity(student, teacher, dim=-1)) * weights).sum()


def attention_score_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Squared error of scores (B, H, T, T) before the softmax, the mean over heads and over the keys that a query may
    see, summed over queries (TinyBERT, equation 7, and its note that raw scores are better than probabilities).

    Padding is left out, as key and as query. The authors' code sets the scores of masked keys to 0 on both sides, so
    that they add nothing, but divides by their number, and counts the queries of padding as well.
    """
    student, teacher = require_shape(student, teacher)
    error = student - teacher
    seen = error.detach().abs() < torch.inf  # not where either is -inf; and fewer passes than isfinite of both
    error = torch.where(seen, error, 0.0).square()
    return ((error.sum(-1) / seen.sum(-1, dtype=torch.int32).clamp_min(1)).mean(1) * weights).sum()


def attention_probability_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """``KL(a_t || a_s)`` of the probabilities that scores (B, H, T, T) make, the mean over heads, summed over queries
    (MiniLM, Wang et al. 2020, arXiv:2002.10957, equation 5)."""
    student, teacher = require_shape(student, teacher)
    seen = teacher.isfinite() & student.isfinite()
    # The lowest number and not -inf: a query of padding may see nothing at all, and its weight of 0 does not undo NaN.
    ours, theirs = (log_softmax(x.where(seen, torch.finfo(x.dtype).min), -1) for x in (student, teacher))
    divergence = kl_div(ours, theirs, reduction="none", log_target=True).where(seen, 0.0).sum(-1)
    return (divergence.mean(1) * weights).sum()


def feature_map_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Squared error of maps (B, D, h, w), the mean over channels, summed over cells (FitNets, Romero et al. 2015,
    arXiv:1412.6550, equation 3); weights (B, h w), row by row."""
    student, teacher = require_shape(student, teacher)
    return ((student - teacher).square().mean(1).flatten(1) * weights).sum()


def query_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels: list[dict[str, Tensor]],
    config: Any,
    temperature: float = 1.0,
) -> Tensor:
    """What the teacher's queries say of the objects, as targets of the student's, of all its decoder layers.

    The teacher's query that is matched to an object gives the target, its classes' probabilities and its box; a
    student's query is matched to it, anew in every layer (DETRDistill, Chang et al. 2023, arXiv:2211.10156, section
    3.2, positive targets). Summed over objects: `soft_target_loss` of classes, "no object" among them, and L1 and GIoU
    of boxes with the weights of the model's own loss. What is nobody's, the labels teach better.

    Args:
        student: logits (L, B, Q, C + 1) and boxes (L, B, Q, 4) cxcywh of L layers.
        teacher: logits (B, R, C + 1) and boxes (B, R, 4); R need not be Q.
        labels: see `match`.
        config: has ``num_labels`` and the weights of cost and loss.
    """
    (logits, boxes), (their_logits, their_boxes) = student, (part.float() for part in teacher)
    R, Q = their_boxes.shape[1], boxes.shape[2]
    (chosen,), objects = match(their_logits[None], their_boxes[None], labels, config)[1::-1]  # (B, M)
    places = chosen.clamp_max(R - 1)[..., None]
    targets = Objects(objects.classes, their_boxes.gather(1, places.expand(-1, -1, 4)), objects.counts)
    cost = matching_cost(logits, boxes, targets, config.class_cost, config.bbox_cost, config.giou_cost)
    queries = torch.from_numpy(assign(cost, objects.counts)).to(chosen)  # (L, B, M)
    queries = queries.where(chosen < R, Q)  # an object that none of the teacher's queries is left for
    classes = their_logits.gather(1, places.expand(-1, -1, their_logits.shape[-1])).expand(len(logits), -1, -1, -1)
    own = logits.gather(2, queries.clamp_max(Q - 1)[..., None].expand_as(classes))
    matched = queries < Q
    distance, overlap = box_losses(boxes.float(), queries, targets)
    weight = term_weights(config)
    box = weight["loss_bbox"] * distance.sum() + weight["loss_giou"] * overlap.sum()
    return soft_target_loss(own[matched], classes[matched], temperature) + box
