"""The embedded images: scikit-learn's handwritten digits, 8 x 8 pixels of 17 greys, enlarged.

    seed -> shuffle -> train | validation | test -> (8, 8) of 0 to 16 -> RGB image of the size asked for

The test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
doi:10.24432/C50P49, CC BY 4.0), which comes with scikit-learn: 1,797 digits of 13 people, ten classes of about equal
size. Real images that need no download.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

TOTAL = 1797
WHITE = 16  # the brightest of the grey values
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def digits(seed: int = 0, validation: int = 200, test: int = 400, size: int = 32) -> DatasetDict:
    """Load and split the digits; none stands in two splits.

    Args:
        seed: 0 to 2^32 - 1; decides which digit goes where.
        validation: rows of the validation split.
        test: rows of the test split; the training split has the rest of the 1,797.
        size: height and width in pixels; the 8 x 8 are enlarged with bicubic interpolation.

    Returns:
        splits "train", "validation" and "test" with the columns ``image`` (RGB, PNG) and ``label`` (0 to 9).

    Raises:
        ValueError: a size or the seed is out of range.
    """
    for name, value, least in (("validation", validation, 0), ("test", test, 0), ("size", size, 8)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if validation + test >= TOTAL:
        raise ValueError(f"validation + test must be below {TOTAL}, the digits there are, got {validation + test}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    images, labels = load_digits(return_X_y=True)
    # numpy keeps the stream of this generator frozen between versions, which it does not promise for default_rng.
    order = np.random.RandomState(seed).permutation(TOTAL)
    splits, start = DatasetDict(), 0
    for name, rows in {"test": test, "validation": validation, "train": TOTAL - validation - test}.items():
        chosen = order[start : start + rows]
        pictures = [enlarge(images[i].reshape(8, 8), size) for i in chosen]
        splits[name] = Dataset.from_dict({"image": pictures, "label": labels[chosen].tolist()}, features=FEATURES)
        start += rows
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test")})


def enlarge(digit: np.ndarray, size: int) -> PILImage.Image:
    """(8, 8) greys of 0 to 16 -> RGB image of ``size`` x ``size`` pixels."""
    grey = np.rint(digit * (255 / WHITE)).astype(np.uint8)
    return PILImage.fromarray(grey).resize((size, size), PILImage.Resampling.BICUBIC).convert("RGB")
