"""Random changes of training images: torchvision's transforms on uint8 tensors, and mixing of two images.

    uint8 (3, h, w) -> crop -> flip -> RandAugment or colour jitter -> erasing -> uint8 (3, H, W)

What happens to a sample is a pure function of (seed, epoch, sample index): see `seeded`, `Mixing`.
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
from .batching import rng

# timm, the DeiT and the MAE authors count RandAugment's magnitude from 0 to 10, torchvision by default from 0 to 30.
MAGNITUDES = 11


@contextmanager
def seeded() -> Iterator[Callable[..., None]]:
    """Gives ``seed(*key)``, which seeds torch's CPU generator, torchvision's source; afterwards it is as before.

    A key is integers of at most 64 bits. ``torch.manual_seed`` would do the same 100 times slower: it seeds every
    device.
    """
    with torch.random.fork_rng(devices=[]):
        yield lambda *key: torch.default_generator.manual_seed(hash_key(*key))


def hash_key(*key: int) -> int:
    """64 bits that depend on every bit of a key of integers, in a microsecond; the same on every machine."""
    packed = struct.pack(f"<{len(key)}q", *key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are changed. The defaults are Inception's crop and flip, usual for ImageNet.

    Args:
        crop: "resized", a random part of the image resized; "pad", the image resized and shifted, usual for CIFAR;
            "none", as in evaluation.
        scale: least and largest share of the image's area in a "resized" crop.
        ratio: least and largest width by height of it.
        padding: pixels of zeros around the image of which a "pad" crop is taken.
        flip: probability of mirroring left and right.
        rand_augment: operations of torchvision's RandAugment for each image; 0 turns it off.
        magnitude: their strength, 0 to 10.
        color_jitter: largest relative change of brightness, contrast and saturation, in [0, 1]; 0 turns it off.
        erasing: probability that a rectangle is replaced by noise, normal in the model's scale (timm's "pixel").

    RandAugment is not quite that of timm, which DeiT and MAE take as "rand-m9-mstd0.5-inc1". There each operation that
    is drawn is applied with probability 0.5, here always; there the magnitude is drawn around 9 with a deviation of
    0.5, here it is 9; there 15 operations are drawn from, Invert and SolarizeAdd among them, here 14, with Identity in
    place of these two. At 9 posterizing leaves one bit there and four here; the other operations are as strong.

    Raises:
        ValueError: a value is out of range.
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
        """The transform of uint8 (3, h, w) to uint8 (3, H, W).

        Args:
            size: H, W.
            interpolation: of resized crops, always antialiased.
            mean, std: of the channels that the model subtracts and divides by, in [0, 255].
            fixed: what evaluation does, for ``crop="none"``.
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
    """`v2.RandomErasing` that fills with noise of the channels' mean and deviation, also in uint8.

    Its own "random" is noise of deviation 1, meant for normalised images.
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

    Two samples that stand side by side in a step, at an even place and the next, are each mixed with the other, by a
    share that each draws for itself from (seed, epoch, index). Since ranks and micro-batches never part them (``unit``
    of `BatchSampler`), a step is the same however it is cut, and no image is read twice. With an even batch size
    neighbours also depend on nothing but (seed, epoch). A sample without a neighbour, the last of an odd step or that
    of an image that cannot be read, stays as it is.

    The arithmetic is that of timm's `Mixup` and torchvision's `MixUp` and `CutMix`. They cannot be used: they draw
    from a global generator, once a batch, and mix a batch with itself in another order, so that a step would depend
    on what was drawn before it, and on the micro-batches and ranks that it is cut into.

    Args:
        mixup: both parameters of the Beta distribution of mixup's share; 0 turns it off.
        cutmix: the same of CutMix's.
        probability: of a sample to be mixed.
        switch: probability of CutMix where both are on.

    Raises:
        ValueError: a value is out of range.
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
        """Whether anything is mixed."""
        return bool(self.probability and (self.mixup or self.cutmix))

    def draw(self, size: tuple[int, int], *key: int) -> tuple[float, tuple[int, int, int, int]]:
        """What a sample takes of its neighbour.

        Args:
            size: H, W.
            key: (seed, epoch, sample index).

        Returns:
            share: of the neighbour in the mixed image and label, in [0, 1].
            box: top, bottom, left, right of the rectangle that is the neighbour's; empty for mixup.
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
        # The rectangle may stick out of the image: what is in it counts.
        return (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right)


def partners(places: list[int]) -> list[int]:
    """For each of the samples at ``places`` of a step, which of them its neighbour is; without one, itself."""
    position = {place: i for i, place in enumerate(places)}
    return [position.get(place ^ 1, i) for i, place in enumerate(places)]


def mix(pixels: Tensor, partner: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Mix images with their partners.

    Args:
        pixels: (B, C, H, W), normalised.
        partner: (B,) int64, place of each one's partner in the batch.
        share: (B,) of the partner.
        box: (B, 4) int64, top, bottom, left, right; where it is empty, all pixels are mixed by ``share``.
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
