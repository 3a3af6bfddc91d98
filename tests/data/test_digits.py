"""The embedded images: scikit-learn's digits, each in one split, reproducible by seed."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hf_tfm.data.digits import TOTAL, digits
from hf_tfm.data.source import load_splits


def greys(rows):
    """(N, 64): the original 8 x 8 image, 0 to 16, of each image."""
    return np.stack([np.array(image.convert("L").resize((8, 8), 2)).reshape(64) for image in rows["image"]]) / 255 * 16


def test_splits_sizes_and_features():
    splits = load_splits("digits")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1197, "validation": 200, "test": 400}
    row = splits["train"][0]
    assert (row["image"].size, row["image"].mode) == ((32, 32), "RGB")
    assert splits["test"].features["label"].names == list("0123456789")
    for rows in splits.values():  # ten classes of about equal size
        counts = np.bincount(rows["label"], minlength=10)
        assert counts.min() > len(rows) / 20 and counts.max() < len(rows) / 5


def test_every_digit_is_included_once_with_its_label():
    images, labels = load_digits(return_X_y=True)
    splits = digits(size=8)
    found = [
        (tuple(np.rint(pixels).astype(int)), label)
        for rows in splits.values()
        for pixels, label in zip(greys(rows), rows["label"], strict=True)
    ]
    assert sorted(found) == sorted((tuple(row.astype(int)), label) for row, label in zip(images, labels, strict=True))


def test_upsampled_digits_match_the_original():
    small, large = (digits(validation=10, test=10, size=size)["test"] for size in (8, 32))
    assert small["label"] == large["label"]
    original, shrunk = greys(small), greys(large)
    assert np.abs(original - shrunk).mean() < 2.0
    assert np.corrcoef(original.ravel(), shrunk.ravel())[0, 1] > 0.97


def test_seed_determines_the_splits():
    first, again, other = (digits(seed, validation=20, test=20)["test"] for seed in (3, 3, 4))
    assert first["label"] == again["label"] != other["label"]
    assert [image.tobytes() for image in first["image"]] == [image.tobytes() for image in again["image"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size must be at least 8, got 7"),
        ({"test": -1}, "test must be at least 0, got -1"),
        ({"validation": 1000, "test": 797}, f"validation \\+ test must be below {TOTAL}, .*, got 1797"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


def test_it_refuses_options_of_other_data_sets():
    with pytest.raises(ValueError, match='dataset_name "digits" is embedded'):
        load_splits("digits", streaming=True)
