"""Heights and widths of images from their headers, without decoding them."""

import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import PIL.Image

from .images import IMAGE, decode, open_image, opened
from .local_files import package_key, state_key
from .source import show_progress_of

ORIENTATION = 0x0112  # EXIF's tag; its values from 5 on turn an image on its side


def image_size(value: Any) -> tuple[int, int]:
    """Height and width of an image as `decode` shows it, upright; (0, 0) where it cannot be read.

    Args:
        value: see `decode`; of an image that lies on its side in a rare format, all is read, else the header alone.
    """
    try:
        if isinstance(value, PIL.Image.Image):
            return upright_size(value) or tuple(decode(value).shape[-2:])
        with opened(value) as file, open_image(file) as image:
            size = upright_size(image)
        return size or tuple(decode(value).shape[-2:])
    except Exception:  # whatever the parser of a broken image meets; reading the image itself will tell
        return 0, 0


def upright_size(image: PIL.Image.Image) -> tuple[int, int] | None:
    """Height and width after the turn that a camera noted; None where only decoding tells.

    PIL's reader of TIFF turns the image itself, in some versions before it tells the size.
    """
    width, height = image.size
    if image.format in ("JPEG", "MPO"):  # torchvision's reader follows EXIF, and not the same mark in XMP
        exif = PIL.Image.Exif()
        exif.load(image.info.get("exif", b""))
    else:
        exif = image.getexif()
    if exif.get(ORIENTATION, 1) < 5:
        return height, width
    return (width, height) if image.format in ("JPEG", "MPO", "PNG", "WEBP") else None


def image_sizes(rows: datasets.Dataset) -> np.ndarray:
    """(N, 2) int64 height and width of the images of `image_rows`, kept in the cache until a file changes."""
    show_progress_of(rows)

    def read(batch: dict[str, list]) -> dict[str, list[int]]:
        height, width = zip(*map(image_size, batch[IMAGE]), strict=True)
        return {"height": list(height), "width": list(width)}

    key = state_key(image_files(rows), rows._fingerprint, package_key())[:32]
    sizes = rows.map(read, batched=True, batch_size=100, remove_columns=rows.column_names, new_fingerprint=key)
    sizes = sizes.with_format("numpy")[:]
    return np.stack([sizes["height"], sizes["width"]], axis=1).astype(np.int64)


def image_files(rows: datasets.Dataset) -> list[str]:
    """The local files that hold the images of `image_rows`; none where the rows hold the bytes."""
    files = []
    for batch in rows.select_columns([IMAGE]).iter(10_000):
        for value in batch[IMAGE]:
            if isinstance(value, Mapping):
                value = value["path"] if value["bytes"] is None else None
            if isinstance(value, str) and os.path.isfile(value):
                files.append(value)
    return files
