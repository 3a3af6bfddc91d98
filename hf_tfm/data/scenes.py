"""Scenes: decoded images with their objects, which are cropped, flipped and resized together; and their augmentation
as in DETR (Carion et al. 2020, arXiv:2005.12872, appendix A.4).

    row of `scene_rows` or `panoptic_rows` -> `read_scene` -> crop | flip | resize -> boxes, masks and areas follow
    training scene -> crop -> flip -> resize to a scale, or into its step's canvas -> colour jitter

The augmentation of a scene is a pure function of (seed, epoch, row), and the resulting shape follows from the image
size alone, before the image is read, so `ShapeSampler` can batch scenes of similar shape.

Shapes: h, w pixels of the image; n objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, Mask
from torchvision.tv_tensors import Image as ImageTensor

from ..values import check_bounds, conform_fields
from . import run_lengths
from .arrow_lists import FlatList
from .detection import OBJECTS, SEGMENTS
from .images import IMAGE, BadImage, decode, require_readable
from .panoptic import PANOPTIC, decode_segments

THINNEST = 1.0  # pixels; the authors' code keeps any sliver of a box that a crop leaves
# The random numbers of a scene, uniform in [0, 1), by the decision they determine.
FLIP, CROP, CROP_SCALE, CROP_HEIGHT, CROP_WIDTH, TOP, LEFT, SCALE = range(8)
CHANCES = 8


@dataclass(frozen=True)
class Scene:
    """An image with its objects.

    Args:
        image: uint8 (3, h, w).
        boxes: (n, 4) float32, left, top, right, bottom in pixels.
        labels: (n,) int64, categories as in the rows.
        area: (n,) float32, pixels.
        iscrowd: (n,) bool.
        masks: (n, h, w) bool; with ``ids``, a single map (1, h, w) uint8 or int32, so that the cost of a crop or
            resize does not depend on the number of segments; None without masks.
        ids: (n,) numbers of the objects in the map, starting at 1; 0 is void.
    """

    image: ImageTensor
    boxes: BoundingBoxes
    labels: Tensor
    area: Tensor
    iscrowd: Tensor
    masks: Mask | None = None
    ids: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        height, width = self.image.shape[-2:]
        return height, width

    def object_masks(self, canvas: tuple[int, int] | None = None) -> Tensor:
        """Return one mask per object, (n, h, w) bool, or (n, H, W) on a larger canvas.

        The canvas is padded with False at the bottom and on the right.

        Raises:
            ValueError: if the scene was read without masks.
        """
        if self.masks is None:
            raise ValueError("the scene was read without masks")
        height, width = canvas or self.size
        masks = pad(self.masks.as_subclass(Tensor), [0, width - self.size[1], 0, height - self.size[0]])
        return masks if self.ids is None else masks == self.ids[:, None, None].to(masks.dtype)

    def seen(self) -> Tensor:
        """Return which objects have a pixel in their mask, (n,) bool."""
        masks = self.masks.as_subclass(Tensor)
        if self.ids is None:
            return masks.flatten(1).any(dim=1)
        return torch.bincount(masks.flatten(), minlength=256)[self.ids.long()] > 0

    def keep(self, which: Tensor) -> "Scene":
        """Return the scene with a subset of its objects; ``which`` (n,) bool."""
        if which.all():
            return self
        own_masks = self.masks is not None and self.ids is None
        return replace(
            self,
            boxes=boxes_like(self.boxes.as_subclass(Tensor)[which], self.size),
            labels=self.labels[which],
            area=self.area[which],
            iscrowd=self.iscrowd[which],
            masks=Mask(self.masks[which]) if own_masks else self.masks,
            ids=None if self.ids is None else self.ids[which],
        )

    def crop(self, top: int, left: int, height: int, width: int) -> "Scene":
        """Crop the image and its objects.

        An object's area shrinks in proportion to its box. Objects of which less than a pixel, or no mask pixel, is
        left are removed.
        """
        place = (top, left, height, width)
        boxes = functional.clamp_bounding_boxes(functional.crop(self.boxes, *place))
        before, after = box_sizes(self.boxes), box_sizes(boxes)
        masks = None if self.masks is None else functional.crop(self.masks, *place)
        share = after.prod(dim=1) / before.prod(dim=1).clamp_min(1e-6)
        scene = replace(
            self, image=functional.crop(self.image, *place), boxes=boxes, area=self.area * share, masks=masks
        )
        left_over = (after >= before.clamp_max(THINNEST)).all(dim=1)
        if masks is not None:
            left_over &= scene.seen()
        return scene.keep(left_over)

    def flip(self, vertical: bool = False) -> "Scene":
        """Flip horizontally, or vertically."""
        mirror = functional.vertical_flip if vertical else functional.horizontal_flip
        masks = None if self.masks is None else mirror(self.masks)
        return replace(self, image=mirror(self.image), boxes=mirror(self.boxes), masks=masks)

    def resize(
        self, height: int, width: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> "Scene":
        """Resize the scene; masks use the nearest pixel."""
        if (height, width) == self.size:
            return self
        scale = height * width / (self.size[0] * self.size[1])
        return replace(
            self,
            image=functional.resize(self.image, [height, width], interpolation, antialias=True),
            boxes=functional.resize(self.boxes, [height, width]),
            area=self.area * scale,
            masks=None if self.masks is None else Mask(resize_masks(self.masks.as_subclass(Tensor), height, width)),
        )


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Resize (k, h, w) bool, uint8 or int32 to (k, height, width) of the same type, using the nearest pixel centre.

    `functional.resize` of a `Mask` uses another rule, which shifts masks relative to their image.
    """
    numbers = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
    return functional.resize_image(numbers, [height, width], InterpolationMode.NEAREST_EXACT).to(masks.dtype)


def boxes_like(xyxy: Tensor, size: tuple[int, int]) -> BoundingBoxes:
    """Convert (n, 4) left, top, right, bottom to torchvision boxes in an image of the given size."""
    return BoundingBoxes(xyxy.reshape(-1, 4), format="XYXY", canvas_size=size)


def box_sizes(boxes: Tensor) -> Tensor:
    """Return width and height, (n, 2), of boxes given as left, top, right, bottom."""
    corners = boxes.as_subclass(Tensor)
    return corners[:, 2:] - corners[:, :2]


def empty_scene(size: tuple[int, int]) -> Scene:
    """Return a black image of height x width without objects or masks."""
    none = torch.zeros(0)
    return Scene(
        ImageTensor(torch.zeros(3, *size, dtype=torch.uint8)),
        boxes_like(none, size),
        none.long(),
        none,
        none.bool(),
        Mask(torch.zeros(0, *size, dtype=torch.bool)),
    )


def read_scene(row: Mapping[str, Any], masks: bool = False) -> Scene:
    """Decode a row of `scene_rows` or `panoptic_rows`.

    Args:
        masks: also decode masks; those of `panoptic_rows` are always decoded, because their boxes come from the masks.

    Raises:
        BadImage: if the image or panoptic map cannot be read, or its size differs from the one stated in the row.
    """
    image = decode(row[IMAGE])
    size = tuple(image.shape[-2:])
    stated = (row["height"], row["width"])
    if min(stated) > 0 and size != stated:
        raise BadImage(f"it has {size[0]} x {size[1]} pixels, but its row states {stated[0]} x {stated[1]}")
    return read_segments(row, image) if SEGMENTS in row else read_objects(row, image, masks)


def require_scenes(rows: Mapping[str, datasets.Dataset], max_bad_images: int) -> None:
    """Raise before a run if a split has no object to detect or no readable image; see `require_readable`.

    Args:
        rows: {split name: rows of `scene_rows` or `panoptic_rows`}.
        max_bad_images: see `WatchedLoader`.

    Raises:
        ValueError: if so; the message names the split and counts its images and objects.
    """
    for split, part in rows.items():
        found = FlatList.of(part, SEGMENTS if SEGMENTS in part.features else OBJECTS)
        crowds = int((found.numbers("iscrowd", 0.0) > 0).sum())
        if crowds == found.counts.sum():
            raise ValueError(
                f"there is no object to detect in {split}: its {len(part)} images have {found.counts.sum()} objects, "
                f"{crowds} of them crowds (iscrowd)"
            )
        require_readable(part, max_bad_images, split, read_scene)


def read_objects(row: Mapping[str, Any], image: Tensor, masks: bool) -> Scene:
    """Build the scene of a row with ``objects``."""
    found = row[OBJECTS]
    boxes = torch.tensor([o["bbox"] for o in found], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = tuple(image.shape[-2:])
    return Scene(
        ImageTensor(image),
        boxes_like(boxes, size),
        torch.tensor([o["category"] for o in found], dtype=torch.int64),
        torch.tensor([o["area"] for o in found], dtype=torch.float32),
        torch.tensor([o["iscrowd"] for o in found], dtype=torch.bool),
        Mask(torch.from_numpy(run_lengths.decode([o["segmentation"] for o in found], *size))) if masks else None,
    )


def read_segments(row: Mapping[str, Any], image: Tensor) -> Scene:
    """Build the scene of a row with ``panoptic`` and ``segments_info``; segments without a pixel are dropped.

    Boxes include the last pixel of their segment, like the boxes of objects. The authors' code and transformers' image
    processor end one pixel earlier, so that a segment one pixel wide has an empty box.
    """
    ids = decode_segments(row[PANOPTIC])
    if ids.shape != image.shape[-2:]:
        have, want = tuple(ids.shape), tuple(image.shape[-2:])
        raise BadImage(f"its panoptic map has {have[0]} x {have[1]} pixels, the image {want[0]} x {want[1]}")
    stated = row[SEGMENTS]
    # Lookup table from id to number; most of its memory is never touched.
    table = np.zeros(2**24, np.uint8 if len(stated) < 256 else np.int32)
    table[[s["id"] for s in stated]] = np.arange(1, len(stated) + 1)
    numbers = table[ids]
    slices = find_objects(numbers, len(stated))  # (rows, columns) of each segment, or None
    found = [(k + 1, s, place) for k, (s, place) in enumerate(zip(stated, slices, strict=True)) if place is not None]
    if not found:
        raise BadImage(f"none of its {len(stated)} segments is in its panoptic map, whose first pixel is {ids[0, 0]}")
    boxes = [(x.start, y.start, x.stop, y.stop) for _, _, (y, x) in found]
    size = tuple(image.shape[-2:])
    return Scene(
        ImageTensor(image),
        boxes_like(torch.tensor(boxes, dtype=torch.float32), size),
        torch.tensor([s["category"] for _, s, _ in found], dtype=torch.int64),
        torch.tensor([s["area"] for _, s, _ in found], dtype=torch.float32),
        torch.tensor([s["iscrowd"] for _, s, _ in found], dtype=torch.bool),
        Mask(torch.from_numpy(numbers)[None]),
        torch.tensor([number for number, _, _ in found], dtype=torch.int32),
    )


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
