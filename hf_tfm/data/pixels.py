"""Image processors in two halves: resizing on the host, in uint8, and scaling on the device.

    uint8 (3, h, w) -> resized and cropped: uint8 (3, H, W) -> on the device: (x - mean) / std

Size, mean and standard deviation have one source, the image processor that is saved with the model.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import to_pil_image
from transformers import AutoImageProcessor, BaseImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from ..models.patches import Size, sides
from .images import MAX_PIXELS, BadImage
from .scenes import Scene, scaled

Channels = tuple[float, float, float]  # one value for each of red, green and blue
INTERPOLATION = {
    PILImageResampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    PILImageResampling.BILINEAR: InterpolationMode.BILINEAR,
    PILImageResampling.BICUBIC: InterpolationMode.BICUBIC,
}


def image_processor(
    size: Size,
    resize: int | None = None,
    mean: Channels = tuple(IMAGENET_DEFAULT_MEAN),
    std: Channels = tuple(IMAGENET_DEFAULT_STD),
) -> ViTImageProcessor:
    """Return the image processor of a new model.

    Args:
        size: pixels of the model's images, one number or (height, width).
        resize: resize the shorter edge to this and crop the centre; default, resize the image to ``size``, whatever
            its shape. The usual value is 256 for a size of 224.
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


def scene_processor(
    size: int = 800,
    max_size: int = 1333,
    mean: Channels = tuple(IMAGENET_DEFAULT_MEAN),
    std: Channels = tuple(IMAGENET_DEFAULT_STD),
    kind: str = "DetrImageProcessor",
) -> BaseImageProcessor:
    """Return the image processor of a new detector.

    Args:
        size: shortest side in evaluation, in pixels.
        max_size: limit of the longest side.
        mean, std: of the channels, of pixels in [0, 1].
        kind: class of transformers, DETR's or one with the same options.

    Raises:
        ValueError: ``size`` is below 1 or above ``max_size``.
    """
    if not 1 <= size <= max_size:
        raise ValueError(f"size must be in [1, max_size = {max_size}], got {size}")
    edges = {"shortest_edge": size, "longest_edge": max_size}
    return getattr(transformers, kind)(size=edges, image_mean=list(mean), image_std=list(std))


def pixel_scale(
    source: str | None,
    mean: Channels | None,
    std: Channels | None,
    trust_remote_code: bool = False,
    argument: str = "model_name_or_path",
) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of the pixels of a new run.

    Args:
        source: pretrained model, whose values are the default; without one, those of ImageNet are.
        mean, std: of the arguments.
        trust_remote_code: run the code of the source's repository.
        argument: that names the source, for errors.

    Raises:
        ValueError: the source has no image processor, and mean and std are not both given.
    """
    if source is None or (mean and std):
        return tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(std or IMAGENET_DEFAULT_STD)
    try:
        earlier = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"{argument} {source} has no image processor: give mean and std") from error
    return mean or tuple(earlier.image_mean), std or tuple(earlier.image_std)


def as_fractions(values: Iterable[float]) -> Channels:
    """Return values of pixels in [0, 255] for pixels in [0, 1]."""
    red, green, blue = (value / 255.0 for value in values)
    return red, green, blue


class Scale:
    """Scaling of pixels, (x - mean) / std; `mean` and `std` are those of pixels in [0, 255].

    Args:
        processor: a torchvision image processor of transformers.

    Raises:
        ValueError: it is of another kind, or resamples in a way that uint8 tensors do not support.
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
        """Scale images, uint8 (B, 3, H, W) -> float32."""
        device = pixels.device
        if device not in self.constants:  # once for each device: copying them there makes the host wait
            self.constants[device] = tuple(
                torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std)
            )
        mean, std = self.constants[device]
        return pixels.float().sub_(mean).div_(std)  # in place: fresh memory costs a CPU more than the arithmetic


class Pixels(Scale):
    """An image processor in two halves: `resize` on the host, in uint8, and `scale` on the device.

    Both together compute what the processor does; `size` is (H, W).

    Args:
        processor: see `Scale`.

    Raises:
        ValueError: its output has no fixed size; see also `Scale`.
    """

    def __init__(self, processor: BaseImageProcessor):
        super().__init__(processor)
        fixed = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else None
        if fixed is None or not (fixed.height and fixed.width):
            raise ValueError(f"processor must give images of a fixed height and width, got size {processor.size}")
        self.size = (fixed.height, fixed.width)

    def resize(self, image: Tensor) -> Tensor:
        """Resize and crop an image: uint8 (3, h, w) -> uint8 (3, H, W).

        Raises:
            BadImage: it is so elongated that it would have more than `MAX_PIXELS` once its shortest edge is resized.
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


class PaddedPixels(Scale):
    """`DetrImageProcessor` in two halves: `resize` on the host, in uint8, and `scale_padded` on the device.

    Args:
        processor: see `Scale`.

    Raises:
        ValueError: it does not resize to a shortest and a longest side, or does not pad; see also `Scale`.
    """

    def __init__(self, processor: BaseImageProcessor):
        super().__init__(processor)
        self.shortest, self.longest = processor.size.shortest_edge, processor.size.longest_edge
        if not (processor.do_resize and self.shortest and self.longest):
            raise ValueError(f"processor must resize to shortest_edge and longest_edge, got size {processor.size}")
        if not processor.do_pad or processor.pad_size:
            raise ValueError("processor must pad images to the largest of a batch (do_pad, and no pad_size)")

    def resize(self, scene: Scene) -> Scene:
        """Resize an image and its objects to the size of evaluation."""
        height, width = scaled(np.array([scene.size]), self.shortest, self.longest)[0].tolist()
        return scene.resize(height, width, self.interpolation)

    def scale_padded(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Scale padded images; padding becomes 0.

        Args:
            pixels: uint8 (B, 3, H, W).
            mask: (B, H, W) bool, True for image and False for padding.

        Returns:
            (B, 3, H, W) float32.
        """
        return self.scale(pixels).masked_fill_(~mask[:, None], 0.0)


class WholeProcessor:
    """Any image processor in the form that `Pixels` takes: everything it does is part of `resize`.

    Args:
        processor: of transformers, or one that came with a model.

    Raises:
        ValueError: its output has no fixed size.
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
        """Process an image, uint8 (3, h, w) -> float32 (3, H, W)."""
        pil = to_pil_image(image)  # timm's processor does not accept uint8 tensors; all accept PIL images
        return torch.as_tensor(self.processor(images=pil, return_tensors="pt")["pixel_values"][0])


SHAPES = ((53, 67), (67, 53))  # of the images with which a processor is tried


def suitable(processor: BaseImageProcessor) -> Any:
    """Return the processor if `Pixels` can split it into two halves, otherwise as a `WholeProcessor`."""
    image = torch.arange(3 * 53 * 67).remainder(251).byte().view(3, *SHAPES[0])
    whole = WholeProcessor(processor)
    try:
        halves = Pixels(processor)
        seen = halves.scale(halves.resize(image)[None])[0]
    except (AttributeError, TypeError, ValueError):  # other methods, or fields with another meaning
        return whole
    expected = whole.resize(image)
    return processor if seen.shape == expected.shape and torch.allclose(seen, expected, atol=1e-4) else whole


def as_read(source: str, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Return a processor with the size and scale of the images that a model reads, but plain resizing.

    Args:
        source: folder or Hub id of the model.
        trust_remote_code: run the code of its repository.

    Raises:
        ValueError: it has no image processor, or its images have no fixed size.
    """
    try:
        found = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f'"{source}" has no image processor: save the one it was trained with in the same folder'
        ) from error
    if data := getattr(found, "data_config", None):  # timm's
        return image_processor(tuple(data["input_size"][1:]), mean=tuple(data["mean"]), std=tuple(data["std"]))
    pixels = Pixels(found)
    return image_processor(pixels.size, mean=as_fractions(pixels.mean), std=as_fractions(pixels.std))


def image_size_of(processor: BaseImageProcessor) -> int | tuple[int, int]:
    """Return the size of a processor's output as configurations have it: one number, or (height, width)."""
    height, width = Pixels(processor).size
    return height if height == width else (height, width)
