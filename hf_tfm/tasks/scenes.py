"""What tasks on scenes share: images of different sizes in one uint8 batch, padded, with their objects as targets.

    row -> `read_scene` -> changed -> on one canvas: uint8 (B, 3, H, W) and mask -> on the device: (x - mean) / std

In evaluation, a batch is what transformers' `DetrImageProcessor` makes of the same images; see `SceneTask.collate`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, DetrImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.augment import seeded
from ..data.images import IMAGE, BadImage, describe
from ..data.pixels import Scale
from ..data.scene_augment import SceneAugmentation, chances, scaled
from ..data.scenes import Scene, empty_scene, read_scene
from ..data.shape_batches import split_number
from ..models.boxes import xyxy_to_cxcywh
from .images import Batch

PLACEHOLDER = (64, 64)  # height and width of an image that counts for nothing


def scene_processor(
    size: int = 800,
    max_size: int = 1333,
    mean: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_MEAN),
    std: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_STD),
) -> DetrImageProcessor:
    """The image processor of a new model.

    Args:
        size: pixels of the shortest side in evaluation.
        max_size: limit of the longest side.
        mean, std: of the channels, of pixels in [0, 1].

    Raises:
        ValueError: ``size`` is below 1, or above ``max_size``.
    """
    if not 1 <= size <= max_size:
        raise ValueError(f"size must be in [1, max_size = {max_size}], got {size}")
    edges = {"shortest_edge": size, "longest_edge": max_size}
    return DetrImageProcessor(size=edges, image_mean=list(mean), image_std=list(std))


class PaddedPixels(Scale):
    """`DetrImageProcessor` in two halves: resizing on the host, in uint8, and the model's scale on the device.

    Args:
        processor: see `Scale`.

    Raises:
        ValueError: it does not resize to a shortest and a longest side, or does not pad; and see `Scale`.
    """

    def __init__(self, processor: BaseImageProcessor):
        super().__init__(processor)
        self.shortest, self.longest = processor.size.shortest_edge, processor.size.longest_edge
        if not (processor.do_resize and self.shortest and self.longest):
            raise ValueError(f"processor must resize to shortest_edge and longest_edge, got size {processor.size}")
        if not processor.do_pad or processor.pad_size:
            raise ValueError("processor must pad images to the largest of a batch (do_pad, and no pad_size)")

    def resize(self, scene: Scene) -> Scene:
        """A scene in the size of evaluation."""
        height, width = scaled(np.array([scene.size]), self.shortest, self.longest)[0].tolist()
        return scene.resize(height, width, self.interpolation)

    def scale_padded(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Images as the model reads them, padding 0.

        Args:
            pixels: uint8 (B, 3, H, W).
            mask: (B, H, W) bool, True where there is an image.

        Returns:
            (B, 3, H, W) float32.
        """
        return self.scale(pixels).masked_fill_(~mask[:, None], 0.0)


class SceneTask:
    """Batches of scenes; tasks add losses.

    Args:
        processor: of the model.
        ids: of `category_ids`, from a category of the rows to a class of the model.
        augmentation: of training scenes; None treats them as those of evaluation.
        masks: targets and references have masks.
        seed: of everything drawn at random for a scene; the same as the `ShapeSampler`'s.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        ids: Sequence[int],
        augmentation: SceneAugmentation | None = None,
        masks: bool = False,
        seed: int = 0,
    ):
        self.pixels, self.ids = PaddedPixels(processor), torch.tensor(ids, dtype=torch.int64)
        self.augmentation, self.masks, self.seed = augmentation, masks, seed

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Rows of `scene_rows` or `panoptic_rows` -> a batch for evaluation.

        Objects marked as crowds are no targets, as in the authors' code, but references. A hidden batch, and one of
        which no image can be read, has an image of zeros, without objects, that counts for nothing.

        Returns:
            ``pixel_values`` uint8 (B, 3, H, W), 0 below and to the right of an image; ``pixel_mask`` (B, H, W) bool,
            True where there is an image; ``images``, how many of them count; ``indices`` (B,) their rows; ``bad``, for
            `WatchedLoader`; ``labels``, a dict for each image of class_labels (n,) int64, boxes (n, 4) float32 (centre
            x, y, width, height, in shares of the unpadded image), area (n,) float32 in pixels, iscrowd (n,) int64,
            image_id (1,), orig_size (2,) and size (2,) int64 (height and width, before and after resizing, unpadded),
            and masks (n, H, W) bool where they are asked for.

            For evaluation ``references`` as well, what `CocoAP` and `PanopticQuality` take, in NumPy so that they stay
            on the host: image_id, boxes (left, top, right, bottom in pixels of the original), labels, area, iscrowd,
            and masks, or segmentation and segments_info.
        """
        return self.make_batch(examples, indices, epoch, hidden, training=False)

    def collate_training(
        self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False
    ) -> Batch:
        """The same for training, without references: scenes are changed, as a function of (seed, epoch, row) alone.

        Scenes of a `ShapeSampler` fill their step's canvas, so a step is the same however it is cut.
        """
        return self.make_batch(examples, indices, epoch, hidden, training=True)

    def make_batch(
        self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool, training: bool
    ) -> Batch:
        """See `collate`."""
        scenes, sources, references, bad = [], [], [], []
        canvas = None
        with seeded() as seed:
            for example, number in zip(examples, indices, strict=True):
                if hidden:
                    break
                row, place = split_number(number)
                try:
                    original = read_scene(example, self.masks)
                except BadImage as error:
                    bad.append((number, describe(example[IMAGE], error)))
                    continue
                if training and self.augmentation is not None:
                    seed(self.seed, epoch, row)
                    drawn, canvas = chances(self.seed, epoch, row)[0], place
                    scenes.append(self.augmentation(original, drawn, canvas, self.pixels.interpolation))
                else:
                    scenes.append(self.pixels.resize(original))
                sources.append((row, example["image_id"], original.size))
                if not training:
                    references.append(self.reference(original, example))
        count = len(scenes)
        if not scenes:
            scenes = [empty_scene(PLACEHOLDER)]
            sources = [(split_number(indices[0])[0], examples[0]["image_id"], PLACEHOLDER)]
        canvas = canvas or tuple(np.max([scene.size for scene in scenes], axis=0).tolist())
        pixels, mask = pad_images(scenes, canvas)
        targets = [self.targets(scene, canvas, *of) for scene, (_, *of) in zip(scenes, sources, strict=True)]
        batch = {"pixel_values": pixels, "pixel_mask": mask, "labels": targets, "images": count, "bad": bad}
        batch["indices"] = torch.tensor([row for row, *_ in sources])
        return batch if training else batch | {"references": references}

    def targets(
        self, scene: Scene, canvas: tuple[int, int], image_id: int, orig_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What a model is to find in a scene; see `collate`."""
        size = scene.size
        scene = scene.keep(~scene.iscrowd)
        sides = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
        target = {
            "class_labels": self.ids[scene.labels],
            "boxes": xyxy_to_cxcywh(scene.boxes.as_subclass(Tensor)) / sides,
            "area": scene.area,
            "iscrowd": scene.iscrowd.long(),
            "image_id": torch.tensor([image_id]),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor(size),
        }
        return target | ({"masks": scene.object_masks(canvas)} if self.masks else {})

    def reference(self, scene: Scene, example: dict[str, Any]) -> dict[str, Any]:
        """What a scene's predictions are compared with; see `collate`."""
        classes = self.ids[scene.labels]
        # Copies: a worker moves tensors of the targets to shared memory, away from under arrays that look into them.
        reference = {
            "image_id": example["image_id"],
            "boxes": scene.boxes.as_subclass(Tensor).numpy().copy(),
            "labels": classes.numpy(),
            "area": scene.area.numpy().copy(),
            "iscrowd": scene.iscrowd.numpy().copy(),
        }
        if self.masks:
            reference["masks"] = scene.object_masks().numpy()
        if scene.ids is not None:
            reference["segmentation"] = scene.masks.as_subclass(Tensor)[0].numpy()
            found = zip(scene.ids.tolist(), classes.tolist(), scene.iscrowd.tolist(), strict=True)
            reference["segments_info"] = [
                {"id": i, "category_id": category, "iscrowd": crowd} for i, category, crowd in found
            ]
        return reference


def pad_images(scenes: list[Scene], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images on canvases of zeros, uint8 (B, 3, H, W), and where they are, (B, H, W) bool."""
    pixels = torch.zeros(len(scenes), 3, *canvas, dtype=torch.uint8)
    mask = torch.zeros(len(scenes), *canvas, dtype=torch.bool)
    for i, scene in enumerate(scenes):
        height, width = scene.size
        pixels[i, :, :height, :width] = scene.image
        mask[i, :height, :width] = True
    return pixels, mask
