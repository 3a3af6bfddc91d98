"""Detectors of this package or of transformers: kind, classes, preprocessing, forward pass and postprocessing.

uint8 images of any size -> processor -> one batch -> model -> output -> boxes and segments in the original images
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.transforms.functional import resize
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ..families import PANOPTIC_DETECTOR
from ..models.class_scoring import SCORINGS, scoring_name
from ..models.patches import unpadded_sizes
from .loading import load_config, load_with_processor

PANOPTIC_THRESHOLD = 0.85  # minimum score of a query in a panoptic map, as in the authors' code


def is_detector(config: PreTrainedConfig) -> bool:
    """Return True if a model was saved as a detector."""
    return "ForObjectDetection" in "".join(config.architectures or ()) or has_masks(config)


def has_masks(config: PreTrainedConfig) -> bool:
    """Return True if a detector, of this package or transformers' DETR, was saved with a mask head."""
    ours = PANOPTIC_DETECTOR.families().values()
    known = {family.auto_classes[PANOPTIC_DETECTOR.auto_class].rpartition(".")[2] for family in ours}
    return not known.union({"DetrForSegmentation"}).isdisjoint(config.architectures or ())


def load_detector(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a detector, with or without masks, and its image processor.

    Raises:
        ValueError: the model is of another kind; see also `load_with_processor`.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(model, **options)
    if not is_detector(config):
        saved = ", ".join(config.architectures or ()) or "no class"
        raise ValueError(f'"{model}" is a {config.model_type} model saved as {saved}, not a detector')
    auto = AutoModelForUniversalSegmentation if has_masks(config) else AutoModelForObjectDetection
    return load_with_processor(auto, model, **options)


def takes_mask(model: PreTrainedModel) -> bool:
    """Return True if the forward pass takes a ``pixel_mask``, which marks padding."""
    return "pixel_mask" in inspect.signature(model.forward).parameters


def classes(config: PreTrainedConfig) -> list[str]:
    """Return the names of a model's classes in order; duplicates, such as COCO's "N/A", get their number appended."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def class_scores(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """Return the probability of each class of a detector's queries: (..., outputs) -> (..., C)."""
    return SCORINGS[scoring_name(config, logits.shape[-1])].scores(logits.float())


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
        sizes = unpadded_sizes(mask)
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


def detections(
    config: PreTrainedConfig, processor: BaseImageProcessor, output: ModelOutput, batch: dict[str, Any]
) -> list[dict[str, Tensor]]:
    """Return boxes with their class and score, in pixels of the original images, as `CocoAP` takes them.

    The processor of the model chooses them: DETR's returns the best class of every query, Deformable DETR's the 100
    best pairs of a query and a class. Those of score 0 are left out, and duplicates if the configuration has an
    ``nms_threshold``.

    Args:
        config: of the model.
        batch: its ``labels`` have the sizes of the images, as those of `processed` do.
    """
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    output = ModelOutput(logits=output.logits.float(), pred_boxes=output.pred_boxes.float())
    found = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    if (overlap := getattr(config, "nms_threshold", None)) is None:
        return found
    kept = [batched_nms(one["boxes"], one["scores"], one["labels"], overlap) for one in found]
    return [{name: values[own] for name, values in one.items()} for one, own in zip(found, kept, strict=True)]


def panoptic_maps(
    processor: BaseImageProcessor, output: ModelOutput, batch: dict[str, Any], threshold: float = PANOPTIC_THRESHOLD
) -> list[dict[str, Any]]:
    """Return a segment for each pixel of the original images, as `PanopticQuality` takes them.

    Segments of the same stuff stay separate here: the metric joins them, and transformers gives one id to two classes
    if asked to join them (5.23).

    Args:
        batch: see `detections`.
        threshold: minimum score of a query.
    """
    maps = []
    canvas = batch["pixel_values"].shape[2:]
    for i, label in enumerate(batch["labels"]):
        # transformers would enlarge the masks of the whole canvas, padding included.
        masks = output.pred_masks[i : i + 1].float()
        size = label["size"].tolist()
        rows, columns = (
            -(-side * cells // whole) for side, cells, whole in zip(size, masks.shape[2:], canvas, strict=True)
        )
        own = ModelOutput(logits=output.logits[i : i + 1].float(), pred_masks=masks[:, :, :rows, :columns])
        maps += processor.post_process_panoptic_segmentation(
            own,
            threshold=threshold,
            label_ids_to_fuse=set(),
            target_sizes=[tuple(label["orig_size"].tolist())],
        )
    return maps
