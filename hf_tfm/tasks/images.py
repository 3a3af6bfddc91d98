"""What tasks on images share: their batches as uint8 tensors, and the scale that the model sees.

    {"image", "label"} -> decoded, changed, stacked: uint8 (B, 3, H, W) -> on the device: (x - mean) / std

Size, mean and deviation have one source, the image processor that is saved with the model.
"""

from typing import Any

import torch
from transformers import BaseImageProcessor

from ..data.augment import Augmentation, seeded
from ..data.images import IMAGE, BadImage, decode, describe
from ..data.pixels import Pixels

Batch = dict[str, Any]


class ImageTask:
    """Batches of images; tasks add targets and losses.

    Args:
        processor: of the model.
        augmentation: of training images; None treats them as those of evaluation.
        seed: of everything drawn at random for a sample.
    """

    item = "images"

    def __init__(self, processor: BaseImageProcessor, augmentation: Augmentation | None = None, seed: int = 0):
        self.pixels, self.seed = Pixels(processor), seed
        self.change = self.pixels.resize
        if augmentation is not None:
            p = self.pixels
            self.change = augmentation.transform(p.size, p.interpolation, p.mean, p.std, p.resize)

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Examples of `image_rows` -> a batch for evaluation.

        A hidden batch, and one of which no image can be read, has an image of zeros that counts for nothing.

        Returns:
            ``pixel_values`` uint8 (B, 3, H, W); ``images``, how many of them count; ``indices`` (B,) of the samples;
            ``bad``, for `WatchedLoader`; and what the task adds.
        """
        return self.make_batch(examples, indices, epoch, hidden, training=False)

    def collate_training(
        self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False
    ) -> Batch:
        """The same for training: images are changed at random, as a function of (seed, epoch, index) alone."""
        return self.make_batch(examples, indices, epoch, hidden, training=True)

    def make_batch(
        self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool, training: bool
    ) -> Batch:
        """See `collate`."""
        change = self.change if training else self.pixels.resize
        images, places, bad = [], [], []
        with seeded() as seed:
            for place, (example, index) in enumerate(zip(examples, indices, strict=True)):
                if hidden:
                    break
                try:
                    image = decode(example[IMAGE])
                    seed(self.seed, epoch, index)
                    images.append(change(image))
                except BadImage as error:
                    bad.append((index, describe(example[IMAGE], error)))
                    continue
                places.append(place)
        count = len(images)
        if not images:
            images, places = [torch.zeros(3, *self.pixels.size, dtype=torch.uint8)], [0]
        kept = [indices[place] for place in places]
        batch = {"pixel_values": torch.stack(images), "images": count, "indices": torch.tensor(kept), "bad": bad}
        return batch | self.targets([examples[place] for place in places], kept, places, epoch, count, training)

    def targets(
        self,
        examples: list[dict[str, Any]],
        indices: list[int],
        places: list[int],
        epoch: int,
        count: int,
        training: bool,
    ) -> Batch:
        """What a task adds to a batch.

        Args:
            examples, indices: of the images in the batch, B of each.
            places: where they stood in the micro-batch before bad images were left out.
            count: how many count, B or 0.
        """
        raise NotImplementedError
