"""Heights and widths of images from their headers, without decoding."""

import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import PIL.Image

from .images import IMAGE, decode, open_image, opened
from .local_files import package_key, state_key
from .progress import show_progress_of

ORIENTATION = 0x0112  # EXIF tag; values of 5 and above rotate the image by 90 degrees


def image_size(value: Any) -> tuple[int, int]:
    """Return height and width of an image as `decode` returns it, upright; (0, 0) if it cannot be read.

    Args:
        value: see `decode`. Only the header is read, except for a rotated image in a rare format, which is decoded.
    """
    try:
        if isinstance(value, PIL.Image.Image):
            return upright_size(value) or tuple(decode(value).shape[-2:])
        with opened(value) as file, open_image(file) as image:
            size = upright_size(image)
        return size or tuple(decode(value).shape[-2:])
    except Exception:  # parsers of broken images raise anything; reading the image itself reports the error
        return 0, 0


def upright_size(image: PIL.Image.Image) -> tuple[int, int] | None:
    """Return height and width after EXIF rotation; None if they are known only after decoding.

    PIL's TIFF reader rotates the image itself, in some versions before it reports the size.
    """
    width, height = image.size
    if image.format in ("JPEG", "MPO"):  # torchvision's decoder follows EXIF but not the same tag in XMP
        exif = PIL.Image.Exif()
        exif.load(image.info.get("exif", b""))
    else:
        exif = image.getexif()
    if exif.get(ORIENTATION, 1) < 5:
        return height, width
    return (width, height) if image.format in ("JPEG", "MPO", "PNG", "WEBP") else None


def image_sizes(rows: datasets.Dataset) -> np.ndarray:
    """Return (N, 2) int64 height and width of the images of `image_rows`, cached until a file changes unless the rows
    are in memory."""
    if not rows.cache_files:
        return np.array([image_size(value) for value in rows[IMAGE]], np.int64).reshape(-1, 2)
    show_progress_of(rows)

    def read(batch: dict[str, list]) -> dict[str, list[int]]:
        height, width = zip(*map(image_size, batch[IMAGE]), strict=True)
        return {"height": list(height), "width": list(width)}

    key = state_key(image_files(rows), rows._fingerprint, package_key())[:32]
    sizes = rows.map(read, batched=True, batch_size=100, remove_columns=rows.column_names, new_fingerprint=key)
    sizes = sizes.with_format("numpy")[:]
    return np.stack([sizes["height"], sizes["width"]], axis=1).astype(np.int64)


def image_files(rows: datasets.Dataset) -> list[str]:
    """Return the local files of the images of `image_rows`; empty if the rows hold the bytes."""
    files = []
    for batch in rows.select_columns([IMAGE]).iter(10_000):
        for value in batch[IMAGE]:
            if isinstance(value, Mapping):
                value = value["path"] if value["bytes"] is None else None
            if isinstance(value, str) and os.path.isfile(value):
                files.append(value)
    return files
