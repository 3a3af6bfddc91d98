"""Videos of moving images: bounces, the linear oracle, seeds, and disjoint splits."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_tfm.data.batching import rng
from hf_tfm.data.moving_images import Motion, MovingImages, fitted, read_images
from hf_tfm.data.source import load_splits

IMAGES = np.random.RandomState(0).randint(1, 256, (5, 1, 3, 4)).astype(np.uint8)


def generator(number: int = 2, speed: float = 0.1, size: tuple[int, int] = (12, 11)) -> MovingImages:
    return MovingImages(IMAGES, size, number, speed)


def corners(frames: np.ndarray) -> list[tuple[int, int]]:
    """Top left corner of the only image in each frame."""
    found = []
    for frame in frames[:, 0]:
        rows, columns = (np.flatnonzero(frame.any(axis=axis)) for axis in (1, 0))
        found.append((rows[0], columns[0]))
    return found


def test_images_stay_on_the_canvas_and_keep_their_speed():
    motion = generator(1).video(2, 60, rng(0))
    frames = motion.frames()
    assert frames.shape == (60, 1, 12, 11) and frames.dtype == np.uint8
    for frame, (top, left) in zip(frames, corners(frames), strict=True):
        assert np.array_equal(frame[:, top : top + 3, left : left + 4], IMAGES[2])
        assert frame.sum() == IMAGES[2].sum()
    assert np.allclose(np.linalg.norm(motion.velocities, axis=-1), 0.1)
    assert motion.places.min() == 0 and motion.places.max() == 1  # it has touched the walls
    moved = np.abs(np.diff(motion.places, axis=0))
    assert moved.max() <= 0.1 + 1e-12 and ((motion.velocities[1:] * motion.velocities[:-1]) < 0).any()


def test_images_are_joined_by_their_maximum():
    motion = Motion(IMAGES[:2], (3, 4), np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))
    assert np.array_equal(motion.frames()[0], np.maximum(IMAGES[0], IMAGES[1]))


def test_linear_motion_is_exact_until_a_wall_and_leaves_the_canvas():
    exact = 0
    for seed in range(20):
        motion = generator(1).video(0, 15, rng(seed))
        linear, after = motion.linear(4, 10), motion.frames()[5:]
        turned = (motion.velocities[5:] != motion.velocities[4]).any(axis=(1, 2))
        first = int(turned.argmax()) if turned.any() else 10  # the frame in which it touches a wall
        assert np.array_equal(linear[:first], after[:first])
        exact += first == 10
    assert exact < 20
    away = Motion(IMAGES[:1], (12, 11), np.zeros((1, 1, 2)), np.full((1, 1, 2), -0.2)).linear(0, 5)
    assert away[0].any() and not away[4].any()


def test_a_video_depends_on_its_seed_and_row_alone():
    one, same, other = (generator().video(1, 4, rng(*key)).frames() for key in ((0, 3, 1), (0, 3, 1), (0, 4, 1)))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_images_of_the_splits_are_disjoint():
    """Every video of a split consists of images of that split, and these are different digits."""
    splits = load_splits("digits")
    images = {name: read_images(rows, (8, 8), 1) for name, rows in splits.items()}
    known = {name: {image.tobytes() for image in part} for name, part in images.items()}
    assert {name: len(part) for name, part in images.items()} == {"train": 1197, "validation": 200, "test": 400}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not known[one] & known[other]
    for name, part in images.items():
        made = MovingImages(part, (32, 32), 2, 0.1).video(7, 3, rng(0, 7))
        assert {image.tobytes() for image in made.images} <= known[name]
        assert np.array_equal(made.images[0], part[7])


def png(color: tuple[int, int, int]) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (6, 6), color).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_images_are_resized_and_grey_or_coloured():
    rows = Dataset.from_list(
        [{"image": png((255, 0, 0))}, {"image": {"bytes": b"no image", "path": None}}],
        features=Features({"image": ImageFeature(decode=False)}),
    )
    colored = read_images(rows.select([0]), (3, 4), 3)
    assert colored.shape == (1, 3, 3, 4) and colored[0, :, 0, 0].tolist() == [255, 0, 0]
    assert read_images(rows.select([0]), (3, 4), 1)[0, 0, 0, 0] == 76  # 0.299 of red (ITU-R BT.601)
    with pytest.raises(ValueError, match="image 1 cannot be read: its image format is not supported"):
        read_images(rows, (3, 4), 1)
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert fitted(frames, (4, 4), 3) is frames
