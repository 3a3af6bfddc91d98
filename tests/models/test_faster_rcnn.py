"""Faster R-CNN: losses and detections equal torchvision's, a step is the same however it is split, and it learns."""

import pytest
import torch
from test_detr_learning import CLASSES, SIDE, rectangles
from torch import nn
from torchvision.models.detection import FasterRCNN

from hf_tfm import (
    TfmFasterRCNNConfig,
    TfmFasterRCNNForObjectDetection,
    TfmSwinConfig,
    TfmSwinModel,
    TfmViTConfig,
    TfmViTModel,
)
from hf_tfm.metrics import CocoAP
from hf_tfm.models.boxes import cxcywh_to_xyxy

TINY = {
    "backbone": "test_resnet",
    "backbone_norm": "group",
    "backbone_frozen_stages": 0,
    "d_model": 16,
    "representation_size": 32,
    "anchor_size": 8,
    "num_proposals": 200,
    "box_batch_size_per_image": 32,
    "num_labels": CLASSES,
}


def tiny(seed: int = 0, **fields) -> TfmFasterRCNNForObjectDetection:
    """A model whose random heads detect something."""
    torch.manual_seed(seed)
    model = TfmFasterRCNNForObjectDetection(TfmFasterRCNNConfig(**{**TINY, **fields}))
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight.normal_(std=0.5)
        predictor.bbox_pred.weight.normal_(std=0.05)
    return model.eval()


class Maps(nn.Module):
    """Backbone and pyramid of our model, as torchvision expects them."""

    def __init__(self, model: TfmFasterRCNNForObjectDetection):
        super().__init__()
        self.parts, self.out_channels = model.model, model.config.d_model

    def forward(self, images):
        images = images.contiguous(
            memory_format=torch.channels_last
        )  # as in ours: rounding decides which boxes are dropped
        return self.parts.fpn(dict(zip(self.parts.levels, self.parts.backbone(images), strict=True)))


def theirs(model: TfmFasterRCNNForObjectDetection) -> FasterRCNN:
    """torchvision's whole model with the parts of ours, that neither resizes nor scales images."""
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": SIDE, "max_size": SIDE, "_skip_resize": True}
    found = FasterRCNN(Maps(model), num_classes=CLASSES + 1, **plain)
    found.rpn, found.roi_heads = model.rpn, model.roi_heads
    return found


def test_losses_equal_torchvisions():
    model, (images, labels) = tiny().train(), rectangles(4)
    reference = theirs(model).train()
    targets = [{"boxes": cxcywh_to_xyxy(one["boxes"]) * SIDE, "labels": one["class_labels"] + 1} for one in labels]
    for image, label, target in zip(images, labels, targets, strict=True):
        torch.manual_seed(1)
        expected = reference([image], [target])
        torch.manual_seed(1)
        output = model(image[None], labels=[label])
        assert output.loss_dict.keys() == expected.keys() == set(model.loss_terms.values())
        for name, value in expected.items():
            torch.testing.assert_close(output.loss_dict[name], value, msg=name)
        torch.testing.assert_close(output.loss, sum(expected.values()))


@torch.no_grad()
def test_detections_equal_torchvisions():
    model, (images, _) = tiny(num_queries=20), rectangles(4)
    output, expected = model(images), theirs(model).eval()(list(images))
    assert sum(len(one["scores"]) for one in expected) > 20
    for i, one in enumerate(expected):
        n = len(one["scores"])
        scores, names = output.logits[i].softmax(-1)[:, :-1].max(-1)
        torch.testing.assert_close(scores[:n], one["scores"])
        assert names[:n].tolist() == [label - 1 for label in one["labels"].tolist()] and not scores[n:].any()
        torch.testing.assert_close(cxcywh_to_xyxy(output.pred_boxes[i, :n]) * SIDE, one["boxes"], atol=1e-3, rtol=1e-4)


def gradients(model, images, labels, parts) -> dict[str, torch.Tensor]:
    """Of a step that is split into micro-batches of these sizes."""
    model.zero_grad()
    counts, start = model.count_items(labels), 0
    torch.manual_seed(2)
    for size in parts:
        chosen = slice(start, start + size)
        model(images[chosen], labels=labels[chosen], num_items_in_batch=counts).loss.backward()
        start += size
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_step_is_the_same_however_it_is_split():
    model, (images, labels) = tiny().train(), rectangles(4)
    labels[1] = {name: value[:0] for name, value in labels[1].items()}  # an image without objects
    whole, parts = (gradients(model, images, labels, sizes) for sizes in ((4,), (1, 2, 1)))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(value.abs().max() > 1e-3 for value in whole.values())


@torch.no_grad()
def test_padding_is_no_part_of_an_image():
    model, (images, _) = tiny(), rectangles(2)
    padded, mask = torch.zeros(2, 3, SIDE + 32, SIDE), torch.zeros(2, SIDE + 32, SIDE, dtype=torch.bool)
    padded[:, :, :SIDE], mask[:, :SIDE] = images, True
    output = model(padded, pixel_mask=mask)
    sure = output.logits.softmax(-1)[..., :-1].max(-1).values > 0
    corners = cxcywh_to_xyxy(output.pred_boxes)[sure]
    assert len(corners) and corners.min() >= -1e-5 and corners.max() <= 1 + 1e-5


def test_evaluation_loss_is_the_same_every_time_and_draws_no_random_numbers():
    model, (images, labels) = tiny(), rectangles(2)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (model(images, labels=labels) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(torch.get_rng_state(), state)
    assert first.logits is not None and not model.rpn.training


def test_batch_without_labels_reaches_all_weights_in_training():
    """Data-parallel training waits for the gradients of all weights, also of a rank whose images ran out."""
    model = tiny().train()
    output = model(torch.zeros(1, 3, SIDE, SIDE))
    sum(output.loss_sums.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def average_precision(model, images, labels) -> float:
    """AP50 of class and box."""
    with torch.no_grad():
        output = model(images)
    scores, names = output.logits.softmax(-1)[..., :-1].max(-1)
    boxes, metric = cxcywh_to_xyxy(output.pred_boxes) * SIDE, CocoAP()
    for i, label in enumerate(labels):
        found = {"boxes": boxes[i], "scores": scores[i], "labels": names[i]}
        real = {"image_id": i, "boxes": cxcywh_to_xyxy(label["boxes"]) * SIDE, "labels": label["class_labels"]}
        metric.add_batch(predictions=[found], references=[real])
    return metric.compute()["AP50"]


@pytest.mark.slow  # the steps of its recipe are tested without it
def test_faster_rcnn_overfits_four_images():
    torch.manual_seed(0)
    model, (images, labels) = TfmFasterRCNNForObjectDetection(TfmFasterRCNNConfig(**TINY)), rectangles(4)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=80, pct_start=0.2)
    assert average_precision(model.eval(), images, labels) < 0.1
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    assert average_precision(model.eval(), images, labels) > 0.8


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True])
def test_backbone_may_be_a_transformer(plain, tmp_path):
    """A Swin gives the maps itself; a ViT gets the simple pyramid."""
    small = {"image_size": 64, "patch_size": 4 if not plain else 16, "num_labels": 3}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}
    kind, config = (
        (TfmViTModel, TfmViTConfig(**small, **sizes)) if plain else (TfmSwinModel, TfmSwinConfig(**small, **swin))
    )
    kind(config).save_pretrained(tmp_path)
    model = TfmFasterRCNNForObjectDetection(TfmFasterRCNNConfig(**{**TINY, "backbone": str(tmp_path)})).eval()
    assert (model.model.pyramid is not None) == plain and len(model.model.levels) == 4 - plain
    assert model(torch.zeros(1, 3, 64, 96)).logits.shape[-1] == CLASSES + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nms_threshold": 0.0}, r"nms_threshold must be in \(0, 1\], got 0.0"),
        ({"score_threshold": 1.0}, r"score_threshold must be in \[0, 1\), got 1.0"),
        ({"anchor_size": 0}, "anchor_size must be at least 1, got 0"),
        ({"backbone_norm": "layer"}, "backbone_norm must be one of frozen, batch, group"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TfmFasterRCNNConfig(**{**TINY, **fields})
