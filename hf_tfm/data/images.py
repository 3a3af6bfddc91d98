"""Labelled images from any data set: columns, labels, size-limited decoding, and counting of unreadable images.

load_dataset(...) -> {"image": encoded, "label"} -> uint8 (3, h, w), upright, RGB
"""

import functools
import hashlib
import itertools
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Image, Value
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from tqdm.auto import tqdm

from .csv_files import separator_hint
from .files import anchored, anchored_path, base_of, open_regular

log = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
FINGERPRINT_IMAGES = 1000
CHECKED_ROWS = 100  # rows of a stream whose paths are checked before a run
# Maximum number of pixels of an image, checked in its header before decoding: a quarter of a gigabyte as RGB. PIL
# warns of a "decompression bomb" above the same number.
MAX_PIXELS = 89_478_485
TOLD = 3  # number of images listed in an error message
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # magic bytes of PostScript, which PIL reads by starting another program


class BadImage(Exception):
    """An image that cannot be read; the message says why."""


def image_rows(
    rows: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    roots: Sequence[str] | None = None,
) -> Any:
    """Return rows with ``image``, not decoded, and ``label``, as stored.

    Args:
        rows: a `datasets` split, streamed or not.
        image_column: column of images (`datasets.Image`), or of their bytes or paths; default: the only image column.
        label_column: column of type ClassLabel, integer or string; default: the only ClassLabel, or the column
            "label".
        labelled: False omits labels.
        roots: folders that paths must be in, see `data_roots`; relative paths are relative to the first. Default:
            paths are not checked. Paths of a stream are checked as they are read, the first ones immediately.

    Raises:
        ValueError: if there are no rows, a column is missing or has the wrong type, or a path is outside the folders.
    """
    features = rows.features
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise ValueError("the data set has no rows")
    # A stream without features has to be read for its columns. Otherwise nothing is read, as images may be broken.
    if features is None:
        features = dict.fromkeys(next(iter(rows), {}))
    names = {find_column(features, image_column, "image_column", Image, IMAGE): IMAGE}
    if labelled:
        try:
            names[find_column(features, label_column, "label_column", ClassLabel, LABEL)] = LABEL
        except ValueError as error:
            if label_column is not None or getattr(rows.info, "builder_name", None) != "imagefolder":
                raise
            raise ValueError(
                f"{error}. In a folder of images, each class is a folder directly in that of a split, "
                "train/CLASS/NAME.png; at least two are needed, all at the same depth"
            ) from error
    image = next(iter(names))
    kind = features[image]
    if not (kind is None or isinstance(kind, Image) or is_encoded(kind)):
        raise ValueError(f'image_column "{image}" must hold images, their bytes or their paths, got {kind}')
    if labelled and not is_label_kind(kind_of_label := features[next(reversed(names))]):
        raise ValueError(f'label_column "{next(reversed(names))}" must hold integers or strings, got {kind_of_label}')
    if isinstance(kind, Image):
        rows = rows.cast_column(image, Image(decode=False))
    if roots is not None:
        rows = with_paths_in(rows, image, roots, f'image_column "{image}"')
    rows = rows.select_columns(list(names))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def with_class_names(rows: Any, names: Sequence[str]) -> Any:
    """Return rows of `image_rows` whose labels, numbers of these names or names, are a ClassLabel.

    Raises:
        ValueError: if the labels have other names, or a label is not among them; of a stream when it is read.
    """
    if (stated := stated_names(rows)) is not None and stated != list(names):
        raise ValueError(
            f"class_names is for labels without names, but those of the data set have {listed_names(stated)}"
        )
    if rows.features is None:
        raise ValueError("class_names needs a stream whose columns have known types, for instance of Parquet files")
    return with_feature(rows, LABEL, ClassLabel(names=list(names)))


def with_feature(rows: Any, column: str, feature: Any) -> Any:
    """Cast a column; the other columns of a data set stay where they are stored."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.cast_column(column, feature)
    cast = rows.select_columns([column]).cast_column(column, feature)
    return datasets.concatenate_datasets([rows.remove_columns([column]), cast], axis=1)


def listed_names(names: Sequence[str]) -> str:
    """Return the first names on one line."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def with_paths_in(rows: Any, column: str, roots: Sequence[str], source: str) -> Any:
    """Return rows in which images stored as paths have absolute paths inside some folders.

    Args:
        column: column of undecoded images.
        roots, source: see `anchored`.

    Raises:
        ValueError: if a path is outside the folders.
    """
    if not isinstance(rows, datasets.Dataset):
        return stream_with_paths_in(rows, column, roots, source)
    stored = rows.data.column(column)
    if pa.types.is_struct(stored.type):
        alone = [pc.if_else(pc.is_null(part.field("bytes")), part.field("path"), None) for part in stored.chunks]
        anchored([path for part in alone for path in part.to_pylist()], roots, source)
        return rows
    if not (pa.types.is_string(stored.type) or pa.types.is_large_string(stored.type)):
        return rows
    paths = anchored(rows[column][:], roots, source)
    return rows.remove_columns(column).add_column(column, paths) if paths != list(rows[column]) else rows


def stream_with_paths_in(
    rows: datasets.IterableDataset, column: str, roots: Sequence[str], source: str
) -> datasets.IterableDataset:
    """Do the same as `with_paths_in` for a stream.

    The first `CHECKED_ROWS` rows are checked now, and every row when it is read.

    Raises:
        ValueError: if the path of one of the first rows is outside the folders.
    """
    first = [path_alone(row.get(column)) for row in itertools.islice(rows, CHECKED_ROWS)]
    anchored(first, roots, source)
    keep = functools.partial(keep_inside, column=column, base=base_of(first, roots), roots=roots, source=source)
    return rows.map(keep, features=rows.features)


def path_alone(image: Any) -> str | None:
    """Return the path of an undecoded image that has no bytes."""
    if isinstance(image, Mapping):
        return image.get("path") if image.get("bytes") is None else None
    return image if isinstance(image, str) else None


def keep_inside(row: Mapping[str, Any], column: str, base: str, roots: Sequence[str], source: str) -> dict[str, Any]:
    """Return the image of a stream's row, with an absolute path if it is stored as a path; see `anchored_path`."""
    image = row[column]
    path = anchored_path(path_alone(image), base, roots, source)
    return {column: path if isinstance(image, str) else image}


def is_label_kind(kind: Any) -> bool:
    """Return whether a feature can hold labels; if the type of the column is unknown, values are checked later."""
    if kind is None or isinstance(kind, ClassLabel):
        return True
    return isinstance(kind, Value) and bool(re.fullmatch(r"u?int\d+|float\d+|bool|(large_)?string|null", kind.dtype))


def is_encoded(kind: Any) -> bool:
    """Return whether a feature holds bytes, paths, or both as `datasets.Image` stores them."""
    if isinstance(kind, Mapping):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, Value) and kind.dtype.removeprefix("large_") in ("binary", "string")


def find_column(features: Mapping[str, Any], name: str | None, argument: str, kind: type, usual: str) -> str:
    """Return the column called ``name``; without a name, the only column of type ``kind``, or the column ``usual``.

    Raises:
        ValueError: if there is none; the message lists the columns.
    """
    columns, hint = ", ".join(features), separator_hint(features)
    if name is not None:
        if name not in features:
            raise ValueError(f'{argument} "{name}" is not a column of the data set; it has {columns}{hint}')
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in features:
        return usual
    raise ValueError(f"{argument} must name a column, since it cannot be inferred; the data set has {columns}{hint}")


def is_label(value: Any) -> bool:
    """Return whether a row is labelled: None, NaN, negative numbers and empty strings mean that it is not."""
    return value is not None and (bool(value.strip()) if isinstance(value, str) else value >= 0)


def stated_names(rows: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """Return the label names that the type defines: those of a ClassLabel, "False" and "True" of a bool; else None."""
    feature = (rows.features or {}).get(LABEL)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return ["False", "True"] if isinstance(feature, Value) and feature.dtype == "bool" else None


def label_names(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Return the label names of `image_rows`: `stated_names` if available, otherwise the sorted distinct values.

    Raises:
        ValueError: if the rows are a stream without stated names, or a label is neither a number nor a string.
    """
    if names := stated_names(rows):
        return names
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError(
            "the labels of a stream must be a ClassLabel, whose values are known before it is read: give class_names"
        )
    values = [value for value in rows.unique(LABEL) if is_label(value)]
    # Tables store integers as floats if a cell is empty.
    values = sorted({int(value) if isinstance(value, float) and value.is_integer() else value for value in values})
    if len({type(value) for value in values}) != 1 or not isinstance(values[0], (int, str)):
        raise ValueError(f"labels must be integers or strings, got {values[:5]}")
    return [str(value) for value in values]


def tell_untrained(rows: Mapping[str, Any], train_split: str, names: Sequence[str]) -> None:
    """Warn about classes that other splits have and the training split lacks; streams are skipped.

    Args:
        rows: {split name: rows of `image_rows` or the like}.
        names: of the classes by number, where labels are numbers.
    """
    if not isinstance(rows[train_split], datasets.Dataset):
        return
    trained = set(rows[train_split].unique(LABEL))
    for split, part in rows.items():
        if isinstance(part, datasets.Dataset) and stated_names(part) == stated_names(rows[train_split]):
            lacking = [value for value in part.unique(LABEL) if is_label(value) and value not in trained]
            if lacking:
                told = [names[v] if isinstance(v, int) and 0 <= v < len(names) else str(v) for v in lacking[:5]]
                log.warning(
                    'split "%s" has %d classes without a training row: %s',
                    *(split, len(lacking), ", ".join(told) + ", ..." * (len(lacking) > 5)),
                )


def label_ids(rows: datasets.Dataset | datasets.IterableDataset, names: Sequence[str]) -> dict[int | str, int]:
    """Map each label, as stored in `image_rows`, to its index in ``names``, a model's classes.

    Args:
        names: `label_names` of the training data, or a model's ``id2label`` in order.

    Raises:
        ValueError: if one of `stated_names`, or a label of non-streamed rows, is not among the names.
    """
    numbers = {name: place for place, name in enumerate(names)}
    if (stated := stated_names(rows)) is not None:
        if unknown := [name for name in stated if name not in numbers]:
            raise ValueError(f'label "{unknown[0]}" is not a class of the model; it has {", ".join(names)}')
        found = {
            number: numbers[name] for number, name in enumerate(stated)
        }  # as dict keys, False and True equal 0 and 1
    else:
        found = numbers | {int(name): place for name, place in numbers.items() if name.lstrip("-").isdecimal()}
    if isinstance(rows, datasets.Dataset):
        unknown = [value for value in rows.unique(LABEL) if is_label(value) and value not in found]
        if unknown:
            raise ValueError(f'label "{unknown[0]}" is not a class of the model; it has {", ".join(names)}')
    return found


def encoded(value: Any) -> bytes:
    """Return the bytes of an image given as bytes, path or URL, or as `datasets.Image` stores it.

    Raises:
        BadImage: if there is no image.
        OSError: if the file cannot be read or is not a regular file.
    """
    with opened(value) as file:
        return file.read()


def opened(value: Any) -> Any:
    """Return the bytes of an image as a file object; see `encoded`."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return BytesIO(value)
    if not isinstance(value, str):
        raise BadImage(f"expected an image, got {type(value).__name__}")
    if "://" not in value:
        return open_regular(value)
    if (url := urlsplit(value)).scheme in ("file", "local"):
        return open_regular(unquote(url.path))
    return fsspec.open(value, "rb")


def decode(value: Any) -> Tensor:
    """Decode an image to upright RGB, uint8 (3, h, w).

    JPEG is decoded by torchvision, directly to a tensor and about twice as fast as PIL with identical pixels. All
    other formats are decoded by PIL, including PNG, since torchvision's decoder crashes the process on a damaged file
    (seen with 0.29). As in `datasets` and the transformers pipelines, EXIF orientation is applied and transparency is
    dropped. 16-bit greyscale becomes 8-bit. Of an animation, the first frame is read.

    Args:
        value: bytes, path, URL, PIL image, or a dict of ``bytes`` and ``path``.

    Raises:
        BadImage: if it cannot be decoded completely, or has more than `MAX_PIXELS`. Damage that the decoder can
            conceal goes unnoticed.
    """
    try:
        if isinstance(value, PIL.Image.Image):
            return from_pil(value)
        data = encoded(value)
        if (size := jpeg_size(data)) is not None:
            check_pixels(*size)
            try:
                content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_image(content, ImageReadMode.RGB, apply_exif_orientation=True)
            except RuntimeError:
                pass  # PIL reads a few more files and gives clearer errors for the others
        with open_image(BytesIO(data)) as image:
            return from_pil(image)
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage(unknown_format(data)) from None
    except Exception as error:  # PIL's decoders raise whatever error their parser runs into
        raise BadImage(f"{type(error).__name__}: {error}") from error


def check_pixels(height: int, width: int) -> None:
    """Raise if an image is too large to decode safely.

    Raises:
        BadImage: if it has more than `MAX_PIXELS`.
    """
    if height * width > MAX_PIXELS:
        raise BadImage(f"it has {height} x {width} pixels, more than the limit of {MAX_PIXELS:,}")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width from the frame header of a JPEG (ITU-T T.81, B.2.2); None for other data.

    Takes a few microseconds; PIL takes a hundred.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # marker without a length; decoders disagree on what follows
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # C4, C8 and CC are not frame headers
            return struct.unpack_from(">HH", data, place + 5)
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


@functools.cache
def silence() -> None:
    """Disable PIL's warning about large images: `open_image` raises for those anyway."""
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


@contextmanager
def open_image(file: Any) -> Iterator[PIL.Image.Image]:
    """Open an image file with PIL, reading only the header.

    Raises:
        BadImage: if it has more than `MAX_PIXELS`.
        UnidentifiedImageError: if the format is unknown.
    """
    silence()
    if file.read(4) in POSTSCRIPT:
        raise PIL.UnidentifiedImageError("PIL would start another program to draw it")
    file.seek(0)
    with PIL.Image.open(file) as image:
        check_pixels(image.height, image.width)
        yield image


def unknown_format(data: bytes) -> str:
    """Return why data are not an image."""
    if not data:
        return "the file is empty"
    if b"<svg" in data[:1000]:
        return "it is an SVG drawing, not an image of pixels"
    return f"its image format is not supported; it begins with {data[:8]!r}"


def from_pil(image: PIL.Image.Image) -> Tensor:
    """Convert a PIL image of any mode to upright RGB, uint8 (3, h, w)."""
    check_pixels(image.height, image.width)
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip values above 255
        image = PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f'mode "{image.mode}" does not define which values are black and white')
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def fingerprint(rows: datasets.Dataset) -> str:
    """Return a hash of the number of rows, their labels, and 1,000 evenly spaced images as stored.

    Hashing a sample avoids reading a large data set completely.
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
    """A loader of image batches that logs unreadable images and raises if there are too many.

    Samples with unreadable images are dropped from the batch; the other samples are not affected.

    Args:
        loader: yields batches with ``bad``, a list of (row, reason), which is removed from the batch here.
        max_bad_images: maximum number of images that this process drops.
        progress: show a progress bar over the steps of an epoch.

    `bad` holds the dropped images so far, {row: reason}.
    """

    def __init__(self, loader: Any, max_bad_images: int = 10, progress: bool = False):
        if max_bad_images < 0:
            raise ValueError(f"max_bad_images must be at least 0, got {max_bad_images}")
        self.loader, self.max_bad_images, self.progress = loader, max_bad_images, progress
        self.bad: dict[int, str] = {}

    @property
    def examples(self) -> Any:
        """The examples of the loader."""
        return self.loader.examples

    def steps_per_epoch(self, epoch: int = 0) -> int | None:
        """See `StepLoader`."""
        return self.loader.steps_per_epoch(epoch)

    def epoch(self, epoch: int, start: Any = 0) -> Iterator[list[dict[str, Any]]]:
        """See `StepLoader`.

        Raises:
            ValueError: if more than ``max_bad_images`` images cannot be read.
        """
        steps = self.loader.epoch(epoch, start)
        if self.progress:
            steps = tqdm(steps, total=self.steps_per_epoch(epoch), unit="batch")
        for micro_batches in steps:
            for batch in micro_batches:
                for row, reason in batch.pop("bad"):
                    self.report(row, reason)
            yield micro_batches

    def report(self, index: int, reason: str) -> None:
        """Log an unreadable image once."""
        if index in self.bad:
            return
        self.bad[index] = reason
        log.warning("image %d is left out: %s", index, reason)
        if len(self.bad) > self.max_bad_images:
            raise ValueError(
                f"more images cannot be read than max_bad_images={self.max_bad_images} allows: {listed(self.bad)}"
            )


def listed(bad: Mapping[int, str]) -> str:
    """Return the first unreadable images on one line."""
    told = "; ".join(f"image {i}: {why}" for i, why in list(bad.items())[:TOLD])
    return told + (f"; and {len(bad) - TOLD} more" if len(bad) > TOLD else "")


def require_readable(rows: Any, max_bad_images: int, split: str, read: Callable[[Any], Any] | None = None) -> None:
    """Raise before a run if none of the first ``max_bad_images`` + 1 images of a split can be read.

    Reading stops at the first readable image, usually after one.

    Args:
        rows: rows of `image_rows`, or other rows if ``read`` is given.
        max_bad_images: see `WatchedLoader`.
        split: name of the split, for the error message.
        read: reads a row; default: decodes its image.

    Raises:
        ValueError: if no image can be read, with the reasons, or a stream has no rows.
    """
    read = read or (lambda row: decode(row[IMAGE]))
    bad: dict[int, str] = {}
    for index, row in enumerate(itertools.islice(rows, max_bad_images + 1)):
        try:
            read(row)
            return
        except BadImage as error:
            bad[index] = describe(row[IMAGE], error)
    if not bad:
        raise ValueError(f"{split} has no rows")
    number = f"{len(rows)}" if isinstance(rows, datasets.Dataset) else "a stream"
    raise ValueError(
        f"no image of {split} can be read: the first {len(bad)} of {number} were tried (max_bad_images is "
        f"{max_bad_images}): {listed(bad)}"
    )


def path_of_image(image: Any) -> str | None:
    """Return the path of an undecoded image, or the name that it has beside its bytes; None if it has none."""
    return image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None


def describe(image: Any, error: BadImage) -> str:
    """Return why an image cannot be read, with its path if it has one."""
    path = path_of_image(image)
    return f"{path}: {error}" if path and path not in str(error) else str(error)
