"""Augmentation depends only on (seed, epoch, index), keeps sizes and types; mixing against expected values."""

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from hf_tfm.data.augment import Augmentation, Mixing, hash_key, mix, partners, seeded

SIZE, MEAN, STD = (24, 32), [120.0, 110.0, 100.0], [60.0, 55.0, 50.0]
IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 30, 50), dtype=np.uint8))


def fixed(image):
    return image[:, :24, :32]


def transform(**options):
    return Augmentation(**options).transform(SIZE, InterpolationMode.BICUBIC, MEAN, STD, fixed)


def drawn(change, *key, image=IMAGE):
    with seeded() as seed:
        seed(*key)
        return change(image.clone())


EVERYTHING = {
    "resized": {},
    "pad": {"crop": "pad"},
    "none": {"crop": "none"},
    "rand_augment": {"rand_augment": 2},
    "color_jitter": {"crop": "none", "flip": 0.0, "color_jitter": 0.4},
    "erasing": {"crop": "none", "flip": 0.0, "erasing": 1.0},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_augmented_image_depends_only_on_its_key(options):
    change = transform(**options)
    first = [drawn(change, 1, epoch, index) for epoch in range(3) for index in range(5)]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    again = [drawn(transform(**options), 1, epoch, index) for epoch in range(2, -1, -1) for index in range(4, -1, -1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again[::-1], strict=True))
    assert all(image.shape == (3, *SIZE) and image.dtype == torch.uint8 for image in first)
    different = {image.numpy().tobytes() for image in first}
    assert len(different) == 2 if options == {"crop": "none"} else len(different) > 10
    assert not torch.equal(drawn(change, 2, 0, 0), first[0]) or options == {"crop": "none"}


def test_key_hashes_do_not_depend_on_the_platform():
    assert hash_key(0, 1, 2) == 8901564848246840783
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in (0, 1, 2, 2**40, 2**40 + 1)]
    assert len({hash_key(*key) for key in keys}) == len(keys)


def test_global_generator_is_not_used():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn(transform(rand_augment=2), 0, 0, 0)
    assert torch.equal(torch.rand(4), expected)


def test_flip_and_pad():
    flipped = drawn(transform(crop="none", flip=1.0), 0, 0, 0)
    assert torch.equal(flipped, fixed(IMAGE).flip(-1))
    still = IMAGE[:, :24, :32]
    shifted = drawn(transform(crop="pad", flip=0.0, padding=4), 0, 0, 1, image=still)
    padded = torch.nn.functional.pad(still, (4, 4, 4, 4))
    assert any(torch.equal(shifted, padded[:, i : i + 24, j : j + 32]) for i in range(9) for j in range(9))
    assert torch.equal(drawn(transform(crop="pad", flip=0.0, padding=0), 0, 0, 0, image=still), still)
    resized = functional.resize(IMAGE, list(SIZE), InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(drawn(transform(crop="pad", flip=0.0, padding=0), 0, 0, 0), resized)
    places = {
        drawn(transform(crop="pad", flip=0.0, padding=1), 0, 0, i, image=still).numpy().tobytes() for i in range(99)
    }
    assert len(places) == 9, "every place"


def test_erasing_fills_a_rectangle_with_noise_of_the_input_scale():
    change = transform(crop="none", flip=0.0, erasing=1.0)
    black = torch.zeros(3, 30, 50, dtype=torch.uint8)
    images = [drawn(change, 0, 0, index, image=black) for index in range(200)]
    for image in images:
        rows, columns = (image > 0).any(dim=0).nonzero(as_tuple=True)
        inside = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (inside > 0).any(dim=0).float().mean() > 0.9  # the whole image, except pixels that are black by chance
        assert inside[0].numel() < 0.4 * 24 * 32
    noise = torch.cat([image[:, (image > 0).any(dim=0)] for image in images], dim=1).float()
    assert noise.mean(dim=1).tolist() == pytest.approx(MEAN, abs=3)
    assert noise.std(dim=1).tolist() == pytest.approx(STD, abs=4)  # slightly less: values are clipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, 'crop must be one of resized, pad, none, got "centre"'),
        ({"scale": (0.5, 0.1)}, r"scale must be two numbers in \(0, 1.0\], the smaller first, got 0.5, 0.1"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\], got 1.5"),
        ({"magnitude": 11}, r"magnitude must be in \[0, 10\], got 11"),
        ({"rand_augment": -1}, "rand_augment must be at least 0, got -1"),
    ],
)
def test_augmentation_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# --- mixing


def test_mixing_partners_are_neighbours():
    assert partners([0, 1, 2, 3]) == [1, 0, 3, 2]
    assert partners([0, 1, 2]) == [1, 0, 2]  # the last sample of an odd step
    assert partners([1, 2, 3]) == [0, 2, 1]  # the first image is unreadable


def test_mixing_by_hand():
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 4) * 10  # images with all pixels 0, 10 and 20
    box = torch.tensor([[0, 0, 0, 0], [1, 3, 0, 2], [0, 0, 0, 0]])
    mixed = mix(pixels, torch.tensor([1, 0, 2]), torch.tensor([0.25, 0.25, 0.5]), box)
    assert torch.equal(mixed[0], torch.full((1, 4, 4), 2.5))
    expected = torch.full((1, 4, 4), 10.0)
    expected[:, 1:3, 0:2] = 0.0
    assert torch.equal(mixed[1], expected)
    assert torch.equal(mixed[2], pixels[2])


def test_cutmix_lambda_is_the_box_area_and_depends_on_the_key():
    mixing = Mixing(mixup=0.8, cutmix=1.0)
    draws = [mixing.draw(SIZE, 0, 0, index) for index in range(400)]
    assert draws == [mixing.draw(SIZE, 0, 0, index) for index in range(400)]
    assert draws != [mixing.draw(SIZE, 0, 1, index) for index in range(400)]
    cut = [(share, box) for share, box in draws if box != (0, 0, 0, 0)]
    for share, (top, bottom, left, right) in cut:
        assert 0 <= top <= bottom <= 24 and 0 <= left <= right <= 32
        assert share == pytest.approx((bottom - top) * (right - left) / (24 * 32))
    assert 130 < len(cut) < 270  # half of them, by ``switch``
    assert np.mean([share for share, _ in draws if share]) == pytest.approx(0.45, abs=0.1)


def test_mixup_lambda_is_beta_distributed():
    shares = [Mixing(mixup=0.4).draw(SIZE, 0, 0, index)[0] for index in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


def test_probability_of_mixing():
    draws = [Mixing(mixup=1.0, probability=0.3).draw(SIZE, 0, 0, index)[0] for index in range(1000)]
    assert sum(share > 0 for share in draws) == pytest.approx(300, abs=60)
    assert not Mixing(mixup=1.0, probability=0.0).on and not Mixing().on and Mixing(cutmix=1.0).on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"probability": 2.0}, r"probability must be in \[0, 1\], got 2.0"),
    ],
)
def test_mixing_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Mixing(**options)
