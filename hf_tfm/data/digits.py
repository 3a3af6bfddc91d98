"""Built-in images: scikit-learn's handwritten digits, 8 x 8 pixels with 17 grey levels, enlarged.

    seed -> shuffle -> train | validation | test -> (8, 8) of 0 to 16 -> RGB image of the requested size

The test part of the UCI "Optical Recognition of Handwritten Digits" data set (Alpaydin and Kaynak 1998,
doi:10.24432/C50P49, CC BY 4.0), which ships with scikit-learn: 1,797 digits written by 13 people, ten classes of about
equal size. Real images without a download.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

TOTAL = 1797
WHITE = 16  # maximum grey value
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def digits(seed: int = 0, validation: int = 200, test: int = 400, size: int = 32) -> DatasetDict:
    """Load and split the digits; the splits are disjoint.

    Args:
        seed: 0 to 2^32 - 1; determines the split.
        validation: rows of the validation split.
        test: rows of the test split; the training split gets the rest of the 1,797.
        size: height and width in pixels; the 8 x 8 images are enlarged with bicubic interpolation.

    Returns:
        Splits "train", "validation" and "test" with the columns ``image`` (RGB, PNG) and ``label`` (0 to 9).

    Raises:
        ValueError: if a size or the seed is out of range.
    """
    for name, value, least in (("validation", validation, 0), ("test", test, 0), ("size", size, 8)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if validation + test >= TOTAL:
        raise ValueError(f"validation + test must be below {TOTAL}, the number of digits, got {validation + test}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    images, labels = load_digits(return_X_y=True)
    # NumPy guarantees a stable stream across versions for this legacy generator, but not for default_rng.
    order = np.random.RandomState(seed).permutation(TOTAL)
    splits, start = DatasetDict(), 0
    for name, rows in {"test": test, "validation": validation, "train": TOTAL - validation - test}.items():
        chosen = order[start : start + rows]
        pictures = [enlarge(images[i].reshape(8, 8), size) for i in chosen]
        splits[name] = Dataset.from_dict({"image": pictures, "label": labels[chosen].tolist()}, features=FEATURES)
        start += rows
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test")})


def enlarge(digit: np.ndarray, size: int) -> PILImage.Image:
    """Convert (8, 8) greys of 0 to 16 to an RGB image of ``size`` x ``size`` pixels."""
    grey = np.rint(digit * (255 / WHITE)).astype(np.uint8)
    return PILImage.fromarray(grey).resize((size, size), PILImage.Resampling.BICUBIC).convert("RGB")
