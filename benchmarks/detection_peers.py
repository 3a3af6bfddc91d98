"""Implementations in the detection benchmarks: DETR with a ResNet-50, ours, transformers' and the authors'.

The authors' folder is a copy of facebookresearch/detr; its models get random weights instead of downloaded ones.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrForObjectDetection

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.models.set_loss import hungarian_match, normalizers, set_losses, term_weights

CLASSES = 91
Labels = list[dict[str, Tensor]]


def scenes(batch_size: int, height: int, width: int, objects: int) -> tuple[Tensor, Tensor, Labels]:
    """Random images, the last of them padded to three quarters of the width, their mask, and random objects."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, 3, height, width, generator=generator)
    mask = torch.ones(batch_size, height, width, dtype=torch.int64)
    mask[-1, :, width * 3 // 4 :] = 0
    pixels[-1, :, :, width * 3 // 4 :] = 0.0
    labels = []
    for _ in range(batch_size):
        centres, sizes = torch.rand(2, objects, 2, generator=generator)
        boxes = torch.cat([0.3 + 0.4 * centres, 0.05 + 0.5 * sizes], dim=1)
        labels.append({"class_labels": torch.randint(CLASSES, (objects,), generator=generator), "boxes": boxes})
    return pixels, mask, labels


def ours() -> TfmDetrForObjectDetection:
    """Our model with the paper's configuration."""
    torch.manual_seed(0)
    return TfmDetrForObjectDetection(TfmDetrConfig(num_labels=CLASSES))


def native(model: TfmDetrForObjectDetection) -> DetrForObjectDetection:
    """transformers' model with the weights of ours."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return DetrForObjectDetection.from_pretrained(folder)


def authors(folder: str, auxiliary: bool = True) -> tuple[nn.Module, nn.Module]:
    """The authors' model and criterion."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from models import backbone, detr

    backbone.is_main_process = lambda: False  # otherwise it downloads weights
    args = Namespace(
        **{"dataset_file": "coco", "device": "cpu", "lr_backbone": 1e-5, "masks": False, "frozen_weights": None},
        **{"backbone": "resnet50", "dilation": False, "position_embedding": "sine", "hidden_dim": 256},
        **{"enc_layers": 6, "dec_layers": 6, "dim_feedforward": 2048, "dropout": 0.1, "nheads": 8, "pre_norm": False},
        **{"num_queries": 100, "aux_loss": auxiliary, "eos_coef": 0.1, "set_cost_class": 1, "set_cost_bbox": 5},
        **{"set_cost_giou": 2, "bbox_loss_coef": 5, "giou_loss_coef": 2},
    )
    model, criterion, _ = detr.build(args)
    return model, criterion


def authors_loss(model: nn.Module, criterion: nn.Module, pixels: Tensor, mask: Tensor, labels: Labels) -> Tensor:
    """The authors' loss of a batch."""
    from util.misc import NestedTensor

    outputs = model(NestedTensor(pixels, ~mask.bool()))
    return weighted(criterion, criterion(outputs, renamed(labels)))


def weighted(criterion: nn.Module, losses: dict[str, Tensor]) -> Tensor:
    """The sum of the terms that the authors' code weights."""
    weights = criterion.weight_dict
    return sum(value * weights[name] for name, value in losses.items() if name in weights)


def renamed(labels: Labels) -> Labels:
    """Labels with the authors' key names."""
    return [{"labels": label["class_labels"], "boxes": label["boxes"]} for label in labels]


def criteria(folder: str | None, labels: Labels) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Criteria of all variants: (logits (L, B, Q, C + 1), boxes (L, B, Q, 4)) -> loss for the ``labels``."""
    config: Any = TfmDetrConfig(num_labels=CLASSES)

    def our_loss(logits: Tensor, boxes: Tensor) -> Tensor:
        matching = hungarian_match(logits, boxes, labels, config)
        items = normalizers(matching.objects.counts, config.num_queries, config.eos_coefficient)
        weights = term_weights(config)
        terms = set_losses(logits, boxes, matching, config)
        return sum(weights[name] * terms[name].sum() / items[name] for name in terms if name in weights)

    def native_loss(logits: Tensor, boxes: Tensor) -> Tensor:
        from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

        config.auxiliary_loss = True
        return ForObjectDetectionLoss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]

    found = {"ours": our_loss, "transformers": native_loss}
    if folder:
        _, criterion = authors(folder)
        criterion = criterion.to(labels[0]["boxes"].device)

        def authors_own(logits: Tensor, boxes: Tensor) -> Tensor:
            layers = [{"pred_logits": own, "pred_boxes": box} for own, box in zip(logits, boxes, strict=True)]
            return weighted(criterion, criterion({**layers[-1], "aux_outputs": layers[:-1]}, renamed(labels)))

        found["authors"] = authors_own
    return found
