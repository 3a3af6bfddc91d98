"""Speed of loading, augmenting and batching images, against a PIL pipeline.

python -m benchmarks image_loading --dataset DATA [--num_workers 8]

  ours      torchvision's decoder, v2 transforms on uint8 tensors, seeded per sample; normalized per batch
  pil       PIL's decoder, torchvision's v1 transforms, ToTensor and Normalize per image, torch's DataLoader

Both give normalized float32 batches on the host; "ours, uint8" leaves normalization to the device, as when training on
a GPU. There are two kinds of images: those of the data set, shifted by up to 4 pixels and flipped, as is usual for
CIFAR; and synthetic photo-like JPEGs, 500 x 375, with a random crop resized to 224 x 224 and flipped, as is usual for
ImageNet.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torchvision import transforms

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.data.augment import Augmentation
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import encoded, image_rows
from hf_tfm.data.pixels import image_processor
from hf_tfm.data.source import load_splits
from hf_tfm.tasks.image_classification import ImageClassificationTask

from . import common

PHOTO = (375, 500)  # height, width; close to ImageNet's mean


def photo(seed: int, quality: int = 90) -> bytes:
    """A JPEG with the spectrum of photographs: amplitudes fall as 1 / frequency (Field 1987)."""
    random = np.random.default_rng(seed)
    height, width = PHOTO
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(random.normal(size=(3, height, width))) / frequency
    pixels = np.fft.irfft2(spectrum, s=PHOTO)
    pixels = pixels[:1] + 0.3 * pixels[1:].repeat(2, axis=0)[:3]  # mostly gray, like photos
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return file.getvalue()


class PilImages(torch.utils.data.Dataset):
    """The peer's data set: encoded images in memory, transformed by ``transform``."""

    def __init__(self, images: list[bytes], labels: list[int], transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with PILImage.open(io.BytesIO(self.images[index])) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def implementations(
    rows: Dataset, size: int, augmentation: Augmentation, first: Callable, batch_size: int, num_workers: int
) -> dict[str, Callable[[int], Iterator[torch.Tensor]]]:
    """The pipelines over the same images: epoch number -> its batches.

    Args:
        first: the peer's transform that replaces the crop of ``augmentation``.
    """
    processor = image_processor(size)
    model = TfmViTForImageClassification(TfmViTConfig.of_size("tiny", image_size=size, num_labels=10))
    task = ImageClassificationTask.for_model(model, processor, augmentation=augmentation)
    sampler = BatchSampler(len(rows), batch_size, drop_last=True)
    loader = StepLoader(rows, sampler, task.collator(training=True), num_workers=num_workers)
    transform = transforms.Compose(
        [
            first,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    images = PilImages([encoded(row["image"]) for row in rows], rows["label"][:], transform)
    peer = DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=num_workers)

    def ours_uint8(number: int) -> Iterator[torch.Tensor]:
        return (batch["pixel_values"] for (batch,) in loader.epoch(number))

    return {
        "ours": lambda number: map(task.pixels.scale, ours_uint8(number)),
        "ours, uint8": ours_uint8,
        "pil": lambda number: (pixels for pixels, _ in peer),
    }


def measure(pipelines: dict[str, Callable[[int], Iterator]], rounds: int, **facts: Any) -> dict[str, Any]:
    """Rates and their ratios."""

    def images(batches: Callable[[int], Iterator]) -> Callable[[int], int]:
        return lambda number: sum(map(len, batches(number)))

    rates = common.interleaved({name: images(batches) for name, batches in pipelines.items()}, rounds)
    medians = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
    ratios = {name: round(common.ratio(rates, name, "pil"), 2) for name in rates if name != "pil"}
    return {**facts, "images_per_second": medians, "ratios": ratios}


def main(
    dataset: str = "uoft-cs/cifar10",
    batch_size: int = 128,
    small_images: int = 4096,
    photos: int = 512,
    num_workers: int = 0,
    rounds: int = 5,
) -> None:
    """Measure and write benchmarks/results/image_loading.json.

    Args:
        dataset: small square images with labels 0 to 9; a Hub id or a local folder.
        batch_size: images per batch.
        small_images, photos: images of each kind per epoch; an epoch is a round.
        num_workers: worker processes; 0 uses one thread of this process. Their start-up time is included.
        rounds: timed rounds.
    """
    torch.set_num_threads(1)
    small = image_rows(load_splits(dataset)["test"]).select(range(small_images))
    side = PILImage.open(io.BytesIO(encoded(small[0]["image"]))).width
    files = [photo(seed) for seed in range(min(photos, 64))]
    columns = {"image": [files[i % len(files)] for i in range(photos)], "label": [i % 10 for i in range(photos)]}
    large = image_rows(Dataset.from_dict(columns).cast_column("image", Image()))
    bicubic = transforms.InterpolationMode.BICUBIC
    shift = implementations(
        small, side, Augmentation(crop="pad"), transforms.RandomCrop(side, 4), batch_size, num_workers
    )
    crop = implementations(
        large,
        224,
        Augmentation(),
        transforms.RandomResizedCrop(224, interpolation=bicubic),
        min(batch_size, photos),
        num_workers,
    )
    common.write(
        "image_loading",
        {
            "dataset": dataset,
            "num_workers": num_workers,
            "torchvision": torchvision.__version__,
            "results": {
                f"{side} x {side}, shift and flip": measure(shift, rounds, images=small_images),
                "500 x 375, random crop to 224 and flip": measure(
                    crop, rounds, images=photos, kilobytes=round(sum(map(len, files)) / len(files) / 1000, 1)
                ),
            },
        },
    )
