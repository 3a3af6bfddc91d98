"""A scene: a decoded image with its objects, which are cut, mirrored and resized with it.

    row of `scene_rows` or `panoptic_rows` -> `read_scene` -> crop | flip | resize -> boxes, masks and areas follow

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
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, Mask
from torchvision.tv_tensors import Image as ImageTensor

from . import run_lengths
from .arrow_lists import FlatList
from .detection import OBJECTS, SEGMENTS
from .images import IMAGE, BadImage, decode, require_readable
from .panoptic import PANOPTIC, decode_segments

THINNEST = 1.0  # pixels; the authors' code keeps any sliver that a crop leaves of a box


@dataclass(frozen=True)
class Scene:
    """An image and what is in it.

    Args:
        image: uint8 (3, h, w).
        boxes: (n, 4) float32, left, top, right, bottom in pixels.
        labels: (n,) int64, categories as the rows have them.
        area: (n,) float32, pixels.
        iscrowd: (n,) bool.
        masks: (n, h, w) bool; or with ``ids`` one map, (1, h, w) uint8 or int32, so that a crop or a resize costs the
            same for any number of segments; None without masks.
        ids: (n,) the numbers of the objects in the map, from 1 on; 0 belongs to none.
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
        """Height and width in pixels."""
        height, width = self.image.shape[-2:]
        return height, width

    def object_masks(self, canvas: tuple[int, int] | None = None) -> Tensor:
        """A mask for each object, (n, h, w) bool, or (n, H, W) on a larger canvas, False below and to the right.

        Raises:
            ValueError: the scene was read without masks.
        """
        if self.masks is None:
            raise ValueError("the scene was read without masks")
        height, width = canvas or self.size
        masks = pad(self.masks.as_subclass(Tensor), [0, width - self.size[1], 0, height - self.size[0]])
        return masks if self.ids is None else masks == self.ids[:, None, None].to(masks.dtype)

    def seen(self) -> Tensor:
        """Which objects have a pixel in their mask, (n,) bool."""
        masks = self.masks.as_subclass(Tensor)
        if self.ids is None:
            return masks.flatten(1).any(dim=1)
        return torch.bincount(masks.flatten(), minlength=256)[self.ids.long()] > 0

    def keep(self, which: Tensor) -> "Scene":
        """The scene with some of its objects; ``which`` (n,) bool."""
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
        """A part of the image; of objects what is in it.

        An object's area shrinks as its box does; one of which less than a pixel is left, or none of its mask, goes.
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
        """Mirrored left and right, or top and bottom."""
        mirror = functional.vertical_flip if vertical else functional.horizontal_flip
        masks = None if self.masks is None else mirror(self.masks)
        return replace(self, image=mirror(self.image), boxes=mirror(self.boxes), masks=masks)

    def resize(
        self, height: int, width: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> "Scene":
        """The scene of another size; masks take the nearest pixel."""
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
    """(k, h, w) bool, uint8 or int32 -> (k, height, width) of the same type, by the pixel whose centre is nearest.

    `functional.resize` of a `Mask` has another rule, by which masks move against their image.
    """
    numbers = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
    return functional.resize_image(numbers, [height, width], InterpolationMode.NEAREST_EXACT).to(masks.dtype)


def boxes_like(xyxy: Tensor, size: tuple[int, int]) -> BoundingBoxes:
    """(n, 4) left, top, right, bottom as torchvision's boxes in an image of a size."""
    return BoundingBoxes(xyxy.reshape(-1, 4), format="XYXY", canvas_size=size)


def box_sizes(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom -> width and height, (n, 2)."""
    corners = boxes.as_subclass(Tensor)
    return corners[:, 2:] - corners[:, :2]


def empty_scene(size: tuple[int, int]) -> Scene:
    """A black image, height x width, without objects; its masks are none of any."""
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
        masks: decode masks too; those of `panoptic_rows` are decoded in any case, for their boxes.

    Raises:
        BadImage: image or panoptic map cannot be read, or have another size than the row says.
    """
    image = decode(row[IMAGE])
    size = tuple(image.shape[-2:])
    stated = (row["height"], row["width"])
    if min(stated) > 0 and size != stated:
        raise BadImage(f"it has {size[0]} x {size[1]} pixels, its row says {stated[0]} x {stated[1]}")
    return read_segments(row, image) if SEGMENTS in row else read_objects(row, image, masks)


def require_scenes(rows: Mapping[str, datasets.Dataset], max_bad_images: int) -> None:
    """Refuse, before a run, splits without an object to find or without a readable image; see `require_readable`.

    Args:
        rows: of `scene_rows` or `panoptic_rows`, by the name of the split.
        max_bad_images: see `WatchedLoader`.

    Raises:
        ValueError: it names the split, and counts its images and objects.
    """
    for split, part in rows.items():
        found = FlatList.of(part, SEGMENTS if SEGMENTS in part.features else OBJECTS)
        crowds = int((found.numbers("iscrowd", 0.0) > 0).sum())
        if crowds == found.counts.sum():
            raise ValueError(
                f"there is no object to find in {split}: its {len(part)} images have {found.counts.sum()} objects, "
                f"{crowds} of them crowds (iscrowd)"
            )
        require_readable(part, max_bad_images, split, read_scene)


def read_objects(row: Mapping[str, Any], image: Tensor, masks: bool) -> Scene:
    """The scene of a row with ``objects``."""
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
    """The scene of a row with ``panoptic`` and ``segments_info``; a segment without a pixel is left out.

    Boxes hold their segments' last pixels, as those of objects do; the authors' code and transformers' image processor
    end a pixel earlier, so that a segment one pixel wide has an empty box.
    """
    ids = decode_segments(row[PANOPTIC])
    if ids.shape != image.shape[-2:]:
        have, want = tuple(ids.shape), tuple(image.shape[-2:])
        raise BadImage(f"its panoptic map has {have[0]} x {have[1]} pixels, the image {want[0]} x {want[1]}")
    stated = row[SEGMENTS]
    table = np.zeros(2**24, np.uint8 if len(stated) < 256 else np.int32)  # from ids to numbers; mostly never touched
    table[[s["id"] for s in stated]] = np.arange(1, len(stated) + 1)
    numbers = table[ids]
    places = find_objects(numbers, len(stated))  # (rows, columns) of each, or None
    found = [(k + 1, s, place) for k, (s, place) in enumerate(zip(stated, places, strict=True)) if place is not None]
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
