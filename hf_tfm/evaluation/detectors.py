"""Detectors of any kind, ours or transformers': loading one, and what its own processor makes of images.

uint8 images of any size -> processor -> one batch -> model -> output, with what takes it back to each image
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BaseImageProcessor,
)

from ..data.images import IMAGE, BadImage, describe
from ..data.scenes import read_scene
from ..hub.detectors import processed
from ..tasks.images import Batch
from ..tasks.scenes import SceneTask


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
