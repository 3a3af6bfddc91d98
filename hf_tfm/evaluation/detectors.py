"""Detectors of any kind, ours or transformers': loading one, and what its own processor makes of images.

uint8 images of any size -> processor -> one batch -> model -> output, with what takes it back to each image
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import resize
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ..data.images import IMAGE, BadImage, describe
from ..data.scenes import read_scene
from ..hub.loading import load_config
from ..tasks.images import Batch
from ..tasks.scenes import SceneTask
from .reading import load_with_processor

# Detectors are saved under many names; models with boxes and masks under these alone.
WITH_MASKS = ("DetrForSegmentation", "TfmDetrForPanopticSegmentation")


def is_detector(config: PreTrainedConfig) -> bool:
    """Whether a model was saved as one that finds boxes."""
    return "ForObjectDetection" in "".join(config.architectures or ()) or has_masks(config)


def has_masks(config: PreTrainedConfig) -> bool:
    """Whether a detector was saved with masks."""
    return any(name in WITH_MASKS for name in config.architectures or ())


def takes_mask(model: PreTrainedModel) -> bool:
    """Whether a model can be told where a padded image is."""
    return "pixel_mask" in inspect.signature(model.forward).parameters


def classes(config: PreTrainedConfig) -> list[str]:
    """The names of a model's classes, in order; names that several have, as "N/A" in COCO's, get their number."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def load_detector(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A detector, with or without masks, and its image processor.

    Raises:
        ValueError: the model is of another kind, or see `load_with_processor`.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(model, **where)
    if not is_detector(config):
        saved = ", ".join(config.architectures or ()) or "no class"
        raise ValueError(f'"{model}" is a {config.model_type} model saved as {saved}, and no detector')
    auto = AutoModelForUniversalSegmentation if has_masks(config) else AutoModelForObjectDetection
    return load_with_processor(auto, model, **where)


def processed(processor: BaseImageProcessor, images: Sequence[Tensor]) -> Batch:
    """What a processor makes of images.

    Args:
        images: uint8 (3, h, w), of any sizes.

    Returns:
        ``pixel_values`` (B, 3, H, W) float32; where there is padding ``pixel_mask`` (B, H, W); ``labels``, a dict for
        each image of orig_size and size (2,) int64, height and width before and after the processor, unpadded.
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
    """An image (3, h, w) whose sides are above zero once the longest is ``longest``, at which processors fail."""
    height, width = image.shape[1:]
    least = 1 if longest is None else -(-max(height, width) // longest)
    if min(height, width) >= least:
        return image
    return resize(image, [max(height, least), max(width, least)])


@torch.inference_mode()
def predict(model: PreTrainedModel, batch: Batch, **options: Any) -> ModelOutput:
    """The output of a model for a batch of `processed`."""
    mask = {"pixel_mask": batch["pixel_mask"]} if "pixel_mask" in batch and takes_mask(model) else {}
    return model(pixel_values=batch["pixel_values"], **mask, **options)


class WholeScenes(SceneTask):
    """Batches for any detector: what its own processor makes of images, with references.

    Args:
        processor: of the model.
        ids, masks: see `SceneTask`.
        may_pad: the model reads where an image ends, or has batches of one image.
    """

    def __init__(self, processor: BaseImageProcessor, ids: Sequence[int], masks: bool = False, may_pad: bool = True):
        self.processor, self.may_pad = processor, may_pad
        self.ids, self.masks = torch.tensor(ids, dtype=torch.int64), masks

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Rows of `scene_rows` or `panoptic_rows` -> what `processed` gives, and images, bad and references.

        Raises:
            ValueError: images are padded, and the model would not know.
        """
        images, references, bad = [], [], []
        for example, index in zip(examples, indices, strict=True):
            try:
                scene = read_scene(example, self.masks)
            except BadImage as error:
                bad.append((index, describe(example[IMAGE], error)))
                continue
            images.append(scene.image.as_subclass(Tensor))
            references.append(self.reference(scene, example))
        if not images:
            return {"images": 0, "bad": bad}
        batch = processed(self.processor, images)
        if "pixel_mask" in batch and not self.may_pad:
            raise ValueError("the model cannot be told which part of an image is padding: give batch_size=1")
        return batch | {"images": len(images), "bad": bad, "references": references}
