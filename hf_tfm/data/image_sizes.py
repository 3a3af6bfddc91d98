"""Heights and widths of images from their headers, without decoding them."""

from collections.abc import Mapping
from contextlib import closing
from io import BytesIO
from typing import Any

import datasets
import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps

from .images import IMAGE
from .source import show_progress_of

ORIENTATION = 0x0112  # EXIF's tag; its values from 5 on turn an image on its side


def image_size(value: Any) -> tuple[int, int]:
    """Height and width of an image as `decode` shows it, upright; (0, 0) where it cannot be read.

    Args:
        value: see `decode`; of a file, only the beginning is read.
    """
    try:
        if isinstance(value, Mapping):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, PIL.Image.Image):
            return upright_size(value)
        file = BytesIO(value) if isinstance(value, bytes) else fsspec.open(value, "rb").open()
        with closing(file), PIL.Image.open(file) as image:
            return upright_size(image)
    except Exception:  # whatever the parser of a broken image meets; reading the image itself will tell
        return 0, 0


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Height and width after the turn that a camera noted."""
    width, height = image.size
    return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def image_sizes(rows: datasets.Dataset) -> np.ndarray:
    """(N, 2) int64 height and width of the images of `image_rows`; `datasets` keeps them for the next time."""
    show_progress_of(rows)

    def read(batch: dict[str, list]) -> dict[str, list[int]]:
        height, width = zip(*map(image_size, batch[IMAGE]), strict=True)
        return {"height": list(height), "width": list(width)}

    sizes = rows.map(read, batched=True, batch_size=100, remove_columns=rows.column_names).with_format("numpy")[:]
    return np.stack([sizes["height"], sizes["width"]], axis=1).astype(np.int64)
