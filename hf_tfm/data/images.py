"""Images with labels from any data set, their decoding, and what happens to those that cannot be read.

load_dataset(...) -> {"image": encoded, "label"} -> uint8 (3, h, w), upright, RGB
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets import ClassLabel, Image, Value
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from .batching import COPY

log = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
FINGERPRINT_IMAGES = 1000


class BadImage(Exception):
    """An image that cannot be read; its text says why."""


def image_rows(rows, image_column: str | None = None, label_column: str | None = None, labelled: bool = True):
    """Rows with ``image``, not decoded, and ``label``, as it is stored.

    Args:
        rows: a `datasets` split, streamed or not.
        image_column: images (`datasets.Image`), or their bytes or paths; default, the only column of images.
        label_column: a ClassLabel, integers or strings; default, the only ClassLabel or the column "label".
        labelled: False leaves labels out.

    Raises:
        ValueError: there are no rows, or no such column.
    """
    features = rows.features
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise ValueError("the data set has no rows")
    if features is None:  # a stream that has to be read for its columns; else nothing is, for images may be broken
        features = dict.fromkeys(next(iter(rows), {}))
    names = {find_column(features, image_column, "image_column", Image, IMAGE): IMAGE}
    if labelled:
        names[find_column(features, label_column, "label_column", ClassLabel, LABEL)] = LABEL
    image = next(iter(names))
    kind = features[image]
    if not (kind is None or isinstance(kind, Image) or is_encoded(kind)):
        raise ValueError(f'image_column "{image}" must hold images, their bytes or their paths, got {kind}')
    if isinstance(kind, Image):
        rows = rows.cast_column(image, Image(decode=False))
    rows = rows.select_columns(list(names))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def is_encoded(kind: Any) -> bool:
    """Whether a feature is one of bytes or of paths, or of both as `datasets.Image` stores them."""
    if isinstance(kind, Mapping):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, Value) and kind.dtype.removeprefix("large_") in ("binary", "string")


def find_column(features: Mapping[str, Any], name: str | None, argument: str, kind: type, usual: str) -> str:
    """The column called ``name``; without one, the only one of a kind, or the one with the usual name.

    Raises:
        ValueError: there is none; the error names the columns there are.
    """
    columns = ", ".join(features)
    if name is not None:
        if name not in features:
            raise ValueError(f'{argument} "{name}" is not a column of the data set; it has {columns}')
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in features:
        return usual
    raise ValueError(f"{argument} must name a column, since none stands out; the data set has {columns}")


def is_label(value: Any) -> bool:
    """Whether a row has a label: None and negative numbers mean that it has none."""
    return value is not None and (isinstance(value, str) or value >= 0)


def stated_names(rows: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """The names of the labels 0, 1 and so on where their type tells: a ClassLabel's, "False" and "True" of a bool."""
    feature = (rows.features or {}).get(LABEL)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return ["False", "True"] if isinstance(feature, Value) and feature.dtype == "bool" else None


def label_names(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """The names of the labels of `image_rows`: those of `stated_names`, otherwise the values there are, sorted.

    Raises:
        ValueError: the rows are a stream without stated names, or a label is neither a number nor a string.
    """
    if names := stated_names(rows):
        return names
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError("the labels of a stream must be a ClassLabel: its values are not known before it is read")
    values = [value for value in rows.unique(LABEL) if is_label(value)]
    if len({type(value) for value in values}) != 1 or not isinstance(values[0], (int, str)):
        raise ValueError(f"labels must be integers or strings, got {values[:5]}")
    return [str(value) for value in sorted(values)]


def label_ids(rows: datasets.Dataset | datasets.IterableDataset, names: Sequence[str]) -> dict[int | str, int]:
    """From a label as it is stored in `image_rows` to its place in ``names``, a model's classes.

    Args:
        names: of `label_names` of the training data, or a model's ``id2label`` in order.

    Raises:
        ValueError: one of `stated_names` is not among the names.
    """
    places = {name: place for place, name in enumerate(names)}
    if (stated := stated_names(rows)) is not None:
        if unknown := [name for name in stated if name not in places]:
            raise ValueError(f'label "{unknown[0]}" is not a class of the model; it has {", ".join(names)}')
        return {number: places[name] for number, name in enumerate(stated)}  # False and True are 0 and 1 as keys
    return places | {int(name): place for name, place in places.items() if name.lstrip("-").isdecimal()}


def encoded(value: Any) -> bytes:
    """The bytes of an image that is given as such, as a path or URL, or as `datasets.Image` stores it."""
    if isinstance(value, Mapping):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadImage(f"there is no image, but {type(value).__name__}")
    if "://" in value:
        with fsspec.open(value, "rb") as file:
            return file.read()
    return Path(value).read_bytes()


def decode(value: Any) -> Tensor:
    """Read an image: RGB, upright, uint8 (3, h, w).

    JPEG by torchvision, straight to a tensor and about twice as fast as PIL with the same pixels; all else by PIL, PNG
    too, since torchvision's reader ends the process on a damaged one (seen with 0.29). The orientation a camera noted
    (EXIF) is followed, as `datasets` and the pipelines of transformers do. Transparency is dropped, as they do too; 16
    bits of grey become 8.

    Args:
        value: bytes, path, URL, PIL image, or a dict of ``bytes`` and ``path``.

    Raises:
        BadImage: it cannot be read to its end. Damage that the decoder can bridge is not noticed.
    """
    try:
        if isinstance(value, PIL.Image.Image):
            return from_pil(value)
        data = encoded(value)
        if data[:2] == b"\xff\xd8":
            try:
                content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_image(content, ImageReadMode.RGB, apply_exif_orientation=True)
            except RuntimeError:
                pass  # PIL reads a few more, and says more clearly what is wrong with the others
        with PIL.Image.open(BytesIO(data)) as image:
            return from_pil(image)
    except BadImage:
        raise
    except Exception as error:  # PIL's readers raise whatever their format's parser meets
        raise BadImage(f"{type(error).__name__}: {error}") from error


def from_pil(image: PIL.Image.Image) -> Tensor:
    """A PIL image of any mode as upright RGB, uint8 (3, h, w)."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL itself would cut all above 255
        image = PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f'mode "{image.mode}" does not say which numbers are black and white')
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def fingerprint(rows: datasets.Dataset) -> str:
    """A hash of the number of rows, their labels, and 1,000 images at even distances as they are stored.

    A large data set is not read as a whole for it.
    """
    digest = hashlib.sha256(str(len(rows)).encode())
    if LABEL in rows.column_names:
        digest.update(repr(list(rows[LABEL])).encode())
    for index in np.unique(np.linspace(0, len(rows) - 1, FINGERPRINT_IMAGES).astype(int)).tolist():
        try:
            digest.update(hashlib.sha256(encoded(rows[index][IMAGE])).digest())
        except (BadImage, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


class WatchedLoader:
    """A loader of image batches that tells of images that could not be read, and gives up at too many.

    Their samples are left out of the batch; those of others are what they would be without them.

    Args:
        loader: gives batches with ``bad``, a list of (sample index, what is wrong); it is taken out of them here.
        max_bad_images: how many images this process leaves out before it stops.

    `bad` holds what was left out so far, by sample index.
    """

    def __init__(self, loader: Any, max_bad_images: int = 10):
        if max_bad_images < 0:
            raise ValueError(f"max_bad_images must be at least 0, got {max_bad_images}")
        self.loader, self.max_bad_images = loader, max_bad_images
        self.bad: dict[int, str] = {}

    def steps_per_epoch(self, epoch: int = 0) -> int | None:
        """See `StepLoader`."""
        return self.loader.steps_per_epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """See `StepLoader`.

        Raises:
            ValueError: there are more than ``max_bad_images``.
        """
        for micro_batches in self.loader.epoch(epoch, start):
            for batch in micro_batches:
                for number, reason in batch.pop("bad"):
                    self.report(number % COPY, reason)
            yield micro_batches

    def report(self, index: int, reason: str) -> None:
        """Tell of an image, once."""
        if index in self.bad:
            return
        self.bad[index] = reason
        log.warning("image %d is left out: %s", index, reason)
        if len(self.bad) > self.max_bad_images:
            lines = "\n".join(f"  image {i}: {why}" for i, why in self.bad.items())
            raise ValueError(f"more images cannot be read than max_bad_images={self.max_bad_images} allows:\n{lines}")
