"""Images of different sizes with their objects: arguments and collators of detection and panoptic segmentation.

    row -> `read_scene` -> augmented, or resized -> padded: uint8 (B, 3, H, W), mask -> on the device: (x - mean) / std

In the evaluation of a run, a batch equals the output of transformers' `DetrImageProcessor`, see `SceneCollator`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..arguments import DatasetArguments, ImageDataArguments, ImageScaleArguments
from ..data.augment import seeded
from ..data.batching import Sample, sample_ref
from ..data.images import IMAGE, BadImage, describe
from ..data.pixels import PaddedPixels
from ..data.scenes import Scene, SceneAugmentation, chances, empty_scene, read_scene
from ..hub.detectors import processed
from ..hub.loading import check_config_file, explained
from ..hub.pretrained import OBJECTS
from ..limits import LARGEST_SIDE
from ..models.boxes import xyxy_to_cxcywh
from ..models.configuration_backbone import source_of
from ..models.image_backbones import may_have_batch_norms
from .base import Batch
from .model_fields import check_fields, new_config
from .streams import ImageStreamArguments

SCENE_FIELDS = ("thing_ids", "num_channels")  # of a configuration: the data's
PLACEHOLDER = (64, 64)  # height and width of the image of a dummy batch


@dataclass(kw_only=True)
class SceneArguments(DatasetArguments, ImageDataArguments, ImageScaleArguments, ImageStreamArguments):
    """Training a detector on images of any size.

    Fields of ``model`` are, among others, num_queries and encoder_layers.

    Args:
        backbone: backbone of a new model: name of a timm model; or folder or Hub id of a timm model, or of a ViT,
            masked autoencoder, Swin or other model with feature maps, for instance a run of mae_pretrain. Default:
            model.backbone, or that of the size.
        shortest_side: shortest side of the images in evaluation, in pixels.
        longest_side: limit of the longest side in evaluation.
        augmentation: random changes of training images.
        pretrained_backbone: load timm's weights, or those of the folder, into the backbone of a new model, and freeze
            its batch norms unless ``model`` says otherwise; default, if backbone is a folder or Hub id.
        num_pictures: number of validation images drawn with their predictions at every evaluation, see
            `PredictionPictures`.
    """

    accepted_models: ClassVar = OBJECTS
    new_model_options: ClassVar = (
        *("architecture", "size", "model", "backbone", "pretrained_backbone", "rate_factors"),
    )
    data_fields: ClassVar = ("num_queries", "nms_threshold")

    architecture: str = "detr"
    shortest_side: int = 800
    longest_side: int = 1333
    augmentation: SceneAugmentation = field(default_factory=SceneAugmentation)
    backbone: str | None = None
    pretrained_backbone: bool | None = None
    num_pictures: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="num_pictures",
            at_least_1="shortest_side longest_side",
            at_most={"num_pictures": 100, "longest_side": LARGEST_SIDE},
        )
        if self.shortest_side > self.longest_side:
            raise ValueError(
                f"shortest_side must be at most longest_side = {self.longest_side}, got {self.shortest_side}"
            )
        if self.model_name_or_path:
            for name in ("pretrained_backbone", "backbone"):
                if getattr(self, name):
                    raise ValueError(f"model_name_or_path has its own backbone: do not give {name} with it")
            self.pretrained_backbone = False
            return
        if self.backbone is not None:
            self.model = {**self.model, "backbone": self.backbone}
        check_fields(self.config_class, self.model, SCENE_FIELDS)
        if self.pretrained_backbone is None:
            self.pretrained_backbone = self.backbone_source is not None
        if self.pretrained_backbone:
            norm = getattr(self.config_class.of_size(self.size), "backbone_norm", "frozen")
            self.model = {**({} if norm == "frozen" else {"backbone_norm": "frozen"}), **self.model}
        if self.backbone_source is None:
            self.check_backbone(new_config(self.config_class, self))

    def check_files(self) -> None:
        """See `ModelArguments`; the backbone."""
        if self.model_name_or_path or (source := self.backbone_source) is None:
            return
        if (path := Path(source) / CONFIG_NAME).is_file():
            with explained("backbone", source, code_option=False):
                check_config_file(path, named=False)
        self.check_backbone(new_config(self.config_class, self))

    @property
    def backbone_source(self) -> str | None:
        """Folder or Hub id that the backbone of a new model is read from; None for the name of a timm model."""
        return source_of(self.model.get("backbone"))

    def check_backbone(self, config: PreTrainedConfig) -> None:
        """Refuse a backbone of a new model that the task cannot train, or whose norms do not fit its weights.

        Raises:
            ValueError: gives the reason.
        """
        norm = getattr(config, "backbone_norm", None)
        if norm is None and self.pretrained_backbone:
            raise ValueError(f"pretrained_backbone is for families with a timm backbone, not {self.architecture}")
        if norm is None or not may_have_batch_norms(config):
            return
        if norm == "frozen" and not self.pretrained_backbone:
            raise ValueError(
                'model.backbone_norm "frozen" is for pretrained weights: give pretrained_backbone, '
                'model_name_or_path, or backbone_norm "batch" or "group"'
            )
        if norm == "group" and self.pretrained_backbone:
            raise ValueError(
                'pretrained_backbone has batch norms: model.backbone_norm must be "frozen" or "batch", got "group"'
            )

    def check_saved(self, config: PreTrainedConfig) -> None:
        """See `ModelArguments`."""
        check_fields(self.head.model_class(config.model_type).config_class, self.model, SCENE_FIELDS)
        if "backbone" in self.model and getattr(config, "backbone_config", None) is not None:
            raise ValueError("model_name_or_path has its own backbone: do not give model.backbone with it")

    @property
    def divides_steps(self) -> bool:
        """True if a step has several micro-batches in a process."""
        return (self.micro_batch_size or self.batch_size) < self.batch_size


@dataclass
class SceneCollator:
    """Rows of `scene_rows` or `panoptic_rows` -> a batch.

    Objects marked as crowds are no targets, as in the authors' code, but are among the references. An image that
    cannot be read is left out. A dummy batch, and one of which no image can be read, has a black image without
    objects. Training images of a `ShapeSampler` are padded to the canvas of their step, so a step is the same however
    it is divided.

    The batch has

        pixel_values  (B, 3, H, W) uint8, 0 below and to the right of an image
        pixel_mask    (B, H, W) bool, True for image and False for padding
        padded        whether there is padding
        images        number of images that count, B or 0
        indices       (B,) their rows
        bad           for `WatchedLoader`
        labels        for each image class_labels (n,) int64, boxes (n, 4) float32 (cxcywh relative to the unpadded
                      image), area (n,) float32 in pixels, iscrowd (n,) int64, image_id (1,), orig_size (2,) and size
                      (2,) int64 (height and width before and after resizing, unpadded), and with ``masks`` masks
                      (n, H, W) bool
        references    in evaluation; see `reference`

    Args:
        pixels: resizes images of evaluation.
        class_ids: class of the model for each category of the rows.
        masks: targets have masks.
        training: augment images, as a pure function of (seed, epoch, row).
        augmentation: of training images; None resizes them as in evaluation.
        seed: must equal that of the `ShapeSampler`.
    """

    pixels: PaddedPixels
    class_ids: Sequence[int]
    masks: bool = False
    training: bool = False
    augmentation: SceneAugmentation | None = None
    seed: int = 0

    def __call__(
        self, examples: list[dict[str, Any]], samples: list[Sample], epoch: int, is_dummy: bool = False
    ) -> Batch:
        scenes, sources, references, bad = [], [], [], []
        canvas = None
        with seeded() as seed:
            for example, sample in zip(examples, map(sample_ref, samples), strict=True):
                row = sample.index
                if sample.copy:
                    raise ValueError(f"sample {row} is copy {sample.copy}: scenes cannot be repeated in a step")
                if is_dummy:
                    break
                try:
                    original = read_scene(example, self.masks)
                except BadImage as error:
                    bad.append((row, describe(example[IMAGE], error)))
                    continue
                if self.training and self.augmentation is not None:
                    seed(self.seed, epoch, row)
                    drawn, canvas = chances(self.seed, epoch, row)[0], sample.canvas
                    scenes.append(self.augmentation(original, drawn, canvas, self.pixels.interpolation))
                else:
                    scenes.append(self.pixels.resize(original))
                sources.append((row, example["image_id"], original.size))
                if not self.training:
                    references.append(reference(original, example["image_id"], self.class_ids, self.masks))
        count = len(scenes)
        if not scenes:
            scenes = [empty_scene(PLACEHOLDER)]
            sources = [(sample_ref(samples[0]).index, examples[0]["image_id"], PLACEHOLDER)]
        canvas = canvas or tuple(np.max([scene.size for scene in scenes], axis=0).tolist())
        pixels, mask = pad_images(scenes, canvas)
        targets = [self.targets(scene, canvas, *source[1:]) for scene, source in zip(scenes, sources, strict=True)]
        batch = {"pixel_values": pixels, "pixel_mask": mask, "padded": not bool(mask.all()), "labels": targets}
        batch |= {"images": count, "indices": torch.tensor([row for row, *_ in sources]), "bad": bad}
        return batch if self.training else batch | {"references": references}

    def targets(
        self, scene: Scene, canvas: tuple[int, int], image_id: int, orig_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return the ``labels`` of an image."""
        size = scene.size
        scene = scene.keep(~scene.iscrowd)
        sides = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
        target = {
            "class_labels": torch.tensor(self.class_ids, dtype=torch.int64)[scene.labels],
            "boxes": xyxy_to_cxcywh(scene.boxes.as_subclass(Tensor)) / sides,
            "area": scene.area,
            "iscrowd": scene.iscrowd.long(),
            "image_id": torch.tensor([image_id]),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor(size),
        }
        return target | ({"masks": scene.object_masks(canvas)} if self.masks else {})


@dataclass
class ProcessorCollator:
    """Rows of `scene_rows` or `panoptic_rows` -> a batch for the evaluation of any detector.

    The batch has the output of `processed`, the number of ``images``, ``bad`` and ``references``, see `SceneCollator`.

    Args:
        processor: of the model.
        class_ids: see `SceneCollator`.
        takes_mask: the model takes a mask of padding.

    Raises:
        ValueError: several images are padded, and the model does not take a mask.
    """

    processor: BaseImageProcessor
    class_ids: Sequence[int]
    takes_mask: bool

    def __call__(
        self, examples: list[dict[str, Any]], samples: list[Sample], epoch: int, is_dummy: bool = False
    ) -> Batch:
        images, references, bad = [], [], []
        for example, sample in zip(examples, map(sample_ref, samples), strict=True):
            try:
                scene = read_scene(example)
            except BadImage as error:
                bad.append((sample.index, describe(example[IMAGE], error)))
                continue
            images.append(scene.image.as_subclass(Tensor))
            references.append(reference(scene, example["image_id"], self.class_ids))
        batch = processed(self.processor, images) if images else {}
        if "pixel_mask" in batch and not self.takes_mask:
            if len(images) > 1:
                raise ValueError("the model has no input that marks padding: give batch_size=1")
            del batch["pixel_mask"]
        batch["padded"] = "pixel_mask" in batch
        return batch | {"images": len(images), "bad": bad, "references": references}


def reference(scene: Scene, image_id: int, class_ids: Sequence[int], masks: bool = False) -> dict[str, Any]:
    """Return the objects of an image as `CocoAP` and `PanopticQuality` take them, in NumPy so that they stay on the
    host.

    They are image_id, boxes (xyxy in pixels of the original image), labels, area, iscrowd, of a panoptic map also
    segmentation and segments_info, and if asked for masks.
    """
    classes = torch.tensor(class_ids, dtype=torch.int64)[scene.labels]
    # Copies: a worker moves tensors of the targets to shared memory, which leaves views of them without data.
    found = {
        "image_id": image_id,
        "boxes": scene.boxes.as_subclass(Tensor).numpy().copy(),
        "labels": classes.numpy(),
        "area": scene.area.numpy().copy(),
        "iscrowd": scene.iscrowd.numpy().copy(),
    }
    if masks:
        found["masks"] = scene.object_masks().numpy()
    if scene.ids is not None:
        segments = zip(scene.ids.tolist(), classes.tolist(), scene.iscrowd.tolist(), strict=True)
        found["segmentation"] = scene.masks.as_subclass(Tensor)[0].numpy()
        found["segments_info"] = [
            {"id": i, "category_id": category, "iscrowd": crowd} for i, category, crowd in segments
        ]
    return found


def pad_images(scenes: list[Scene], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pad images with zeros to one size: uint8 (B, 3, H, W), and their mask (B, H, W) bool."""
    pixels = torch.zeros(len(scenes), 3, *canvas, dtype=torch.uint8)
    mask = torch.zeros(len(scenes), *canvas, dtype=torch.bool)
    for i, scene in enumerate(scenes):
        height, width = scene.size
        pixels[i, :, :height, :width] = scene.image
        mask[i, :height, :width] = True
    return pixels, mask
