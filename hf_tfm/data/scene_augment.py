"""Random changes of training scenes: those of DETR (Carion et al. 2020, arXiv:2005.12872, appendix A.4).

    scene -> crop -> flip -> resize to a scale, or into its step's canvas -> colour jitter

What happens to a scene is a pure function of (seed, epoch, row), and its shape is known from its size alone, before it
is read: so `ShapeSampler` can bring scenes of the same shape together.
"""

from dataclasses import dataclass

import numpy as np
from torchvision.transforms import InterpolationMode, v2

from ..values import check_bounds, conform_fields
from .scenes import Scene

# The chances of a scene, uniform in [0, 1): what each decides.
FLIP, CROP, CROP_SCALE, CROP_HEIGHT, CROP_WIDTH, TOP, LEFT, SCALE = range(8)
CHANCES = 8


def chances(seed: int, epoch: int, first: int, count: int = 1) -> np.ndarray:
    """The chances of rows ``first`` to ``first + count``, (count, 8); of each row the same whatever the others are."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(CHANCES,)))
    bits.advance(first * CHANCES)
    return np.random.Generator(bits).random((count, CHANCES))


def scaled(sizes: np.ndarray, shortest: np.ndarray | int, longest: int) -> np.ndarray:
    """Sizes with a given shortest side, and a longest of at most ``longest``, as `DetrImageProcessor` rounds them.

    No side is below one pixel, where the processor of a long and thin image fails.

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
    # What has the right shortest side already keeps its size, even where the longest is above its limit by a rounding.
    keep = small == short
    found = np.stack([np.where(wide, short, long), np.where(wide, long, short)], axis=1)
    return np.where(keep[:, None], sizes, np.maximum(found, 1)).astype(np.int64)


def fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape on a canvas, both height and width."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, min(round(side * scale), limit)) for side, limit in zip(size, canvas, strict=True))
    return height, width


@dataclass(frozen=True, kw_only=True)
class SceneAugmentation:
    """How training scenes are changed. The defaults are the paper's, for images of COCO.

    The crop is that of an image resized to one of ``crop_scales``, with sides of ``crop_size`` pixels; since it is cut
    from the original, which is then resized once, the numbers fit images of any size. The authors' code resizes twice.

    Args:
        scales: pixels of the shortest side, one of which is drawn.
        max_size: limit of the longest side.
        crop: probability of a crop.
        crop_scales: pixels of the shortest side before a crop, one of which is drawn.
        crop_size: least and largest height and width of a crop, in pixels.
        flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom; 0, the paper's, is for scenes that have an up and down.
        color_jitter: largest relative change of brightness, contrast and saturation; 0, the paper's, turns it off.

    Raises:
        ValueError: a value is out of range.
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
        """Which part of each image is taken; the whole image where none is.

        Args:
            sizes: (N, 2) height and width.
            chances: (N, 8).

        Returns:
            (N, 4) int64 top, left, height, width.
        """
        resized = pick(self.crop_scales, chances[:, CROP_SCALE]) / sizes.min(axis=1)  # how much larger, (N,)
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
        """Change a scene.

        Args:
            chances: (8,); the colour jitter draws from torch's CPU generator.
            canvas: height and width that the scene is to fill as far as its shape allows; default, a scale of its own.
            interpolation: of the image.
        """
        part = self.crops(np.array([scene.size]), chances[None])[0].tolist()
        if (part[2], part[3]) != scene.size:
            scene = scene.crop(*part)
        chance, flipped = chances[FLIP], chances[FLIP] < self.flip
        if flipped:
            scene = scene.flip()
        # What is left of that chance is uniform again, and says nothing of how it fell.
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
    """One of some values, by chances in [0, 1)."""
    return np.asarray(values)[np.floor(chance * len(values)).astype(np.int64)]
