"""Each loss term matches the definition in its paper, summed over its items."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from hf_tfm.distillation import losses
from hf_tfm.models.boxes import cxcywh_to_xyxy, generalized_iou


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_soft_target_is_kl_divergence_at_a_temperature():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(5))
    assert losses.soft_target_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.soft_target_loss(teacher, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_soft_target_gradient_scale_is_independent_of_temperature():
    """The gradient of the plain divergence shrinks with 1 / T^2 (Hinton et al. 2015, section 2)."""
    norms = []
    for temperature in (1.0, 8.0):
        student = (0.1 * random(50, 9)).requires_grad_()
        losses.soft_target_loss(student, 0.1 * random(50, 9, seed=1), temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def largest(teacher, k, temperature):
    top, indices = teacher.topk(k)
    return top, indices, (teacher / temperature).scatter(1, indices, -math.inf).logsumexp(1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_with_rest_equals_full_loss_for_all_but_one_class(temperature):
    student, teacher = random(5, 7), random(5, 7, seed=1)
    found = losses.soft_target_top_loss(student, *largest(teacher, 6, temperature), temperature)
    assert found.item() == pytest.approx(losses.soft_target_loss(student, teacher, temperature).item(), rel=1e-5)


def test_top_k_keeps_the_teacher_probabilities():
    """With fewer classes the loss is lower, but still 0 only if student and teacher agree; renormalizing would
    break that.
    """
    student, teacher = random(5, 50), 2 * random(5, 50, seed=1)
    full = losses.soft_target_loss(student, teacher).item()
    parts = [losses.soft_target_top_loss(student, *largest(teacher, k, 1.0)).item() for k in (4, 16, 40)]
    assert 0 < parts[0] < parts[1] < parts[2] < full
    assert losses.soft_target_top_loss(teacher, *largest(teacher, 4, 1.0)).item() == pytest.approx(0.0, abs=1e-5)
    listed = teacher.log_softmax(1).gather(1, teacher.topk(4).indices)
    renormalised = (listed.softmax(1) * (listed.log_softmax(1) - listed)).sum()
    assert renormalised > 0.5  # the teacher compared with itself


def test_hard_targets_are_the_teacher_argmax():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    expected = cross_entropy(student, teacher.argmax(1), reduction="sum").item()
    assert losses.hard_target_loss(student, teacher).item() == pytest.approx(expected)
    assert losses.hard_target_top_loss(student, *largest(teacher, 3, 1.0)).item() == pytest.approx(expected)


def test_logits_of_a_single_output():
    student, teacher = random(5, 1), random(5, 1, seed=1)
    expected = mse_loss(student, teacher, reduction="sum").item()
    assert losses.logit_loss(student, teacher).item() == pytest.approx(expected)
    for temperature in (1.0, 3.0):  # temperature has no effect without a softmax
        assert losses.soft_target_loss(student, teacher, temperature).item() == pytest.approx(expected)


def real(lengths, size):
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).float()


def test_hidden_states_are_compared_per_token():
    student, teacher = random(2, 5, 8), random(2, 5, 8, seed=1)
    weights = real([5, 3], 5)
    tokens = [(student[b, t], teacher[b, t]) for b, length in ((0, 5), (1, 3)) for t in range(length)]
    squared = sum(mse_loss(s, t).item() for s, t in tokens)
    assert losses.hidden_state_loss(student, teacher, weights).item() == pytest.approx(squared, rel=1e-5)
    assert losses.embedding_loss(student, teacher, weights).item() == pytest.approx(squared, rel=1e-5)
    cosine = sum(1 - (s @ t / s.norm() / t.norm()).item() for s, t in tokens)
    assert losses.cosine_loss(student, teacher, weights).item() == pytest.approx(cosine, rel=1e-5)


def masked_scores(lengths, size, causal=False, seed=0):
    scores = random(len(lengths), 3, size, size, seed=seed)
    seen = real(lengths, size).bool()[:, None, None].expand_as(scores)
    return scores.masked_fill(~(seen.tril() if causal else seen), -math.inf)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_scores_are_compared_at_visible_positions(causal):
    lengths = [5, 3]
    student, teacher = (masked_scores(lengths, 5, causal, seed) for seed in (0, 1))
    student.requires_grad_()
    loss = losses.attention_score_loss(student, teacher, real(lengths, 5))
    expected = 0.0
    for b, length in enumerate(lengths):
        for query in range(length):
            keys = slice(0, query + 1 if causal else length)
            expected += mse_loss(student[b, :, query, keys], teacher[b, :, query, keys]).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad.isfinite().all() and (student.grad[1, :, :, 3:] == 0).all()
    assert (student.grad[1, :, 3:] == 0).all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_probabilities_are_compared_by_divergence(causal):
    lengths = [5, 3]
    student, teacher = (masked_scores(lengths, 5, causal, seed) for seed in (0, 1))
    student.requires_grad_()
    loss = losses.attention_probability_loss(student, teacher, real(lengths, 5))
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    expected = 0.0
    for b, length in enumerate(lengths):
        for query in range(length):
            keys = slice(0, query + 1 if causal else length)
            own, other = p[b, :, query, keys], q[b, :, query, keys]
            expected += (own * (own / other).log()).sum(-1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_fully_masked_query_gives_finite_loss():
    """Left padding of a causal model has no position to attend to."""
    student = masked_scores([4], 4).requires_grad_()
    blind = student.masked_fill(torch.tensor([True, False, False, False])[:, None], -math.inf)
    teacher = blind.detach() + 0.5
    for loss in (losses.attention_score_loss, losses.attention_probability_loss):
        student.grad = None
        value = loss(blind, teacher, torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
        value.backward(retain_graph=True)
        assert value.isfinite() and student.grad.isfinite().all()


def test_feature_maps_are_compared_per_cell():
    student, teacher = random(2, 8, 2, 3), random(2, 8, 2, 3, seed=1)
    weights = torch.tensor([[1 / 6] * 6, [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0]])
    expected = mse_loss(student[0], teacher[0]) + mse_loss(student[1, :, :, :2], teacher[1, :, :, :2])
    assert losses.feature_map_loss(student, teacher, weights).item() == pytest.approx(expected.item(), rel=1e-5)


class Costs:
    num_labels = 4
    class_cost, bbox_cost, giou_cost = 1.0, 5.0, 2.0
    bbox_loss_coefficient, giou_loss_coefficient = 5.0, 2.0
    mask_loss_coefficient = dice_loss_coefficient = 1.0


def detections(layers, queries, seed, images=2):
    logits = 3 * random(layers, images, queries, 5, seed=seed)
    return logits, random(layers, images, queries, 4, seed=seed + 50).sigmoid() * 0.5 + 0.2


def objects(*counts):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "class_labels": torch.randint(4, (count,), generator=generator),
            "boxes": 0.3 + 0.3 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]


def test_query_loss_uses_matched_objects():
    """Checked by hand: each object's matched teacher query is compared with the cheapest student query; one object
    per image.
    """
    logits, boxes = detections(2, 6, seed=0)
    (their_logits,), (their_boxes,) = detections(1, 5, seed=1)
    labels = objects(1, 1)
    expected = 0.0
    for image, label in enumerate(labels):
        kind, box = label["class_labels"][0], label["boxes"]

        def cost(scores, found, target, kind=kind):
            overlap = generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(target))
            return -scores.softmax(-1)[:, kind] + 5 * (found - target).abs().sum(-1) - 2 * overlap

        theirs = cost(their_logits[image], their_boxes[image], box).argmin()
        target = their_boxes[image, theirs][None]
        for layer in range(2):
            ours = cost(logits[layer, image], boxes[layer, image], target).argmin()
            expected += losses.soft_target_loss(logits[layer, image, ours], their_logits[image, theirs], 2.0)
            found = boxes[layer, image, ours][None]
            overlap = generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(target))
            expected += 5 * (found - target).abs().sum() + 2 * (1 - overlap).sum()
    found = losses.query_loss((logits, boxes), (their_logits, their_boxes), labels, Costs, 2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_queries_match_themselves():
    logits, boxes = detections(1, 6, seed=0)
    labels = objects(3, 0)
    same = losses.query_loss((logits, boxes), (logits[0], boxes[0]), labels, Costs)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    moved = losses.query_loss((logits[:, :, shuffled], boxes[:, :, shuffled]), (logits[0], boxes[0]), labels, Costs)
    assert same.item() == pytest.approx(0.0, abs=1e-4) and moved.item() == pytest.approx(0.0, abs=1e-4)


def test_query_loss_with_too_many_or_no_objects():
    logits, boxes = detections(1, 4, seed=0)
    (their_logits,), (their_boxes,) = detections(1, 2, seed=1)
    crowd = losses.query_loss((logits, boxes), (their_logits, their_boxes), objects(5, 1), Costs)
    assert crowd.isfinite() and crowd > 0
    logits.requires_grad_()
    nothing = losses.query_loss((logits, boxes), (their_logits, their_boxes), objects(0, 0), Costs)
    nothing.backward()
    assert nothing.item() == 0.0 and (logits.grad == 0).all()


class SigmoidCosts(Costs):
    """Of a detector without a class for "no object"."""

    class_scoring = "sigmoid"
    class_loss_coefficient = 2
    focal_alpha, focal_gamma = 0.25, 2.0


def test_independent_classes_of_queries():
    """The Kullback-Leibler divergence of every class of every object, on its own, times the square of T."""
    logits, boxes = detections(2, 6, seed=0)
    (their_logits,), (their_boxes,) = detections(1, 8, seed=1)
    labels = objects(2, 1)
    found = losses.query_loss((logits, boxes), (their_logits, their_boxes), labels, SigmoidCosts, 3.0)
    still = losses.query_loss((logits, boxes), (their_logits, their_boxes), labels, SigmoidCosts, 1e6)
    teacher, student = random(4, 5), random(4, 5, seed=1)
    pairs = (torch.distributions.Bernoulli(logits=each / 3.0) for each in (teacher, student))
    expected = 9 * torch.distributions.kl_divergence(*pairs).sum()
    assert losses.soft_binary_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() != pytest.approx(still.item(), rel=1e-3), "the temperature matters"
    same = losses.query_loss((logits[:1], boxes[:1]), (logits[0], boxes[0]), labels, SigmoidCosts)
    assert same.item() == pytest.approx(0.0, abs=1e-4)


def test_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match=r"equal shapes, got \(2, 3\) and \(2, 4\)"):
        losses.soft_target_loss(random(2, 3), random(2, 4))


def test_half_precision_signals_are_summed_in_float32():
    student, teacher = random(300, 7), random(300, 7, seed=1)
    exact = losses.soft_target_loss(student.bfloat16().float(), teacher.bfloat16().float())
    found = losses.soft_target_loss(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-6)
