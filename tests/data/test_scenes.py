"""Scenes: boxes, masks, areas and labels follow their objects through all image operations."""

import numpy as np
import pytest
import torch
from annotated_images import OBJECTS, SIZES, colours, jpeg, segment_map
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from hf_tfm.data import run_lengths
from hf_tfm.data.images import BadImage
from hf_tfm.data.scenes import (
    CHANCES,
    CROP,
    FLIP,
    Scene,
    SceneAugmentation,
    boxes_like,
    chances,
    empty_scene,
    fitted,
    read_scene,
    scaled,
)

NEAREST = InterpolationMode.NEAREST_EXACT


def mask_boxes(masks):
    """The boxes of masks, including their last pixels."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def painted(seed=0, segments=False, count=6, size=(90, 120)) -> Scene:
    """Rectangles of different colors, later ones in front, each with the box and mask of its visible part."""
    random = np.random.default_rng(seed)
    front = torch.zeros(size, dtype=torch.int32)
    for k in range(count):
        top, left = (int(v) for v in random.integers(0, (size[0] - 20, size[1] - 20)))
        height, width = (int(v) for v in random.integers(4, 40, 2))
        front[top : top + height, left : left + width] = k + 1
    ids = front.unique()
    ids = ids[ids > 0]
    masks = front == ids[:, None, None]
    image = torch.stack([front * 20, front * 7, 255 - front]).to(torch.uint8)
    return Scene(
        ImageTensor(image),
        boxes_like(mask_boxes(masks), size),
        ids.long(),  # the label is the color
        masks.flatten(1).sum(dim=1).float(),
        ids % 3 == 0,
        Mask(front[None] if segments else masks),
        ids if segments else None,
    )


def visible_rectangles(scene):
    """(h, w) index of the rectangle visible at each pixel."""
    return scene.image[0].int() // 20


def check_objects(scene):
    """Check that objects are exactly where their color is, and that none is missing."""
    seen = visible_rectangles(scene)
    assert scene.labels.tolist() == [k for k in seen.unique().tolist() if k]
    masks = scene.object_masks()
    assert masks.shape == (len(scene.labels), *scene.size)
    for label, box, mask in zip(scene.labels, scene.boxes, masks, strict=True):
        assert torch.equal(mask, seen == label)
        y, x = torch.nonzero(mask, as_tuple=True)
        tight = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1], dtype=torch.float32)
        assert (box - tight).abs().max() <= 1.5  # resized boxes are fractional, cropped ones loose
    assert scene.iscrowd.tolist() == (scene.labels % 3 == 0).tolist()
    assert tuple(scene.boxes.canvas_size) == scene.size


@pytest.mark.parametrize("segments", [False, True], ids=["masks", "segments"])
@pytest.mark.parametrize("seed", range(8))
def test_objects_stay_on_their_pixels(seed, segments):
    scene = painted(seed, segments, count=2 + seed)
    before = scene.image.clone()
    check_objects(scene)
    check_objects(scene.flip())
    check_objects(scene.resize(151, 180, NEAREST))
    assert torch.equal(scene.flip().flip().image, scene.image) and torch.equal(scene.flip().flip().boxes, scene.boxes)
    assert torch.equal(scene.image, before)


@pytest.mark.parametrize("segments", [False, True], ids=["masks", "segments"])
@pytest.mark.parametrize("seed", range(8))
def test_crop_keeps_objects_inside_it(seed, segments):
    random = np.random.default_rng(seed)
    scene = painted(seed, segments)
    top, left = int(random.integers(0, 50)), int(random.integers(0, 70))
    height, width = int(random.integers(20, 41)), int(random.integers(20, 51))
    part = scene.crop(top, left, height, width)
    assert torch.equal(part.image, scene.image[:, top : top + height, left : left + width])
    assert part.labels.tolist() == [k for k in visible_rectangles(part).unique().tolist() if k]
    for label, box, area, mask in zip(part.labels, part.boxes, part.area, part.object_masks(), strict=True):
        assert torch.equal(mask, visible_rectangles(part) == label)
        whole = int((scene.labels == label).nonzero())
        old = scene.boxes[whole] - torch.tensor([left, top, left, top])
        expected = old.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        assert torch.equal(torch.Tensor(box), torch.Tensor(expected))
        share = (expected[2:] - expected[:2]).prod() / (old[2:] - old[:2]).prod()
        assert area == pytest.approx(float(scene.area[whole] * share), rel=1e-5)


def test_crop_without_masks_uses_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [9.5, 0, 30, 30], [40, 40, 50, 50], [15.2, 15, 15.7, 18]])
    scene = Scene(
        empty_scene((60, 60)).image, boxes_like(boxes, (60, 60)), torch.arange(4), torch.ones(4), torch.zeros(4) > 0
    )
    part = scene.crop(0, 0, 20, 10)
    assert part.labels.tolist() == [0] and part.boxes.tolist() == [[0, 0, 10, 10]]  # half a pixel of box 1 is left
    assert scene.crop(10, 10, 20, 20).labels.tolist() == [1, 3]  # box 3 was already thinner than a pixel
    assert len(scene.crop(52, 52, 5, 5).labels) == 0
    with pytest.raises(ValueError, match="read without masks"):
        part.object_masks()


@pytest.mark.parametrize("segments", [False, True], ids=["masks", "segments"])
def test_object_without_a_pixel_in_the_crop_is_dropped(segments):
    """For a diagonal line, the box covers the corners but the line does not."""
    line = torch.eye(40, dtype=torch.int32)
    ids = torch.tensor([1], dtype=torch.int32) if segments else None
    masks = Mask(line[None] if segments else line[None] > 0)
    empty = empty_scene((40, 40))
    boxes = boxes_like(torch.tensor([[0.0, 0, 40, 40]]), (40, 40))
    scene = Scene(empty.image, boxes, torch.tensor([5]), torch.tensor([40.0]), torch.tensor([False]), masks, ids)
    assert scene.crop(0, 0, 20, 20).labels.tolist() == [5]
    corner = scene.crop(0, 20, 20, 20)
    assert corner.labels.tolist() == [] and corner.object_masks().shape == (0, 20, 20)


def test_areas_are_scaled():
    scene = painted()
    np.testing.assert_allclose(scene.resize(180, 240).area, 4 * scene.area)
    assert scene.resize(90, 120) is scene


# --- reading


def row(index, **fields):
    height, width = SIZES[index]
    return {"image": jpeg(index, "PNG"), "image_id": index, "height": height, "width": width, **fields}


def objects_row(index=0):
    objects = []
    for x, y, w, h, category, area, crowd in OBJECTS[index]:
        mask = np.zeros(SIZES[index], bool)
        mask[y : y + h, x : x + w] = True
        found = {"bbox": [x, y, w, h], "category": category, "area": area, "iscrowd": crowd}
        objects.append(found | {"segmentation": run_lengths.encode(mask)})
    return row(index, objects=objects)


def segments_row(index=0):
    ids, segments = segment_map(index)
    found = [
        {"id": s["id"], "category": s["category_id"], "area": s["area"], "iscrowd": s["iscrowd"]} for s in segments
    ]
    return row(index, panoptic=colours(ids), segments_info=found)


def test_objects_are_read():
    scene = read_scene(objects_row(), masks=True)
    assert scene.size == SIZES[0] and scene.image.dtype == torch.uint8
    assert scene.boxes.tolist() == [[4, 6, 24, 16], [30, 20, 55, 35]]
    assert (scene.labels.tolist(), scene.area.tolist(), scene.iscrowd.tolist()) == ([1, 2], [150, 300], [False, True])
    assert torch.equal(mask_boxes(scene.object_masks()), torch.Tensor(scene.boxes))
    empty = read_scene(objects_row(1), masks=True)
    assert empty.boxes.shape == (0, 4) and empty.object_masks().shape == (0, *SIZES[1])
    assert read_scene(objects_row()).masks is None


def test_segments_are_read_with_their_boxes():
    scene = read_scene(segments_row())
    ids, segments = segment_map(0)
    assert scene.labels.tolist() == [s["category_id"] for s in segments]
    np.testing.assert_array_equal(scene.object_masks(), ids == np.array([s["id"] for s in segments])[:, None, None])
    assert scene.boxes.tolist() == [[4, 6, 24, 16], [30, 20, 55, 35], [1, 0, 60, 40]]  # 0 on the edge is not a segment
    gone = segments_row()
    gone["segments_info"].append({"id": 99, "category": 0, "area": 1, "iscrowd": False})
    assert read_scene(gone).labels.tolist() == scene.labels.tolist()


def test_images_that_contradict_their_row():
    with pytest.raises(BadImage, match="it has 40 x 60 pixels, but its row states 60 x 40"):
        read_scene({**objects_row(), "height": 60, "width": 40})
    assert read_scene({**objects_row(), "height": 0, "width": 0}).size == SIZES[0]  # unknown
    with pytest.raises(BadImage, match="its panoptic map has 48 x 32 pixels, the image 40 x 60"):
        read_scene({**segments_row(), "panoptic": colours(segment_map(1)[0])})
    with pytest.raises(BadImage):
        read_scene({**segments_row(), "panoptic": b"no image"})


# --- augmentation


def drawn(**certain):
    """Random choices for one scene, some of them given."""
    values = chances(0, 0, 0)[0]
    for column, value in certain.items():
        values[{"flip": FLIP, "crop": CROP}[column]] = value
    return values


def test_random_choices_depend_only_on_the_row():
    whole = chances(3, 5, 0, 50)
    assert whole.shape == (50, CHANCES) and len(np.unique(whole)) == whole.size
    for i in (0, 1, 17, 49):
        np.testing.assert_array_equal(chances(3, 5, i)[0], whole[i])
    np.testing.assert_array_equal(chances(3, 5, 20, 4), whole[20:24])
    assert not np.isin(whole, chances(3, 6, 0, 50)).any() and not np.isin(whole, chances(4, 5, 0, 50)).any()
    assert abs(whole.mean() - 0.5) < 0.05


@pytest.mark.parametrize("canvas", [None, (260, 300)])
@pytest.mark.parametrize("segments", [False, True], ids=["masks", "segments"])
def test_augmented_objects_stay_on_their_pixels(segments, canvas):
    """At larger scales than the image, so that resizing loses no pixel."""
    augmentation = SceneAugmentation(scales=(130, 160, 190), max_size=300)
    sizes, flipped = set(), 0
    for i in range(30):
        scene = painted(i, segments)
        fate = chances(1, 0, i)[0]
        changed = augmentation(scene, fate, canvas, NEAREST)
        sizes.add(changed.size)
        flipped += fate[FLIP] < 0.5
        if fate[CROP] >= 0.5:  # a cropped box may be loose, see the test of crops
            check_objects(changed)
        assert changed.labels.tolist() == [k for k in visible_rectangles(changed).unique().tolist() if k]
        assert torch.equal(changed.object_masks(), visible_rectangles(changed) == changed.labels[:, None, None])
        if canvas is None:
            assert min(changed.size) in (130, 160, 190) or max(changed.size) == 300
        else:
            assert changed.size[0] == 260 or changed.size[1] == 300
    assert len(sizes) > 5 and 5 < flipped < 25


def test_crops_match_the_paper():
    """Of an image resized to 400, 500 or 600, sides of 384 to 600 pixels at any position."""
    sizes = np.tile([480, 640], (4000, 1))
    augmentation = SceneAugmentation()
    fate = chances(0, 0, 0, 4000)
    top, left, height, width = augmentation.crops(sizes, fate).T
    whole = (height == 480) & (width == 640)
    assert abs(1 - whole.mean() - 0.5) < 0.03
    scale = np.array([400, 500, 600])[(fate[:, 2] * 3).astype(int)][~whole] / 480
    h, w = height[~whole] * scale, width[~whole] * scale
    assert (h >= 383).all() and (h <= np.minimum(600, 480 * scale) + 1).all()
    assert (w >= 383).all() and (w <= np.minimum(600, 640 * scale) + 1).all()
    assert abs(w[scale == 600 / 480].mean() - 492) < 8  # uniform
    assert (top >= 0).all() and (top + height <= 480).all() and (left >= 0).all() and (left + width <= 640).all()
    assert (top[~whole].max(), left[~whole].max()) > (50, 100)


def test_disabled_augmentation_equals_evaluation():
    still = SceneAugmentation(scales=(60,), max_size=100, crop=0.0, flip=0.0)
    scene = painted()
    changed = still(scene, drawn(flip=0.0, crop=0.0))
    assert changed.size == (60, 80) and torch.equal(changed.image, scene.resize(60, 80).image)


def test_horizontal_and_vertical_flip_share_one_draw():
    """A quarter of the scenes for each combination; horizontal flips alone are as without vertical ones."""
    augmentation = SceneAugmentation(scales=(90,), crop=0.0, flip=0.5, vertical_flip=0.5)
    alone = SceneAugmentation(scales=(90,), crop=0.0, flip=0.5)
    scene, kinds = painted().resize(90, 120), []
    ways = {name: scene.image.flip(dims) for name, dims in {"both": (1, 2), "top": (1,), "left": (2,)}.items()}
    for i in range(200):
        fate = chances(0, 0, i)[0]
        image = augmentation(scene, fate).image
        kinds.append(next((name for name, flipped in ways.items() if torch.equal(image, flipped)), "none"))
        left = torch.equal(alone(scene, fate).image, ways["left"])
        assert left == (kinds[-1] in ("both", "left")) == bool(fate[FLIP] < 0.5)
    assert all(30 < kinds.count(name) < 70 for name in ("both", "top", "left", "none"))


def test_vertical_flip():
    scene = painted()
    still = SceneAugmentation(scales=(min(scene.size),), crop=0.0, flip=0.0)
    changed = SceneAugmentation(scales=(min(scene.size),), crop=0.0, flip=0.0, vertical_flip=1.0)(scene, drawn())
    check_objects(changed)
    assert torch.equal(changed.image, still(scene, drawn()).image.flip(1))
    assert torch.equal(changed.boxes[:, [0, 2]], scene.boxes[:, [0, 2]])


def test_color_jitter_changes_only_colors():
    scene, fate = painted(), drawn()
    plain = SceneAugmentation(scales=(90,))(scene, fate)
    torch.manual_seed(0)
    first, second = (SceneAugmentation(scales=(90,), color_jitter=0.4)(scene, fate) for _ in range(2))
    assert not torch.equal(first.image, plain.image) and not torch.equal(first.image, second.image)
    assert torch.equal(first.boxes, plain.boxes) and first.image.dtype == torch.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales must be pixels in \[1, 65535\], got \(\)"),
        ({"scales": (0, 5)}, r"scales must be pixels in \[1, 65535\]"),
        ({"crop_scales": (-1,)}, r"crop_scales must be pixels in \[1, 65535\]"),
        ({"max_size": 700}, r"max_size must be in \[800, 65535\], got 700"),
        ({"max_size": 70_000}, r"max_size must be in \[800, 65535\], got 70000"),
        ({"crop_size": (600, 384)}, r"crop_size must be two numbers in \[1, 65535\], the smaller first, got 600, 384"),
        ({"crop": 1.5}, r"crop must be in \[0, 1\], got 1.5"),
        ({"flip": -0.1}, r"flip must be in \[0, 1\], got -0.1"),
        ({"vertical_flip": 1.1}, r"vertical_flip must be in \[0, 1\], got 1.1"),
        ({"color_jitter": -1}, "color_jitter must be at least 0, got -1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SceneAugmentation(**options)


def test_sizes_on_a_canvas():
    assert fitted((480, 640), (800, 1066)) == (800, 1066)
    assert fitted((480, 640), (800, 2000)) == (800, 1067)
    assert fitted((10, 1000), (300, 300)) == (3, 300)
    assert fitted((1, 1000), (300, 300)) == (1, 300)
    assert scaled(np.array([[480, 640]]), 800, 1333).tolist() == [[800, 1066]]
