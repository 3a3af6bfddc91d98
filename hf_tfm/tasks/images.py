"""What tasks on images share: their batches as uint8 tensors, and the scale that the model sees.

    {"image", "label"} -> decoded, changed, stacked: uint8 (B, 3, H, W) -> on the device: (x - mean) / std

Size, mean and deviation have one source, the image processor that is saved with the model.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ..data.augment import Augmentation, seeded
from ..data.images import IMAGE, MAX_PIXELS, BadImage, decode, describe
from ..models.patches import Size, sides

Batch = dict[str, Any]
INTERPOLATION = {
    PILImageResampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    PILImageResampling.BILINEAR: InterpolationMode.BILINEAR,
    PILImageResampling.BICUBIC: InterpolationMode.BICUBIC,
}


def image_processor(
    size: Size,
    resize: int | None = None,
    mean: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_MEAN),
    std: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_STD),
) -> ViTImageProcessor:
    """The image processor of a new model.

    Args:
        size: pixels of the model's images, one number or (height, width).
        resize: the shorter edge is resized to this, and the centre cut out; default, the image is resized to ``size``
            whatever its shape. The usual value is 256 for a size of 224.
        mean, std: of the channels, of pixels in [0, 1].

    Raises:
        ValueError: ``resize`` is smaller than the size.
    """
    crop = dict(zip(("height", "width"), sides(size), strict=True))
    shared = {"do_convert_rgb": True, "image_mean": list(mean), "image_std": list(std)}
    shared["resample"] = PILImageResampling.BICUBIC
    if resize is None:
        return ViTImageProcessor(size=crop, **shared)
    if resize < max(crop.values()):
        raise ValueError(f"resize must be at least the size {max(crop.values())}, got {resize}")
    return ViTImageProcessor(size={"shortest_edge": resize}, do_center_crop=True, crop_size=crop, **shared)


class Scale:
    """The model's scale of pixels, (x - mean) / std; `mean` and `std` are those of pixels in [0, 255].

    Args:
        processor: one of transformers' torchvision ones.

    Raises:
        ValueError: it is another, or resizes in a way that uint8 tensors cannot.
    """

    def __init__(self, processor: BaseImageProcessor):
        if getattr(processor, "backend", None) != "torchvision":
            raise ValueError(
                f"processor must be one of transformers' torchvision ones, got {type(processor).__name__}"
            )
        if processor.resample not in INTERPOLATION:
            raise ValueError(f"processor.resample must be nearest, bilinear or bicubic, got {processor.resample}")
        self.processor = processor
        self.interpolation = INTERPOLATION[processor.resample]
        white = 1.0 / processor.rescale_factor if processor.do_rescale else 1.0
        mean = processor.image_mean if processor.do_normalize else [0.0] * 3
        std = processor.image_std if processor.do_normalize else [1.0] * 3
        self.mean, self.std = [m * white for m in mean], [s * white for s in std]
        self.constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def scale(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32, as the model reads them."""
        device = pixels.device
        if device not in self.constants:  # once for each device: copying them there makes the host wait
            self.constants[device] = tuple(
                torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std)
            )
        mean, std = self.constants[device]
        return pixels.float().sub_(mean).div_(std)  # in place: fresh memory costs a CPU more than the arithmetic


class Pixels(Scale):
    """An image processor in two halves: resizing on the host, in uint8, and the model's scale on the device.

    Both together are the processor itself; `size` is (H, W).

    Args:
        processor: see `Scale`.

    Raises:
        ValueError: its images have no fixed size; and see `Scale`.
    """

    def __init__(self, processor: BaseImageProcessor):
        super().__init__(processor)
        fixed = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else None
        if fixed is None or not (fixed.height and fixed.width):
            raise ValueError(f"processor must give images of a fixed height and width, got size {processor.size}")
        self.size = (fixed.height, fixed.width)

    def resize(self, image: Tensor) -> Tensor:
        """The image after the processor's resizing and cropping, before its scale: uint8 (3, h, w) -> uint8 (3, H, W).

        Raises:
            BadImage: it is so long and thin that it has more than `MAX_PIXELS` once its shortest edge is resized.
        """
        processor = self.processor
        if processor.do_resize:
            edge, (short, long) = getattr(processor.size, "shortest_edge", None), sorted(image.shape[-2:])
            if edge and edge * edge * long > MAX_PIXELS * short:
                raise BadImage(
                    f"it has {image.shape[-2]} x {image.shape[-1]} pixels, which with a shortest edge of {edge} would "
                    f"be more than the limit of {MAX_PIXELS:,}"
                )
            image = processor.resize(image, processor.size, processor.resample)
        return processor.center_crop(image, processor.crop_size) if processor.do_center_crop else image


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
