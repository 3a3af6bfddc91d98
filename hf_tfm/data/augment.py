"""Augmentation of training images: torchvision transforms on uint8 tensors, and mixing of two images.

    uint8 (3, h, w) -> crop -> flip -> RandAugment or colour jitter -> erasing -> uint8 (3, H, W)

The augmentation of a sample is a pure function of (seed, epoch, sample index): see `seeded`, `Mixing`.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ..values import check_bounds, conform_fields
from .batching import Sample, key_of, rng

# timm, DeiT and MAE use RandAugment magnitudes from 0 to 10; torchvision's default range is 0 to 30.
MAGNITUDES = 11


@contextmanager
def seeded() -> Iterator[Callable[..., None]]:
    """Yield ``seed(*key)``, which seeds torch's CPU generator, the one torchvision uses; restore its state on exit.

    A key consists of integers of at most 64 bits. ``torch.manual_seed`` does the same but is 100 times slower, because
    it seeds every device.
    """
    with torch.random.fork_rng(devices=[]):
        yield lambda *key: torch.default_generator.manual_seed(hash_key(*key))


def hash_key(*key: Sample) -> int:
    """Hash a key of integers and samples to 64 bits that depend on every bit of it, in about 1 µs; the same on every
    machine."""
    packed = struct.pack(f"<{len(key)}q", *map(key_of, key))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images. The defaults are the Inception-style crop and flip commonly used for ImageNet.

    Args:
        crop: "resized" resizes a random part of the image, "pad" resizes and shifts the image (common for CIFAR),
            "none" preprocesses as in evaluation.
        scale: minimum and maximum fraction of the image area covered by a "resized" crop.
        ratio: minimum and maximum aspect ratio (width / height) of a "resized" crop.
        padding: number of zero pixels added on each side before a "pad" crop.
        flip: probability of a horizontal flip.
        rand_augment: number of torchvision RandAugment operations per image; 0 disables RandAugment.
        magnitude: magnitude of the RandAugment operations, 0 to 10.
        color_jitter: maximum relative change of brightness, contrast and saturation, in [0, 1]; 0 disables it.
        erasing: probability of replacing a rectangle with noise that is standard normal after normalisation (timm's
            "pixel" mode).

    RandAugment differs from timm's "rand-m9-mstd0.5-inc1", which DeiT and MAE use. timm applies each drawn operation
    with probability 0.5, here it is always applied; timm draws the magnitude around 9 with a standard deviation of
    0.5, here it is exactly 9; timm draws from 15 operations including Invert and SolarizeAdd, here there are 14, with
    Identity instead of these two. At magnitude 9, Posterize keeps one bit in timm and four here; the other operations
    are equally strong.

    Raises:
        ValueError: if a value is out of range.
    """

    crop: Literal["resized", "pad", "none"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: float = 0.5
    rand_augment: int = 0
    magnitude: int = 9
    color_jitter: float = 0.0
    erasing: float = 0.0

    def __post_init__(self):
        conform_fields(self)
        for name in ("flip", "erasing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name, most in (("padding", 1000), ("rand_augment", 100), ("color_jitter", 1.0)):
            check_bounds(name, getattr(self, name), 0, most)
        if not 0 <= self.magnitude < MAGNITUDES:
            raise ValueError(f"magnitude must be in [0, {MAGNITUDES - 1}], got {self.magnitude}")
        for name, largest in (("scale", 1.0), ("ratio", 1000.0)):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= largest:
                raise ValueError(f"{name} must be two numbers in (0, {largest}], the smaller first, got {low}, {high}")

    def transform(
        self,
        size: tuple[int, int],
        interpolation: InterpolationMode,
        mean: list[float],
        std: list[float],
        fixed: Callable[[Tensor], Tensor],
    ) -> Callable[[Tensor], Tensor]:
        """Build the transform from uint8 (3, h, w) to uint8 (3, H, W).

        Args:
            size: H, W.
            interpolation: interpolation of resized crops, always antialiased.
            mean, std: per-channel normalisation constants of the model, in [0, 255].
            fixed: the evaluation transform, used for ``crop="none"``.
        """
        steps: list[Callable] = []
        if self.crop == "resized":
            steps.append(v2.RandomResizedCrop(size, self.scale, self.ratio, interpolation, antialias=True))
        elif self.crop == "pad":
            steps += [v2.Resize(size, interpolation, antialias=True), v2.RandomCrop(size, padding=self.padding)]
        else:
            steps.append(fixed)
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.rand_augment:
            bilinear = InterpolationMode.BILINEAR
            steps.append(v2.RandAugment(self.rand_augment, self.magnitude, MAGNITUDES, bilinear, fill=mean))
        if self.color_jitter:
            steps.append(v2.ColorJitter(*(self.color_jitter,) * 3))
        if self.erasing:
            steps.append(NoiseErasing(self.erasing, mean, std))
        return v2.Compose(steps)


class NoiseErasing(v2.RandomErasing):
    """`v2.RandomErasing` that fills with noise of the channels' mean and standard deviation; also works for uint8.

    torchvision's "random" value is noise with standard deviation 1, meant for normalised images.
    """

    def __init__(self, p: float, mean: list[float], std: list[float]):
        super().__init__(p, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3), value="random")
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """See `v2.RandomErasing`."""
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            params["v"] = (params["v"] * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
        return params


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) of two neighbours.

    Adjacent samples of a step, at an even position and the next one, are mixed with each other; each draws its own
    mixing share from (seed, epoch, index). Ranks and micro-batches never separate the two (``unit`` of
    `BatchSampler`), so a step is the same however it is split, and no image is read twice. With an even batch size,
    the pairing also depends only on (seed, epoch). A sample without a neighbour (the last of an odd step, or one whose
    neighbour cannot be read) stays unmixed.

    The arithmetic is that of timm's `Mixup` and torchvision's `MixUp` and `CutMix`. These are not used because they
    draw from a global generator once per batch and mix a batch with a permutation of itself, so a step would depend on
    earlier draws and on how it is split into micro-batches and ranks.

    Args:
        mixup: alpha of the Beta(alpha, alpha) distribution of the mixup share; 0 disables mixup.
        cutmix: alpha of the Beta(alpha, alpha) distribution of the CutMix share; 0 disables CutMix.
        probability: probability that a sample is mixed.
        switch: probability of CutMix instead of mixup if both are enabled.

    Raises:
        ValueError: if a value is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self):
        conform_fields(self)
        for name in ("mixup", "cutmix"):
            check_bounds(name, getattr(self, name), 0, 1000)
        for name in ("probability", "switch"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def on(self) -> bool:
        """Return whether mixing is enabled."""
        return bool(self.probability and (self.mixup or self.cutmix))

    def draw(self, size: tuple[int, int], *key: Sample) -> tuple[float, tuple[int, int, int, int]]:
        """Draw the share and region that a sample takes from its neighbour.

        Args:
            size: H, W.
            key: (seed, epoch, sample index).

        Returns:
            share: weight of the neighbour in the mixed image and label, in [0, 1].
            box: top, bottom, left, right of the rectangle taken from the neighbour; empty for mixup.
        """
        random = rng(*key)
        mixed, which = random.random(2)
        cut = which < self.switch if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cut else self.mixup
        if not alpha or mixed >= self.probability:
            return 0.0, (0, 0, 0, 0)
        share = float(random.beta(alpha, alpha))
        if not cut:
            return share, (0, 0, 0, 0)
        box = []
        for side, middle in zip(size, random.random(2), strict=True):
            half, centre = int(side * share**0.5) // 2, int(side * middle)
            box += [max(centre - half, 0), min(centre + half, side)]
        top, bottom, left, right = box
        # The rectangle may extend beyond the image; only the part inside counts.
        return (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right)


def partners(positions: list[int]) -> list[int]:
    """Return the index of the neighbour of each sample at ``positions`` of a step; its own index if it has none."""
    position = {place: i for i, place in enumerate(positions)}
    return [position.get(place ^ 1, i) for i, place in enumerate(positions)]


def mix(pixels: Tensor, partner: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Mix images with their partners.

    Args:
        pixels: (B, C, H, W), normalised.
        partner: (B,) int64, index of each sample's partner in the batch.
        share: (B,) weight of the partner.
        box: (B, 4) int64, top, bottom, left, right; if empty, all pixels are mixed with weight ``share``.
    """
    H, W = pixels.shape[-2:]
    top, bottom, left, right = box.unbind(dim=1)
    row, column = torch.arange(H, device=box.device), torch.arange(W, device=box.device)
    rows = (row >= top[:, None]) & (row < bottom[:, None])  # (B, H)
    columns = (column >= left[:, None]) & (column < right[:, None])  # (B, W)
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    cut = (bottom > top) & (right > left)
    weight = torch.where(cut[:, None, None, None], inside.to(share.dtype), share[:, None, None, None])
    return torch.lerp(pixels, pixels[partner], weight.to(pixels.dtype))
