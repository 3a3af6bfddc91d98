"""DETR with the authors' weights reproduces the predictions, losses and gradients of their code.

Their code is not part of this package: DETR_AUTHORS_FOLDER names a checkout of github.com/facebookresearch/detr.
"""

import argparse
import os

import pytest
import torch
import torchvision
from torch import Tensor, nn

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.conversion.detr_authors import names

FOLDER = os.environ.get("DETR_AUTHORS_FOLDER")
pytestmark = pytest.mark.skipif(not FOLDER, reason="DETR_AUTHORS_FOLDER names no checkout of the authors' code")

PLAIN = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
SMALL = {
    **PLAIN,
    "backbone": "resnet18",
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "num_queries": 10,
}


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode with all weights and norm statistics random."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2, generator=generator)
    return model.eval()


def authors_model(config: TfmDetrConfig, panoptic: bool, monkeypatch) -> tuple[nn.Module, nn.Module]:
    """Their model, with random weights, and their criterion."""
    monkeypatch.syspath_prepend(FOLDER)
    build = getattr(torchvision.models, config.backbone)
    monkeypatch.setattr(  # they load pretrained weights
        torchvision.models, config.backbone, lambda pretrained, **options: build(weights=None, **options)
    )
    from models import build_model

    arguments = argparse.Namespace(
        dataset_file="coco_panoptic" if panoptic else "coco",
        device="cpu",
        num_queries=config.num_queries,
        aux_loss=True,
        masks=panoptic,
        frozen_weights=None,
        hidden_dim=config.d_model,
        position_embedding=config.position_embedding_type,
        lr_backbone=1e-5,
        backbone=config.backbone,
        dilation=config.dilation,
        dropout=0.0,
        nheads=config.encoder_attention_heads,
        dim_feedforward=config.encoder_ffn_dim,
        enc_layers=config.encoder_layers,
        dec_layers=config.decoder_layers,
        pre_norm=config.norm_first,
        set_cost_class=config.class_cost,
        set_cost_bbox=config.bbox_cost,
        set_cost_giou=config.giou_cost,
        bbox_loss_coef=config.bbox_loss_coefficient,
        giou_loss_coef=config.giou_loss_coefficient,
        mask_loss_coef=config.mask_loss_coefficient,
        dice_loss_coef=config.dice_loss_coefficient,
        eos_coef=config.eos_coefficient,
    )
    model, criterion, _ = build_model(arguments)
    return model.eval(), criterion


def under_their_names(tensors: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    groups: dict[str, list[Tensor]] = {}
    for ours, theirs in table.items():
        if tensors.get(ours) is not None:
            groups.setdefault(theirs, []).append(tensors[ours])
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in groups.items()}


def batch(num_labels: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Two images, the second padded, and their objects."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 128, 160, dtype=torch.int64)
    mask[1, 90:] = mask[1, :, 100:] = 0
    labels = []
    for count, size in ((5, (128, 160)), (3, (90, 100))):
        boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.2
        masks = (torch.rand(count, *size, generator=generator) > 0.5).float()
        classes = torch.randint(num_labels, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": boxes, "masks": masks})
    return torch.randn(2, 3, 128, 160, generator=generator) * mask[:, None], mask, labels


@pytest.fixture
def float64():
    """float32 rounding moves values across ReLU's kink, which changes the gradients."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("fields", "panoptic"),
    [
        (SMALL, False),
        ({**SMALL, "norm_first": True}, False),
        ({**SMALL, "position_embedding_type": "learned"}, False),
        (PLAIN, False),
        ({**PLAIN, "dilation": True}, False),
        ({**SMALL, "backbone": "resnet50"}, True),
    ],
    ids=["small", "pre-norm", "learned", "R50", "DC5", "panoptic"],
)
def test_predictions_losses_and_gradients_are_the_same(fields, panoptic, monkeypatch, float64):
    config = TfmDetrConfig(**fields, num_labels=250 if panoptic else 91)  # their position embeddings are fixed
    ours = drawn((TfmDetrForPanopticSegmentation if panoptic else TfmDetrForObjectDetection)(config))
    theirs, criterion = authors_model(config, panoptic, monkeypatch)
    table = names(config, panoptic)
    theirs.load_state_dict(under_their_names(ours.state_dict(), table))
    from util.misc import NestedTensor

    images, mask, labels = batch(config.num_labels)
    output = ours(images, mask, labels)
    expected = theirs(NestedTensor(images, mask == 0))
    pairs = [(output.logits, expected["pred_logits"]), (output.pred_boxes, expected["pred_boxes"])]
    pairs += [(output.pred_masks, expected["pred_masks"])] if panoptic else []
    for own, other in zip(output.auxiliary_outputs, expected["aux_outputs"], strict=True):
        pairs += [(own["logits"], other["pred_logits"]), (own["pred_boxes"], other["pred_boxes"])]
    for own, other in pairs:
        assert other.std() > 0.01
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    terms = criterion(expected, [{**label, "labels": label["class_labels"]} for label in labels])
    assert output.loss_dict.keys() == terms.keys() - {"class_error"}
    for name, value in output.loss_dict.items():
        assert value.item() == pytest.approx(terms[name].item(), rel=1e-5), name
    loss = sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    output.loss.backward()
    loss.backward()
    found = under_their_names({name: parameter.grad for name, parameter in ours.named_parameters()}, table)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert found.keys() == gradients.keys(), "the same weights learn"
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8 * whole, name
