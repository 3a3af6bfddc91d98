"""Parts shared by tasks on images of one size: arguments, rows, image processor, batches and loaders.

{"image", "label"} -> decoded, augmented, stacked: uint8 (B, 3, H, W) -> on the device: (x - mean) / std
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig

from ..arguments import DatasetArguments, ImageDataArguments, ImageScaleArguments
from ..data import images
from ..data.augment import Augmentation, seeded
from ..data.batching import Sample, StepLoader, sample_ref
from ..data.equal_batches import BatchSampler
from ..data.files import data_roots
from ..data.images import IMAGE, BadImage, WatchedLoader, decode, describe
from ..data.pixels import Pixels, as_read, image_processor, image_size_of, pixel_scale, suitable
from ..data.stream import pool_seed
from ..distillation.model_spec import check_processors
from ..hub.external import external_model
from ..hub.loading import load_with_processor
from ..limits import LARGEST_SIDE
from ..memory import check_batch_memory
from ..models.patches import sides
from ..values import check_bounds
from .base import Batch, Collator, Task
from .loaders import placement
from .model_fields import check_fields
from .splits import load_rows
from .streams import ImageStreamArguments, image_stream_loader

IMAGE_SIZE = 224  # default for a new model
# Fields of a configuration that other arguments decide; images are read as RGB.
IMAGE_FIELDS = ("image_size", "num_channels")


@dataclass(kw_only=True)
class ImageArguments(DatasetArguments, ImageDataArguments, ImageScaleArguments, ImageStreamArguments):
    """Training on images of one size.

    Args:
        image_size: pixels of the model's images; default, those of model_name_or_path's image processor, or 224.
        resize: evaluation resizes the shorter edge to this and crops the centre; default, it resizes to image_size.
        augmentation: random changes of training images.
        repeats: copies of a sample in a step, each augmented differently.
    """

    image_size: int | tuple[int, int] | None = None
    resize: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    repeats: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="repeats resize",
            at_most={"repeats": self.batch_size, "resize": LARGEST_SIDE},
        )
        check_bounds("image_size", self.image_size, 1, LARGEST_SIDE)
        if self.resize is not None and self.image_size is not None and self.resize < max(sides(self.image_size)):
            raise ValueError(f"resize must be at least image_size = {self.image_size}, got {self.resize}")
        check_batch_memory(self, sides(self.image_size or IMAGE_SIZE))

    def check_saved(self, config: PreTrainedConfig) -> None:
        """See `ModelArguments`."""
        check_fields(self.head.model_class(config.model_type).config_class, self.model, IMAGE_FIELDS)

    def check_cache(self, cache: str | None, *views: str) -> None:
        """Refuse options that give an image several views in an epoch, together with a cache of a teacher's signals.

        Args:
            cache: its folder; None if there is none.
            views: further options that are on and do so.

        Raises:
            ValueError: with the option.
        """
        if cache:
            for name, on in (
                ("repeats", self.repeats > 1),
                ("streaming", self.streaming),
                *((v, True) for v in views),
            ):
                if on:
                    raise ValueError(f"cache keeps one view of each image in an epoch: turn {name} off")


@dataclass
class ImageCollator:
    """Examples of `image_rows` -> a batch; subclasses add targets.

    Augmentation is a pure function of (seed, epoch, sample). A dummy batch, and one without a readable image, has one
    image of zeros that counts for nothing.

    Args:
        pixels: image processor of the model.
        seed: of everything drawn at random for a sample.
        change: uint8 (3, h, w) -> uint8 (3, H, W), the augmentation of training images; None only resizes.
    """

    pixels: Pixels
    seed: int = 0
    change: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, examples: list[dict[str, Any]], samples: list[Sample], epoch: int, is_dummy: bool = False
    ) -> Batch:
        """Return ``pixel_values`` uint8 (B, 3, H, W); ``images``, the number of them that count; ``indices`` (B,),
        their rows; ``bad``, for `WatchedLoader`; and the `targets`."""
        change = self.change or self.pixels.resize
        found, positions, bad = [], [], []
        with seeded() as seed:
            for position, (example, sample) in enumerate(zip(examples, samples, strict=True)):
                if is_dummy:
                    break
                try:
                    image = decode(example[IMAGE])
                    seed(self.seed, epoch, sample)
                    found.append(change(image))
                except BadImage as error:
                    bad.append((sample_ref(sample).index, describe(example[IMAGE], error)))
                    continue
                positions.append(position)
        count = len(found)
        if not found:
            found, positions = [torch.zeros(3, *self.pixels.size, dtype=torch.uint8)], [0]
        kept = [samples[position] for position in positions]
        rows = torch.tensor([sample_ref(sample).index for sample in kept])
        batch = {"pixel_values": torch.stack(found), "images": count, "indices": rows, "bad": bad}
        return batch | self.targets([examples[position] for position in positions], kept, positions, epoch, count)

    def targets(
        self, examples: list[dict[str, Any]], samples: list[Sample], positions: list[int], epoch: int, count: int
    ) -> Batch:
        """Return what a task adds to a batch.

        Args:
            examples, samples: of the B images in the batch.
            positions: where they were in the micro-batch before unreadable images were dropped.
            count: number of images that count, B or 0.
        """
        return {}


class ImageTask(Task):
    """A task on images of one size."""

    item = sample = "images"
    processor_class, processor_folder = AutoImageProcessor, "processor"
    described_columns: ClassVar[tuple[str, ...]] = ("image_column",)
    cache_options = ("image_size", "resize", "mean", "std", "augmentation")
    labelled: ClassVar[bool] = False

    @cached_property
    def pixels(self) -> Pixels:
        """The image processor in two halves."""
        return Pixels(self.processor)

    def load_splits(self) -> dict[str, Any]:
        """Rows of `image_rows` by split.

        Raises:
            ValueError: a split or column does not exist, or no image of a split can be read.
        """
        args = self.args
        roots = data_roots(args.dataset_name, args.data_files)

        def read(rows: Any) -> Any:
            if not self.labelled:
                return images.image_rows(rows, args.image_column, labelled=False, roots=roots)
            rows = images.image_rows(rows, args.image_column, args.label_column, roots=roots)
            return images.with_class_names(rows, args.class_names) if args.class_names else rows

        splits = load_rows(args, read)
        for name, rows in splits.items():
            images.require_readable(rows, len(rows) if self.evaluating else args.max_bad_images, name)
        return splits

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return images.fingerprint(rows)

    def build_processor(self) -> BaseImageProcessor:
        """An image processor of ``image_size``, by default that of ``model_name_or_path``.

        Raises:
            ValueError: ``model_name_or_path`` has no image processor with a size and scale, and none is given.
        """
        args = self.args
        size = args.image_size or IMAGE_SIZE
        if args.image_size is None and args.model_name_or_path:
            try:
                size = image_size_of(as_read(args.model_name_or_path, args.trust_remote_code))
            except ValueError as error:
                raise ValueError(f"model_name_or_path: {error}, or give image_size, mean and std") from error
        return image_processor(
            size, args.resize, *pixel_scale(args.model_name_or_path, args.mean, args.std, args.trust_remote_code)
        )

    def build_student_processor(self) -> BaseImageProcessor:
        """The student's image processor, with the teacher's size and scale.

        Raises:
            ValueError: an argument, or ``model_name_or_path``, contradicts the teacher.
        """
        args = self.args
        teacher: Any = as_read(args.teacher, args.trust_remote_code)
        size = args.image_size or (teacher.size.height, teacher.size.width)
        scale = args.mean or tuple(teacher.image_mean), args.std or tuple(teacher.image_std)
        check_processors(image_processor(size, None, *scale), teacher)
        if args.model_name_or_path:
            check_processors(as_read(args.model_name_or_path, args.trust_remote_code), teacher)
        return image_processor(size, args.resize, *scale)

    def load_pretrained(self) -> None:
        """See `Task`; the model in float32.

        Raises:
            ValueError: weights or the processor are missing, images are not RGB or have no fixed size.
        """
        external = external_model(self.args.model)
        if external is None:
            model, processor = load_with_processor(self.auto_class, self.args.model, **self.args.pretrained)
        else:
            model, processor = external.load(self.args.weights, self.args.random_weights)
        self.model, self.processor = model, suitable(processor)

    def augment(self) -> Callable[[Tensor], Tensor]:
        """The augmentation of training images."""
        p = self.pixels
        return self.args.augmentation.transform(p.size, p.interpolation, p.mean, p.std, p.resize)

    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> WatchedLoader:
        """See `Task`."""
        args, rows, collate = self.args, self.splits[split], collate or self.collator(split, training)
        place = placement(args, self.accelerator)
        if self.evaluating:
            sampler = BatchSampler(len(rows), args.batch_size, shuffle=False)
            return WatchedLoader(StepLoader(rows, sampler, collate, **place), args.max_bad_images, args.progress)
        place["micro_batch_tokens"] = args.micro_batch_size
        options: dict[str, Any] = {"repeats": args.repeats, "unit": self.unit} if training else {"shuffle": False}
        if training and args.streaming:

            def of_pool(sizes: np.ndarray, first: int) -> BatchSampler:
                return BatchSampler(len(sizes), args.batch_size, pool_seed(args.seed, first), **options)

            stream = image_stream_loader(args, self.accelerator, collate, rows, of_pool)
            return WatchedLoader(stream, args.max_bad_images)
        if training:
            options["drop_last"] = len(rows) > args.batch_size
        sampler = BatchSampler(len(rows), args.batch_size, args.seed, **options)
        return WatchedLoader(StepLoader(rows, sampler, collate, **place), args.max_bad_images)

    @property
    def unit(self) -> int:
        """Number of training images that must stay together, see `BatchSampler`."""
        return 1

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`: images (B, 3, H, W)."""
        return {"pixel_values": self.pixels.scale(batch["pixel_values"])}

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        return {"pixel_values": torch.zeros(1, 3, *self.pixels.size)}
