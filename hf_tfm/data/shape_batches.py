"""Steps of images of similar shape, all on one canvas, which minimises padding.

    sizes -> shape of each image in this epoch, after its crop -> neighbours in shape -> a scale and a canvas a step

The canvas of a step is chosen here, but its images are prepared by workers that see only a few of them, so each sample
carries the canvas, see `SampleRef`.
"""

from collections.abc import Sequence

import numpy as np

from .batching import SampleRef, Steps, checked_counts, rng, sample_ref
from .equal_batches import BatchSampler
from .scenes import SceneAugmentation, chances, fitted, pick, scaled

POOL_STEPS = 50  # number of steps whose samples, drawn at random, are sorted together


class ShapeSampler(BatchSampler):
    """Steps with an equal number of scenes of similar shape.

    The order depends only on (seed, epoch) and the sizes of the scenes; ranks and micro-batches only split it. As in
    the paper, every scene sees every scale equally often; all scenes of a step share one scale.

    Args:
        sizes: (N, 2) height and width of the images, see `scene_rows`.
        batch_size: scenes per step, over all ranks.
        augmentation: augmentation of the training scenes; None keeps scenes unchanged and sorted by shape, for
            evaluation.
        seed: determines the order, together with the epoch; must equal the task's seed.
        drop_last: drop the randomly chosen scenes that do not fill a step.
        first: number of the first scene in its stream, whose augmentations depend on it.

    Raises:
        ValueError: if there are no samples or an option is out of range.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        augmentation: SceneAugmentation | None = None,
        seed: int = 0,
        drop_last: bool = False,
        first: int = 0,
    ):
        sizes = checked_counts("sizes", sizes)
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise ValueError(f"sizes must have shape (N, 2), height and width of each image, got {sizes.shape}")
        super().__init__(len(sizes), batch_size, seed, shuffle=augmentation is not None, drop_last=drop_last)
        self.sizes = np.maximum(sizes.astype(np.int64), 1)  # an unreadable image has size 0
        self.augmentation, self.first = augmentation, first

    def make_steps(self, epoch: int) -> Steps:
        """See `steps`."""
        if self.augmentation is None:
            return self.cut(by_shape(self.sizes, np.arange(self.count)).tolist(), self.batch_size)
        random = rng(self.seed, epoch, self.first)  # a last number of 0 changes nothing
        order = random.permutation(self.count)
        if self.drop_last:
            order = order[: self.count - self.count % self.batch_size]
        shapes = self.augmentation.crops(self.sizes, chances(self.seed, epoch, self.first, self.count))[:, 2:]
        pool = POOL_STEPS * self.batch_size
        steps = []
        for start in range(0, len(order), pool):
            steps += self.cut(by_shape(shapes, order[start : start + pool]), self.batch_size)
        shortest = pick(self.augmentation.scales, random.random(len(steps)))
        return [self.with_canvas(steps[i], shapes, int(shortest[i])) for i in random.permutation(len(steps)).tolist()]

    def with_canvas(self, step: Sequence[int], shapes: np.ndarray, shortest: int) -> list[SampleRef]:
        """Return the samples of a step: all on the smallest canvas that fits its scenes at the given scale."""
        height, width = scaled(shapes[step], shortest, self.augmentation.max_size).max(axis=0).tolist()
        return [SampleRef(int(row), canvas=(height, width)) for row in step]


def by_shape(shapes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sort rows by aspect ratio, from tall to wide; the sort is stable.

    Args:
        shapes: (N, 2) height and width.
        rows: (k,) row indices.
    """
    return rows[np.argsort(shapes[rows, 1] / shapes[rows, 0], kind="stable")]


def padding_share(steps: Steps, sizes: np.ndarray, augmentation: SceneAugmentation, seed: int, epoch: int) -> float:
    """Return the fraction of padding pixels in an epoch.

    Args:
        steps: steps of any sampler; samples without a canvas draw a scale each, and their step is padded to the
            largest.
        sizes: (N, 2) height and width of the images.
        seed, epoch: of the steps.
    """
    drawn = chances(seed, epoch, 0, len(sizes))
    shapes = augmentation.crops(sizes, drawn)[:, 2:]
    own = scaled(shapes, pick(augmentation.scales, drawn[:, -1]), augmentation.max_size)
    used = padded = 0
    for step in steps:
        rows, canvases = zip(*((ref.index, ref.canvas) for ref in map(sample_ref, step)), strict=True)
        made = [
            own[row].tolist() if canvas is None else fitted(tuple(shapes[row].tolist()), canvas)
            for row, canvas in zip(rows, canvases, strict=True)
        ]
        height, width = np.max(made, axis=0) if canvases[0] is None else canvases[0]
        used += sum(h * w for h, w in made)
        padded += len(step) * int(height) * int(width)
    return 1.0 - used / padded
