"""Augmentation of training scenes as in DETR (Carion et al. 2020, arXiv:2005.12872, appendix A.4).

    scene -> crop -> flip -> resize to a scale, or into its step's canvas -> colour jitter

The augmentation of a scene is a pure function of (seed, epoch, row), and the resulting shape follows from the image
size alone, before the image is read, so `ShapeSampler` can batch scenes of similar shape.
"""

from dataclasses import dataclass

import numpy as np
from torchvision.transforms import InterpolationMode, v2

from ..values import check_bounds, conform_fields
from .scenes import Scene

# The random numbers of a scene, uniform in [0, 1), by the decision they determine.
FLIP, CROP, CROP_SCALE, CROP_HEIGHT, CROP_WIDTH, TOP, LEFT, SCALE = range(8)
CHANCES = 8


def chances(seed: int, epoch: int, first: int, count: int = 1) -> np.ndarray:
    """Return the random numbers of ``count`` rows from ``first`` on, (count, 8); they depend on the row alone."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(CHANCES,)))
    bits.advance(first * CHANCES)
    return np.random.Generator(bits).random((count, CHANCES))


def scaled(sizes: np.ndarray, shortest: np.ndarray | int, longest: int) -> np.ndarray:
    """Scale sizes to a shortest side, with the longest side at most ``longest``, rounded as in `DetrImageProcessor`.

    No side is smaller than one pixel, where that processor fails on long, thin images.

    Args:
        sizes: (N, 2) height and width.
        shortest: pixels, one number or (N,).

    Returns:
        (N, 2) int64.
    """
    small, large = sizes.min(axis=1), sizes.max(axis=1)
    limited = large / small * shortest > longest
    exact = np.where(limited, longest * small / large, shortest)
    short = np.where(limited, np.round(exact), shortest).astype(np.int64)
    long = (exact * large / small).astype(np.int64)
    wide = sizes[:, 1] >= sizes[:, 0]
    # A size that already has the right shortest side is kept, even if rounding puts its longest side above the limit.
    keep = small == short
    found = np.stack([np.where(wide, short, long), np.where(wide, long, short)], axis=1)
    return np.where(keep[:, None], sizes, np.maximum(found, 1)).astype(np.int64)


def fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size (height, width) with the same aspect ratio that fits a canvas."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, min(round(side * scale), limit)) for side, limit in zip(size, canvas, strict=True))
    return height, width


@dataclass(frozen=True, kw_only=True)
class SceneAugmentation:
    """Augmentation of training scenes. The defaults are the paper's, for COCO images.

    The crop is defined on the image resized to one of ``crop_scales``, with sides of ``crop_size`` pixels. It is cut
    from the original image, which is then resized once, so the same numbers suit images of any size. The authors' code
    resizes twice.

    Args:
        scales: candidate lengths of the shortest side in pixels, one of which is drawn.
        max_size: maximum length of the longest side in pixels.
        crop: probability of a crop.
        crop_scales: candidate lengths of the shortest side before a crop in pixels, one of which is drawn.
        crop_size: minimum and maximum height and width of a crop in pixels.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip; 0, as in the paper, suits scenes with an up and down.
        color_jitter: maximum relative change of brightness, contrast and saturation; 0, as in the paper, disables it.

    Raises:
        ValueError: if a value is out of range.
    """

    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    crop: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_size: tuple[int, int] = (384, 600)
    flip: float = 0.5
    vertical_flip: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self):
        conform_fields(self)
        for name in ("scales", "crop_scales"):
            if not getattr(self, name) or min(getattr(self, name)) < 1 or max(getattr(self, name)) >= 2**16:
                raise ValueError(f"{name} must be pixels in [1, 65535], got {getattr(self, name)}")
        if not max(self.scales) <= self.max_size < 2**16:
            raise ValueError(f"max_size must be in [{max(self.scales)}, 65535], got {self.max_size}")
        low, high = self.crop_size
        if not 1 <= low <= high < 2**16:
            raise ValueError(f"crop_size must be two numbers in [1, 65535], the smaller first, got {low}, {high}")
        for name in ("crop", "flip", "vertical_flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        check_bounds("color_jitter", self.color_jitter, 0, 1.0)

    def crops(self, sizes: np.ndarray, chances: np.ndarray) -> np.ndarray:
        """Return the crop of each image; the whole image if it is not cropped.

        Args:
            sizes: (N, 2) height and width.
            chances: (N, 8) random numbers.

        Returns:
            (N, 4) int64 top, left, height, width.
        """
        resized = pick(self.crop_scales, chances[:, CROP_SCALE]) / sizes.min(axis=1)  # scale factor, (N,)
        low, high = (np.minimum(side, resized[:, None] * sizes) for side in self.crop_size)
        drawn = low + chances[:, [CROP_HEIGHT, CROP_WIDTH]] * (high - low)
        inside = np.clip(np.round(drawn / resized[:, None]), 1, sizes).astype(np.int64)
        sides = np.where(chances[:, CROP, None] < self.crop, inside, sizes)
        starts = np.floor(chances[:, [TOP, LEFT]] * (sizes - sides + 1)).astype(np.int64)
        return np.concatenate([starts, sides], axis=1)

    def __call__(
        self,
        scene: Scene,
        chances: np.ndarray,
        canvas: tuple[int, int] | None = None,
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    ) -> Scene:
        """Augment a scene.

        Args:
            chances: (8,) random numbers; colour jitter draws from torch's CPU generator.
            canvas: height and width that the scene is fitted into, keeping its aspect ratio; default: a scale drawn
                for this scene.
            interpolation: interpolation of the image.
        """
        part = self.crops(np.array([scene.size]), chances[None])[0].tolist()
        if (part[2], part[3]) != scene.size:
            scene = scene.crop(*part)
        chance, flipped = chances[FLIP], chances[FLIP] < self.flip
        if flipped:
            scene = scene.flip()
        # Given the outcome of the first flip, the rescaled random number is again uniform and independent of it.
        if (chance / self.flip if flipped else (chance - self.flip) / (1 - self.flip)) < self.vertical_flip:
            scene = scene.flip(vertical=True)
        if canvas is None:
            shortest = int(pick(self.scales, chances[SCALE]))
            height, width = scaled(np.array([scene.size]), shortest, self.max_size)[0].tolist()
        else:
            height, width = fitted(scene.size, canvas)
        scene = scene.resize(height, width, interpolation)
        if not self.color_jitter:
            return scene
        jitter = v2.ColorJitter(*(self.color_jitter,) * 3)
        return Scene(**{**vars(scene), "image": jitter(scene.image)})


def pick(values: tuple[int, ...], chance: np.ndarray) -> np.ndarray:
    """Pick one of ``values`` by a random number in [0, 1)."""
    return np.asarray(values)[np.floor(chance * len(values)).astype(np.int64)]
