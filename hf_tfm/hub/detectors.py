"""Detectors of this package or of transformers: kind, classes, preprocessing and forward pass.

uint8 images of any size -> processor -> one batch -> model -> output
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import resize
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

# Architectures of models with boxes and masks; detectors without masks have many names.
WITH_MASKS = ("DetrForSegmentation", "TfmDetrForPanopticSegmentation")


def is_detector(config: PreTrainedConfig) -> bool:
    """Return True if a model was saved as a detector."""
    return "ForObjectDetection" in "".join(config.architectures or ()) or has_masks(config)


def has_masks(config: PreTrainedConfig) -> bool:
    """Return True if a detector was saved with a mask head."""
    return any(name in WITH_MASKS for name in config.architectures or ())


def takes_mask(model: PreTrainedModel) -> bool:
    """Return True if the forward pass takes a ``pixel_mask``, which marks padding."""
    return "pixel_mask" in inspect.signature(model.forward).parameters


def classes(config: PreTrainedConfig) -> list[str]:
    """Return the names of a model's classes in order; duplicates, such as COCO's "N/A", get their number appended."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def processed(processor: BaseImageProcessor, images: Sequence[Tensor]) -> dict[str, Any]:
    """Preprocess images of any size into one batch.

    Args:
        images: uint8 (3, h, w).

    Returns:
        ``pixel_values`` (B, 3, H, W) float32; ``pixel_mask`` (B, H, W) if there is padding; ``labels``, one dict per
        image with orig_size and size (2,) int64: height and width before and after preprocessing, without padding.
    """
    longest = getattr(processor.size, "longest_edge", None)
    made = processor(images=[thickened(image, longest) for image in images], return_tensors="pt")
    pixels = made["pixel_values"]
    mask = made.get("pixel_mask")
    if mask is None or mask.all():
        mask = None
        sizes = torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    else:
        sizes = torch.stack([mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)], dim=1)
    labels = [
        {"orig_size": torch.tensor(image.shape[1:]), "size": size} for image, size in zip(images, sizes, strict=True)
    ]
    return {"pixel_values": pixels, "labels": labels} | ({} if mask is None else {"pixel_mask": mask})


def thickened(image: Tensor, longest: int | None) -> Tensor:
    """Enlarge an image (3, h, w) a side of which would round to 0 pixels once the longest is ``longest``."""
    height, width = image.shape[1:]
    least = 1 if longest is None else -(-max(height, width) // longest)
    if min(height, width) >= least:
        return image
    return resize(image, [max(height, least), max(width, least)])


@torch.inference_mode()
def predict(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> ModelOutput:
    """Run a model on a batch of `processed`."""
    mask = {"pixel_mask": batch["pixel_mask"]} if "pixel_mask" in batch and takes_mask(model) else {}
    return model(pixel_values=batch["pixel_values"], **mask, **options)
