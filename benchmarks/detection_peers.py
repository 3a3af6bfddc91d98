"""Implementations in the detection benchmarks: a detector with a ResNet-50, ours, transformers' and the authors'.

The authors' folder is a copy of facebookresearch/detr; its models get random weights instead of downloaded ones.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from hf_tfm.conversion import conversions, converted
from hf_tfm.families import DETECTOR, family_of
from hf_tfm.models.class_scoring import scoring_of
from hf_tfm.models.set_loss import Predictions, detection_losses

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


def config_of(architecture: str, **fields: Any) -> Any:
    """The paper's configuration of our model."""
    return family_of(architecture).config(num_labels=CLASSES, **fields)


def ours(architecture: str = "detr") -> Any:
    """Our model with the paper's configuration."""
    torch.manual_seed(0)
    config = config_of(architecture)
    return DETECTOR.model_class(config.model_type)(config)


def native(model: PreTrainedModel) -> Any:
    """transformers' model with the weights of ours, and the losses of all layers."""
    conversion = next(one for one in conversions() if one.ours is type(model) and one.names is None)
    theirs = converted(conversion, model, conversion.name)
    theirs.config.auxiliary_loss = True
    return theirs


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


# Losses of transformers, by architecture.
NATIVE_LOSSES = {"detr": ForObjectDetectionLoss, "deformable_detr": DeformableDetrForObjectDetectionLoss}


def outputs_of(architecture: str) -> int:
    """Number of logits of a query."""
    return scoring_of(config_of(architecture)).outputs(CLASSES)


def criteria(
    folder: str | None, labels: Labels, architecture: str = "detr"
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Criteria of all variants: (logits (L, B, Q, outputs), boxes (L, B, Q, 4)) -> loss for the ``labels``."""
    config: Any = config_of(architecture)
    config.auxiliary_loss = True
    if architecture != "detr":
        config.class_loss_coefficient = 1  # transformers has no such weight

    def our_loss(logits: Tensor, boxes: Tensor) -> Tensor:
        return detection_losses(Predictions(logits, boxes), labels, config, None)["loss"]

    def native_loss(logits: Tensor, boxes: Tensor) -> Tensor:
        loss = NATIVE_LOSSES[architecture]
        return loss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]

    found = {"ours": our_loss, "transformers": native_loss}
    if folder:
        _, criterion = authors(folder)
        criterion = criterion.to(labels[0]["boxes"].device)

        def authors_own(logits: Tensor, boxes: Tensor) -> Tensor:
            layers = [{"pred_logits": own, "pred_boxes": box} for own, box in zip(logits, boxes, strict=True)]
            return weighted(criterion, criterion({**layers[-1], "aux_outputs": layers[:-1]}, renamed(labels)))

        found["authors"] = authors_own
    return found
