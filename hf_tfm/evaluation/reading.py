"""What evaluations of image models read: the model with its processor, the images, and how fast both go."""

import time
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling, SizeDict

from ..data.batching import StepLoader
from ..data.equal_batches import BatchSampler
from ..data.files import data_roots
from ..data.images import WatchedLoader, image_rows, require_readable
from ..data.source import first as first
from ..data.source import load_splits, take_split
from ..hub.loading import load_image_processor, load_model
from ..tasks.evaluation import one_process as one_process
from ..tasks.images import ImageTask, Pixels
from ..tasks.scenes import SceneTask


def load_image_model(
    auto_class: Any, model: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, Any]:
    """Model, in float32, and image processor of a folder or a Hub id; the processor as `ImageTask` takes one.

    Raises:
        ValueError: see `load_with_processor`; or images have no fixed size.
    """
    loaded, processor = load_with_processor(auto_class, model, revision, trust_remote_code)
    return loaded, suitable(processor)


def load_with_processor(
    auto_class: Any, model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Model, in float32, and image processor of a folder or a Hub id.

    Raises:
        ValueError: some weights or the processor were not saved, or images have other channels than RGB.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded = load_model(auto_class, model, **options)
    if (channels := getattr(loaded.config, "num_channels", 3)) != 3:
        raise ValueError(f'num_channels of "{model}" must be 3, as images are read as RGB, got {channels}')
    return loaded, load_image_processor(model, **options)


class WholeProcessor:
    """Any image processor, as `Pixels` reads one: all that it does counts as resizing, and no scale is left.

    Args:
        processor: one of transformers', or one that came with a model.

    Raises:
        ValueError: its images have no fixed size.
    """

    backend, resample, crop_size = "torchvision", PILImageResampling.BICUBIC, None
    do_resize, do_center_crop, do_rescale, do_normalize = True, False, False, False

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor
        shapes = {tuple(self.resize(torch.zeros(3, *size, dtype=torch.uint8)).shape[-2:]) for size in SHAPES}
        if len(shapes) > 1:
            raise ValueError(f"{type(processor).__name__} must give images of a fixed size, got {sorted(shapes)}")
        height, width = shapes.pop()
        self.size = SizeDict(height=height, width=width)

    def resize(self, image: Tensor, *_: Any) -> Tensor:
        """uint8 (3, h, w) -> float32 (3, H, W), as the model reads it."""
        picture = to_pil_image(image)  # timm's processor would not take a tensor of uint8; all take pictures
        return torch.as_tensor(self.processor(images=picture, return_tensors="pt")["pixel_values"][0])


SHAPES = ((53, 67), (67, 53))  # of images to try a processor with


def suitable(processor: BaseImageProcessor) -> Any:
    """The processor where `Pixels` can do its work in two halves, and otherwise `WholeProcessor`."""
    image = torch.arange(3 * 53 * 67).remainder(251).byte().view(3, *SHAPES[0])
    whole = WholeProcessor(processor)
    try:
        halves = Pixels(processor)
        seen = halves.scale(halves.resize(image)[None])[0]
    except (AttributeError, TypeError, ValueError):  # it has other methods, or fields with another meaning
        return whole
    expected = whole.resize(image)
    return processor if seen.shape == expected.shape and torch.allclose(seen, expected, atol=1e-4) else whole


def read_split(
    dataset_name: str,
    split: str,
    dataset_config: str | None,
    dataset_revision: str | None,
    data_files: dict[str, str | list[str]] | None,
    image_column: str | None,
    label_column: str | None = None,
    labelled: bool = True,
) -> datasets.Dataset:
    """A split as `image_rows`."""
    splits = load_splits(dataset_name, dataset_config, dataset_revision, data_files)
    roots = data_roots(dataset_name, data_files)
    rows = image_rows(take_split(splits, split, "split"), image_column, label_column, labelled, roots)
    require_readable(rows, len(rows), split)
    return rows


class EvaluationLoader(WatchedLoader):
    """All images once, with a progress bar; in order, unless a sampler has another.

    Args:
        task: its ``collate`` makes the batches.
        max_bad_images: see `WatchedLoader`.
        sampler: another order; then ``batch_size`` is the sampler's.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        task: ImageTask | SceneTask,
        batch_size: int,
        num_workers: int,
        max_bad_images: int,
        pin_memory: bool,
        progress: bool,
        sampler: BatchSampler | None = None,
    ):
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        sampler = sampler or BatchSampler(len(rows), batch_size, shuffle=False)
        loader = StepLoader(rows, sampler, task.collate, num_workers=num_workers, pin_memory=pin_memory)
        super().__init__(loader, max_bad_images)
        self.progress = progress

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """See `StepLoader`."""
        steps = super().epoch(epoch, start)
        yield from tqdm(steps, total=self.steps_per_epoch(), unit="batch", disable=not self.progress)


class Stopwatch:
    """Images a second of a model alone and of all that is done inside the block.

    A model's first pass, in which kernels are chosen and memory is found, counts for it only where there is no other.
    """

    def __init__(self, model: nn.Module):
        self.model, self.passes = model, []

    def __enter__(self) -> "Stopwatch":
        self.hooks = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, with_kwargs=True),
        ]
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        for hook in self.hooks:
            hook.remove()

    def now(self) -> float:
        """The time when the device has done what it was told so far."""
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return time.perf_counter()

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The model begins."""
        self.began = self.now()

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The model has ended."""
        self.passes.append((len(kwargs["pixel_values"]), self.now() - self.began))

    def throughput(self, images: int) -> dict[str, float]:
        """Images a second: ``model`` alone, and ``whole`` with reading and resizing.

        Args:
            images: that were read.
        """
        counts, seconds = zip(*(self.passes[1:] or self.passes), strict=True)
        return {"model": sum(counts) / sum(seconds), "whole": images / self.seconds}
