"""Matching and loss against a slow reference in plain Python, one image and one pair at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny_detr import tiny_detr_config, tiny_labels
from tiny_models import largest_difference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tfm.models import set_loss
from hf_tfm.models.class_scoring import scoring_of
from hf_tfm.models.set_loss import (
    NEVER,
    assign,
    box_losses,
    by_layer,
    cardinality_error,
    dice_loss,
    focal_loss,
    hungarian_match,
    mask_losses,
    matching_cost,
    normalizers,
    pad_objects,
    set_losses,
    target_masks,
    term_weights,
)

CONFIG = tiny_detr_config(class_cost=1.5, bbox_cost=4, giou_cost=2.5, eos_coefficient=0.2)
COUNTS = pytest.mark.parametrize(
    "counts", [(3, 1, 2), (0, 4, 0), (0, 0, 0), (9, 2, 7), (1, 1, 1)], ids=lambda counts: "-".join(map(str, counts))
)


def predictions(images: int = 3, layers: int = 2, queries: int = 7, classes: int = 5, seed: int = 1):
    """Random logits (L, B, Q, C + 1) and boxes (L, B, Q, 4), both with requires_grad."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, images, queries, classes + 1, generator=generator)
    boxes = 0.1 + 0.6 * torch.rand(layers, images, queries, 4, generator=generator)
    return logits.requires_grad_(), boxes.requires_grad_()


def plain_giou(one: list[float], other: list[float]) -> float:
    """GIoU of two boxes cxcywh with area."""
    sides = []
    for axis in (0, 1):
        (a, b), (c, d) = ((box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2) for box in (one, other))
        sides.append((b - a, d - c, max(0.0, min(b, d) - max(a, c)), max(b, d) - min(a, c)))
    first, second, overlap, hull = (x * y for x, y in zip(*sides, strict=True))
    union = first + second - overlap
    return overlap / union - (hull - union) / hull


def plain_cost(logits: Tensor, boxes: Tensor, label: dict[str, Tensor], config) -> np.ndarray:
    """Costs of one image: (Q, n)."""
    cost = np.zeros((len(logits), len(label["boxes"])))
    for query, (scores, box) in enumerate(zip(logits.tolist(), boxes.tolist(), strict=True)):
        total = sum(math.exp(score) for score in scores)
        for i, (name, target) in enumerate(zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True)):
            distance = sum(abs(x - y) for x, y in zip(box, target, strict=True))
            cost[query, i] = (
                -config.class_cost * math.exp(scores[name]) / total
                + config.bbox_cost * distance
                - config.giou_cost * plain_giou(box, target)
            )
    return cost


def plain_losses(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], config) -> dict[str, list[float]]:
    """Sums of every term for every layer."""
    terms = {name: [] for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")}
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        sums = dict.fromkeys(terms, 0.0)
        for scores, found, label in zip(layer_logits, layer_boxes, labels, strict=True):
            pairs = dict(zip(*linear_sum_assignment(plain_cost(scores, found, label, config)), strict=True))
            seen = 0
            for query, row in enumerate(scores.tolist()):
                target = label["class_labels"][pairs[query]].item() if query in pairs else len(row) - 1
                log_probability = row[target] - math.log(sum(math.exp(score) for score in row))
                sums["loss_ce"] -= log_probability * (1.0 if query in pairs else config.eos_coefficient)
                seen += max(row) != row[-1]
            for query, i in pairs.items():
                box, true = found[query].tolist(), label["boxes"][i].tolist()
                sums["loss_bbox"] += sum(abs(x - y) for x, y in zip(box, true, strict=True))
                sums["loss_giou"] += 1 - plain_giou(box, true)
            sums["cardinality_error"] += abs(seen - len(label["boxes"]))
        for name, value in sums.items():
            terms[name].append(value)
    return terms


@COUNTS
def test_cost_and_assignment_of_every_layer_and_image(counts):
    (logits, boxes), labels = predictions(), tiny_labels(counts)
    objects = pad_objects(labels, 5, logits.device)
    assert objects.counts == list(counts) and objects.boxes.shape == (3, max(counts), 4)
    cost = matching_cost(logits, boxes, objects, CONFIG)
    assert cost.shape == (2, 3, 7, max(counts)) and cost.dtype == torch.float32 and not cost.requires_grad
    queries = assign(cost, objects.counts)
    assert queries.shape == (2, 3, max(counts)) and queries.dtype == np.int64
    for layer, image in itertools.product(range(2), range(3)):
        count = counts[image]
        expected = plain_cost(logits[layer, image], boxes[layer, image], labels[image], CONFIG)
        assert cost[layer, image, :, :count].numpy() == pytest.approx(expected, abs=1e-5)
        chosen, places = linear_sum_assignment(expected)
        own = np.full(max(counts), 7)
        own[places] = chosen
        assert queries[layer, image].tolist() == own.tolist()
        assert (queries[layer, image] < 7).sum() == min(count, 7), "no object is left out while there are queries"


def test_assignment_has_the_lowest_cost():
    """Brute force, so that the reference above does not depend on scipy alone."""
    cost = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    queries = assign(cost, [4, 3])
    for layer, (image, count) in itertools.product(range(3), enumerate((4, 3))):
        table = cost[layer, image].tolist()
        best = min(
            itertools.permutations(range(6), count), key=lambda way: sum(table[q][i] for i, q in enumerate(way))
        )
        assert tuple(queries[layer, image, :count]) == best


def test_ties():
    """Each object gets its own query, and the total cost is minimal."""
    queries = assign(torch.zeros(1, 2, 7, 4), [4, 2])
    assert len(set(queries[0, 0])) == 4 and len(set(queries[0, 1, :2])) == 2 and (queries[0, 1, 2:] == 7).all()
    alike = tiny_labels((1,))[0]
    label = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in alike.items()}
    logits, boxes = predictions(1)
    matching = hungarian_match(logits, boxes, [label], CONFIG)
    expected = plain_cost(logits[0, 0], boxes[0, 0], label, CONFIG)[:, 0]
    assert sorted(matching.on_host[0, 0]) == sorted(np.argsort(expected)[:3])


@COUNTS
def test_losses_of_every_layer(counts):
    (logits, boxes), labels = predictions(), tiny_labels(counts)
    terms = set_losses(logits, boxes, hungarian_match(logits, boxes, labels, CONFIG), CONFIG)
    expected = plain_losses(logits, boxes, labels, CONFIG)
    assert terms.keys() == expected.keys()
    for name, values in expected.items():
        assert terms[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-5), name
    sum(terms[name].sum() for name in ("loss_ce", "loss_bbox", "loss_giou")).backward()
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all() and (logits.grad != 0).all()
    matched = (boxes.grad != 0).any(-1).sum(-1)  # (L, B)
    assert matched.tolist() == [[min(count, 7) for count in counts]] * 2, "no gradient but at matched queries"


def test_gradients():
    logits, boxes = (x.detach().double().requires_grad_() for x in predictions(queries=4))
    labels = tiny_labels((2, 0, 3))
    matching = hungarian_match(logits, boxes, labels, CONFIG)
    objects = matching.objects._replace(boxes=matching.objects.boxes.double())

    def losses(logits, boxes):
        own = scoring_of(CONFIG).loss(logits, matching.queries, objects.classes)
        return own, *box_losses(boxes, matching.queries, objects)

    assert torch.autograd.gradcheck(losses, (logits, boxes))


def test_normalizers_of_the_sums():
    """The class loss is torch's weighted mean cross-entropy, as in the authors' code."""
    (logits, boxes), labels = predictions(layers=1), tiny_labels((3, 0, 9))
    matching = hungarian_match(logits, boxes, labels, CONFIG)
    items = normalizers([3, 0, 9], CONFIG)
    assert items["loss_ce"] == scoring_of(CONFIG).items([3, 0, 9], 7) == pytest.approx(10 + 0.2 * 11)
    assert items["cardinality_error"] == 3 and items["loss_bbox"] == items["loss_mask"] == 12
    assert normalizers([0, 0], CONFIG)["loss_giou"] == 0
    target = torch.full((3, 7), 5)
    for image, label in enumerate(labels):
        for query, name in zip(matching.on_host[0, image], label["class_labels"], strict=False):
            if query < 7:
                target[image, query] = name
    weight = torch.tensor([1.0] * 5 + [0.2])
    expected = nn.functional.cross_entropy(logits[0].flatten(0, 1), target.flatten(), weight)
    found = set_losses(logits, boxes, matching, CONFIG)["loss_ce"] / items["loss_ce"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_names_and_weights():
    named = by_layer({"loss_ce": torch.tensor([1.0, 2.0, 3.0]), "loss_mask": torch.tensor([4.0])})
    assert {name: value.item() for name, value in named.items()} == {
        "loss_ce_0": 1.0,
        "loss_ce_1": 2.0,
        "loss_ce": 3.0,
        "loss_mask": 4.0,
    }
    config = tiny_detr_config(bbox_loss_coefficient=3, giou_loss_coefficient=4, mask_loss_coefficient=5)
    assert term_weights(config) == {
        "loss_ce": 1,
        "loss_bbox": 3,
        "loss_giou": 4,
        "loss_mask": 5,
        "loss_dice": 1,
    }, "metrics have no weight"


def test_cardinality_error():
    logits = torch.full((1, 2, 4, 3), -5.0)
    logits[..., 2] = 0.0  # no object predicted
    logits[0, 0, :3, 1] = 5.0  # three objects predicted
    assert cardinality_error(logits, [1, 2], scoring_of(CONFIG)).tolist() == [2 + 2]


@pytest.mark.parametrize(
    ("value", "where"), [(math.nan, "logits"), (math.inf, "logits"), (math.nan, "boxes"), (math.inf, "boxes")]
)
def test_nan_predictions(value, where, caplog):
    """They are reported with their count and matched last; results that do not involve them are unchanged."""
    labels = tiny_labels((3, 0, 2))
    logits, boxes = (x.detach() for x in predictions())
    expected = plain_losses(logits, boxes, labels, CONFIG)
    (logits if where == "logits" else boxes)[1, 0, 4] = value  # one query of one image in the last layer
    matching = hungarian_match(logits, boxes, labels, CONFIG)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 70 matching costs are not finite: logits or boxes of the model are not"
    ]
    assert 4 not in matching.on_host[1, 0]
    terms = set_losses(logits, boxes, matching, CONFIG)
    for name, values in expected.items():
        assert terms[name][0].item() == pytest.approx(values[0], rel=1e-5), "the other layer"
    assert terms["loss_bbox"].isfinite().all() and terms["loss_giou"].isfinite().all()
    assert terms["loss_ce"].isfinite().tolist() == [True, where == "boxes"]


def test_no_report_if_no_object_is_affected(caplog):
    logits, boxes = (x.detach() for x in predictions())
    boxes[0, 1] = math.nan  # in an image without objects
    hungarian_match(logits, boxes, tiny_labels((3, 0, 2)), CONFIG)
    assert not caplog.records


def test_all_predictions_nan():
    logits, boxes = (torch.full_like(x, math.nan) for x in predictions())
    queries = hungarian_match(logits, boxes, tiny_labels((3, 0, 2)), CONFIG).on_host
    assert len(set(queries[0, 0])) == 3 and (queries[:, 1] == 7).all()
    assert predictions()[0].abs().max() < NEVER


class HostReads(TorchDispatchMode):
    """Counts values read by the host, each of which makes it wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("images", "layers"), [(1, 1), (6, 6)])
def test_one_copy_to_the_host(images, layers, monkeypatch):
    """For any number of layers and images. On a CPU the range of the labels is read as well."""
    copies = []
    for name in ("cpu", "numpy", "tolist", "item"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *args, name=name, method=method: (copies.append(name), method(self, *args))[1]
        )
    logits, boxes = predictions(images, layers)
    labels = tiny_labels((3,) * images)
    with HostReads() as waits:
        matching = hungarian_match(logits, boxes, labels, CONFIG)
        terms = set_losses(logits, boxes, matching, CONFIG)
        sum(values.sum() for values in terms.values()).backward()
    assert copies == ["cpu", "numpy"] and waits.numbers == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_synchronizations():
    """At most 5 per step; the authors' code has 25."""
    logits, boxes = (x.detach().cuda().requires_grad_() for x in predictions(6, 6))
    labels = [{name: value.cuda() for name, value in label.items()} for label in tiny_labels((3, 1, 0, 2, 5, 1))]
    set_losses(logits, boxes, hungarian_match(logits, boxes, labels, CONFIG), CONFIG)  # one-time setup
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            terms = set_losses(logits, boxes, hungarian_match(logits, boxes, labels, CONFIG), CONFIG)
            sum(values.sum() for values in terms.values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= 5


def test_float32_under_autocast():
    (logits, boxes), labels = predictions(), tiny_labels()
    halves = [x.detach().bfloat16() for x in (logits, boxes)]
    exact = [x.float() for x in halves]
    expected = set_losses(*exact, hungarian_match(*exact, labels, CONFIG), CONFIG)
    masks, targets = torch.randn(4, 6, 6), torch.rand(4, 20, 20).round()
    expected |= mask_losses(masks.bfloat16().float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = set_losses(*halves, hungarian_match(*halves, labels, CONFIG), CONFIG) | mask_losses(
            masks.bfloat16(), targets
        )
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


def test_labels_in_half_precision_and_small_integers():
    """As from a loader that casts whole batches or reads uint8 classes."""
    (logits, boxes), labels = predictions(), tiny_labels()
    small = [
        {"class_labels": label["class_labels"].to(torch.uint8), "boxes": label["boxes"].half()} for label in labels
    ]
    found, expected = (
        set_losses(logits, boxes, hungarian_match(logits, boxes, each, CONFIG), CONFIG)["loss_giou"]
        for each in (small, labels)
    )
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-2)


def bad(labels: list[dict[str, Tensor]], **fields) -> list[dict[str, Tensor]]:
    return [labels[0], {**labels[1], **fields}, *labels[2:]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            bad(tiny_labels((3, 2, 1)), class_labels=torch.tensor([1, 5])),
            r"class_labels'\] must be in \[0, 5\).* 5",
        ),
        (bad(tiny_labels((3, 2, 1)), class_labels=torch.tensor([-1, 2])), r"class_labels'\] must be .* got -1"),
        (bad(tiny_labels((3, 2, 1)), class_labels=torch.tensor([1.0, 2.0])), "must be integers, got torch.float32"),
        (
            bad(tiny_labels((3, 2, 1)), boxes=torch.tensor([[0.5, 0.5, 0.1, 0.1], [31.0, 20.0, 9.0, 9.0]])),
            r"labels\[1\]\['boxes'\] must be .* \[0, 1\], got \(31, 20, 9, 9\)",
        ),
        (bad(tiny_labels((3, 2, 1)), boxes=torch.full((2, 4), math.nan)), r"labels\[1\].* got \(nan, nan"),
        (bad(tiny_labels((3, 2, 1)), boxes=torch.full((2, 4), -0.5)), r"labels\[1\].* got \(-0.5, -0.5"),
        (
            bad(tiny_labels((3, 2, 1)), boxes=torch.full((2, 5), 0.5)),
            r"labels\[1\]\['boxes'\] .*\(2, 4\).* got \(2, 5\)",
        ),
        (
            bad(tiny_labels((3, 2, 1)), boxes=torch.full((3, 4), 0.5)),
            r"labels\[1\]\['boxes'\] .*\(2, 4\).* got \(3, 4\)",
        ),
        (tiny_labels((3, 2)), "labels must have an entry for each of 3 images, got 2"),
        (tiny_labels((3,)), "labels must have an entry for each of 3 images, got 1"),
        (tiny_labels((3, 2, 1, 1)), "labels must have an entry for each of 3 images, got 4"),
        ([{"class_labels": torch.zeros(1, dtype=torch.int64)}] * 3, r"labels\[0\] must have class_labels and boxes"),
    ],
    ids=str,
)
def test_invalid_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        hungarian_match(*predictions(), labels, CONFIG)


@pytest.mark.parametrize("values", [(31.0, 20.0, 9.0, 9.0), (math.nan,) * 4, (math.inf, 0.5, 0.1, 0.1)])
def test_invalid_boxes_on_a_gpu(values, monkeypatch):
    """Labels are not read on a GPU; the error comes from the costs on the host."""
    monkeypatch.setattr(set_loss, "readable", lambda values: False)
    labels = tiny_labels((3, 2, 1))
    labels[1]["boxes"][1] = torch.tensor(values)
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\]\[1\] must be .* in \[0, 1\]"):
        hungarian_match(*predictions(), labels, CONFIG)


def plain_mask_losses(logits: Tensor, target: Tensor) -> tuple[float, float]:
    """Focal (alpha 0.25, gamma 2) and Dice loss of one mask (pixels,)."""
    focal = found = both = 0.0
    for score, true in zip(logits.tolist(), target.tolist(), strict=True):
        p = 1 / (1 + math.exp(-score))
        focal -= 0.25 * (1 - p) ** 2 * math.log(p) if true else 0.75 * p**2 * math.log(1 - p)
        found, both = found + p, both + p * true
    return focal / len(logits), 1 - (2 * both + 1) / (found + target.sum().item() + 1)


def test_mask_losses():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 30, generator=generator)
    targets = torch.rand(4, 30, generator=generator).round()
    expected = torch.tensor([plain_mask_losses(*pair) for pair in zip(logits, targets, strict=True)])
    assert largest_difference(focal_loss(logits, targets), expected[:, 0]) < 1e-6
    assert largest_difference(dice_loss(logits, targets), expected[:, 1]) < 1e-6
    whole = mask_losses(logits.view(4, 5, 6), targets.view(4, 5, 6))
    assert whole["loss_mask"].item() == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
    assert whole["loss_dice"].item() == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
    sure = 30 * (2 * targets - 1)
    assert focal_loss(sure, targets).max() < 1e-6 and dice_loss(sure, targets).max() < 1e-6
    assert dice_loss(-sure, targets).min() > 0.9


def test_mask_logits_are_upsampled_to_the_target_size():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.rand(2, 16, 24).round()
    large = nn.functional.interpolate(logits[None], scale_factor=4, mode="bilinear")[0]
    found, expected = (mask_losses(each, targets)["loss_dice"] for each in (logits, large))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    none = mask_losses(logits[:0], targets[:0])
    assert none["loss_mask"].tolist() == none["loss_dice"].tolist() == [0.0]
    sum(none.values()).sum().backward()
    assert logits.grad.eq(0).all(), "no object, no gradient, and no error"


def test_masks_are_padded_at_the_bottom_and_right():
    small, whole = torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(2, 5, 6)
    masks = target_masks([{"masks": small}, {"masks": whole[:0]}, {"masks": whole}], (5, 6), [1, 0, 2], small.device)
    assert masks.shape == (3, 5, 6) and masks.dtype == torch.float32
    assert masks[0, :3, :4].eq(1).all() and masks[0].sum() == 12 and masks[1:].eq(1).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{}], r"labels\[0\] must have masks"),
        ([{"masks": torch.ones(3, 4, 4)}], r"labels\[0\]\['masks'\] must have shape \(2, H, W\).* got \(3, 4, 4\)"),
        ([{"masks": torch.ones(2, 16)}], r"labels\[0\]\['masks'\] must have shape \(2, H, W\)"),
        ([{"masks": torch.ones(2, 4, 9)}], r"at most 8 x 8.* got \(2, 4, 9\)"),
    ],
    ids=str,
)
def test_invalid_masks(labels, message):
    with pytest.raises(ValueError, match=message):
        target_masks(labels, (8, 8), [2], torch.device("cpu"))
