"""Share of padding in batches of scenes, by batching method.

python -m benchmarks detection_padding --dataset DATA

One epoch with the paper's augmentation (Carion et al. 2020, appendix A.4) and image sizes of a real data set:
  random            batches in random order with a scale per image, as in the authors' code
  orientation       portrait and landscape images separately, as in detectron2 and torchvision, one scale per batch
  ours              images of similar shape after the crop, one scale and canvas per batch
"""

import numpy as np

from hf_tfm.data.batching import rng
from hf_tfm.data.detection import scene_rows
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.scenes import SceneAugmentation, chances, pick, scaled
from hf_tfm.data.shape_batches import ShapeSampler, padding_share
from hf_tfm.data.source import load_splits

from . import common

SEED = EPOCH = 0


def image_sizes(dataset: str) -> np.ndarray:
    """Height and width (N, 2) of all images of a data set."""
    splits = [scene_rows(rows)[0] for rows in load_splits(dataset).values()]
    return np.concatenate([np.stack([rows["height"], rows["width"]], axis=1) for rows in splits])


def by_orientation(sizes: np.ndarray, batch_size: int, augmentation: SceneAugmentation) -> float:
    """Padding in batches of only portrait or only landscape images (before the crop), one scale per batch."""
    random = rng(SEED, EPOCH)
    order = random.permutation(len(sizes))
    upright = sizes[order, 0] > sizes[order, 1]
    shapes = augmentation.crops(sizes, chances(SEED, EPOCH, 0, len(sizes)))[:, 2:]
    used = padded = 0
    for group in (order[upright], order[~upright]):
        for start in range(0, len(group), batch_size):
            scale = int(pick(augmentation.scales, random.random()))
            made = scaled(shapes[group[start : start + batch_size]], scale, augmentation.max_size)
            used += int(made.prod(axis=1).sum())
            padded += len(made) * int(made.max(axis=0).prod())
    return 1.0 - used / padded


def main(dataset: str = "rishitdagli/cppe-5", images: int = 8192, batch_sizes: tuple[int, ...] = (2, 8, 16)) -> None:
    """Measure and write benchmarks/results/detection_padding.json.

    Args:
        dataset: a detection data set; a Hub id or a local folder.
        images: number of images in an epoch; their sizes are drawn from the data set.
        batch_sizes: images per batch.
    """
    real = image_sizes(dataset)
    sizes = real[np.random.default_rng(SEED).integers(len(real), size=images)]
    augmentation = SceneAugmentation()
    shares = {}
    for batch_size in batch_sizes:
        random = BatchSampler(images, batch_size, SEED).steps(EPOCH)
        ours = ShapeSampler(sizes, batch_size, augmentation, SEED).steps(EPOCH)
        shares[str(batch_size)] = {
            "random": padding_share(random, sizes, augmentation, SEED, EPOCH),
            "orientation, one scale": by_orientation(sizes, batch_size, augmentation),
            "ours": padding_share(ours, sizes, augmentation, SEED, EPOCH),
        }
    common.write(
        "detection_padding", {"dataset": dataset, "real_sizes": len(real), "images": images, "padding": shares}
    )
