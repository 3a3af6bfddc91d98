"""Trained from scratch on drawn rectangles, DETR learns classes, boxes and masks, but not with a planted bug."""

import numpy as np
import pytest
import torch
from tiny_detr import PLAIN, tiny_detr_config
from torch import Tensor, nn

import hf_tfm.models.set_loss as set_loss
from hf_tfm import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.hub.detectors import class_scores
from hf_tfm.models.boxes import cxcywh_to_xyxy, generalized_iou

SIDE, CLASSES = 64, 3
FIELDS = {
    **PLAIN,
    "backbone": "test_efficientnet",
    "num_labels": CLASSES,
    "d_model": 64,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "backbone_norm": "group",
    "backbone_frozen_stages": 0,
}


def rectangles(count: int = 8) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (count, 3, SIDE, SIDE) of one to three rectangles, with the class encoded by color, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images, labels = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator), []
    for image in images:
        classes = torch.randperm(CLASSES, generator=generator)[: int(torch.randint(1, 4, (), generator=generator))]
        masks, boxes = torch.zeros(len(classes), SIDE, SIDE), []
        for mask, name, column in zip(masks, classes, torch.randperm(3, generator=generator), strict=False):
            left, top = 20 * int(column) + 2, int(torch.randint(4, 30, (), generator=generator))
            width, height = 16, int(torch.randint(12, 30, (), generator=generator))
            mask[top : top + height, left : left + width] = 1
            image[name, mask.bool()] += 2
            boxes.append([left + width / 2, top + height / 2, width, height])
        labels.append({"class_labels": classes, "boxes": torch.tensor(boxes) / SIDE, "masks": masks})
    return images, labels


def fit(model: nn.Module, steps: int, lr: float = 2e-3) -> nn.Module:
    images, labels = rectangles()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(learning, 0.5)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def recall_without_false_positives(model: nn.Module) -> float:
    """Share of objects found: right class above 0.5 and box with GIoU above 0.6; false positives count against it."""
    images, labels = rectangles()
    output = model(images)
    right = wrong = objects = 0
    for logits, boxes, label in zip(output.logits, output.pred_boxes, labels, strict=True):
        scores, names = class_scores(model.config, logits).max(-1)
        sure = scores > 0.5
        overlap = generalized_iou(cxcywh_to_xyxy(boxes[sure, None]), cxcywh_to_xyxy(label["boxes"][None]))
        hits = (overlap > 0.6) & (names[sure, None] == label["class_labels"])
        right += hits.any(0).sum().item()
        wrong += (~hits.any(1)).sum().item() if len(label["boxes"]) else sure.sum().item()
        objects += len(label["boxes"])
    return right / (objects + wrong)


def trained_detector(steps: int = 130) -> TfmDetrForObjectDetection:
    torch.manual_seed(0)
    return fit(TfmDetrForObjectDetection(tiny_detr_config(**FIELDS)), steps)


@pytest.fixture(scope="module")
def detector() -> TfmDetrForObjectDetection:
    return trained_detector()


def test_detr_overfits_eight_images(detector):
    assert recall_without_false_positives(detector) > 0.8


def arbitrary_matching(cost: Tensor, counts: list[int], *_) -> np.ndarray:
    """An assignment that ignores the cost."""
    L, B, Q, M = cost.shape
    queries = np.full((L, B, M), Q)
    for layer in range(L):
        for image, count in enumerate(counts):
            queries[layer, image, :count] = torch.randperm(Q)[:count].numpy()
    return queries


@pytest.mark.slow  # test_set_loss.py checks the matching
def test_without_matching_it_learns_little(monkeypatch):
    monkeypatch.setattr(set_loss, "assign", arbitrary_matching)
    assert recall_without_false_positives(trained_detector()) < 0.3


@pytest.mark.slow
def test_with_wrong_box_format_it_learns_little(monkeypatch):
    """Corners are read as center and size, in the loss only."""
    monkeypatch.setattr(set_loss, "box_losses", wrong_box_losses)
    assert recall_without_false_positives(trained_detector()) < 0.3


def wrong_box_losses(boxes: Tensor, queries: Tensor, objects: set_loss.Objects) -> tuple[Tensor, Tensor]:
    return RIGHT_LOSSES(boxes, queries, objects._replace(boxes=cxcywh_to_xyxy(objects.boxes)))


RIGHT_LOSSES = set_loss.box_losses


def mask_overlap(model: TfmDetrForPanopticSegmentation) -> float:
    """Mean IoU of the masks of matched queries."""
    images, labels = rectangles()
    with torch.no_grad():
        output = model(images)
    shares = []
    for i, label in enumerate(labels):
        stacked = output.logits[None, i : i + 1], output.pred_boxes[None, i : i + 1]
        queries = set_loss.hungarian_match(*stacked, [label], model.config).queries[0, 0]
        enlarged = nn.functional.interpolate(output.pred_masks[i : i + 1, queries], size=(SIDE, SIDE), mode="bilinear")
        found, true = enlarged[0] > 0, label["masks"].bool()
        shares += ((found & true).sum((1, 2)) / (found | true).sum((1, 2))).tolist()
    return sum(shares) / len(shares)


@pytest.mark.slow  # tests/recipes/test_panoptic_train.py trains one
def test_mask_head_learns_on_a_frozen_detector(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = TfmDetrForPanopticSegmentation.from_pretrained(tmp_path)
    before = mask_overlap(model.eval())
    model.freeze_detector()
    assert not any(parameter.requires_grad for parameter in model.detr.parameters())
    frozen = {name: value.clone() for name, value in model.detr.state_dict().items()}
    fit(model, 200, 5e-3)
    assert all(torch.equal(value, frozen[name]) for name, value in model.detr.state_dict().items())
    assert all(parameter.grad is None for parameter in model.detr.parameters())
    assert before < 0.3 and mask_overlap(model) > 0.7
    assert recall_without_false_positives(model) == recall_without_false_positives(detector)
