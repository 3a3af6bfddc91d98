"""Images with labels from any data set: columns, labels, decoding with limits, and the count of unreadable images.

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

from .batching import COPY
from .files import anchored, anchored_path, base_of, open_regular

log = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
FINGERPRINT_IMAGES = 1000
CHECKED_ROWS = 100  # of a stream, whose paths are checked before a run
# Of one image, by its header, before anything is decoded: a quarter of a gigabyte as RGB. It is the number from which
# on PIL warns of a "decompression bomb".
MAX_PIXELS = 89_478_485
TOLD = 3  # images that an error names
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # first bytes of drawings, which PIL reads by starting another program


class BadImage(Exception):
    """An image that cannot be read; its text says why."""


def image_rows(
    rows: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    roots: Sequence[str] | None = None,
) -> Any:
    """Rows with ``image``, not decoded, and ``label``, as it is stored.

    Args:
        rows: a `datasets` split, streamed or not.
        image_column: images (`datasets.Image`), or their bytes or paths; default, the only column of images.
        label_column: a ClassLabel, integers or strings; default, the only ClassLabel or the column "label".
        labelled: False leaves labels out.
        roots: folders that paths must stay in, see `data_roots`; relative paths are relative to the first. Default,
            paths are taken as they are. Paths of a stream are checked as they are read, the first of them now.

    Raises:
        ValueError: there are no rows, or no such column, it holds something else, or a path leaves the folders.
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
    if labelled and not is_label_kind(kind_of_label := features[next(reversed(names))]):
        raise ValueError(f'label_column "{next(reversed(names))}" must hold integers or strings, got {kind_of_label}')
    if isinstance(kind, Image):
        rows = rows.cast_column(image, Image(decode=False))
    if roots is not None:
        rows = with_paths_in(rows, image, roots, f'image_column "{image}"')
    rows = rows.select_columns(list(names))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def with_paths_in(rows: Any, column: str, roots: Sequence[str], source: str) -> Any:
    """Rows whose images have absolute paths below some folders, where they have paths alone.

    Args:
        column: of images that are not decoded.
        roots, source: see `anchored`.

    Raises:
        ValueError: a path leaves the folders.
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
    """See `with_paths_in`; the first `CHECKED_ROWS` rows are checked now, all as they are read.

    Raises:
        ValueError: the path of one of those rows leaves the folders.
    """
    first = [path_alone(row.get(column)) for row in itertools.islice(rows, CHECKED_ROWS)]
    anchored(first, roots, source)
    keep = functools.partial(keep_inside, column=column, base=base_of(first, roots), roots=roots, source=source)
    return rows.map(keep, features=rows.features)


def path_alone(image: Any) -> str | None:
    """The path of an image that is not decoded, where it has no bytes."""
    if isinstance(image, Mapping):
        return image.get("path") if image.get("bytes") is None else None
    return image if isinstance(image, str) else None


def keep_inside(row: Mapping[str, Any], column: str, base: str, roots: Sequence[str], source: str) -> dict[str, Any]:
    """The image of a row of a stream, with an absolute path where it is a path; see `anchored_path`."""
    image = row[column]
    path = anchored_path(path_alone(image), base, roots, source)
    return {column: path if isinstance(image, str) else image}


def is_label_kind(kind: Any) -> bool:
    """Whether a feature is one of labels; of a column whose kind is not known, values are looked at later."""
    if kind is None or isinstance(kind, ClassLabel):
        return True
    return isinstance(kind, Value) and bool(re.fullmatch(r"u?int\d+|float\d+|bool|(large_)?string|null", kind.dtype))


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
    """Whether a row has a label: None, NaN, negative numbers and empty text mean that it has none."""
    return value is not None and (bool(value.strip()) if isinstance(value, str) else value >= 0)


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
    # Tables store integers as floats where a cell is empty.
    values = sorted({int(value) if isinstance(value, float) and value.is_integer() else value for value in values})
    if len({type(value) for value in values}) != 1 or not isinstance(values[0], (int, str)):
        raise ValueError(f"labels must be integers or strings, got {values[:5]}")
    return [str(value) for value in values]


def label_ids(rows: datasets.Dataset | datasets.IterableDataset, names: Sequence[str]) -> dict[int | str, int]:
    """From a label as it is stored in `image_rows` to its place in ``names``, a model's classes.

    Args:
        names: of `label_names` of the training data, or a model's ``id2label`` in order.

    Raises:
        ValueError: one of `stated_names`, or a label of rows that are no stream, is not among the names.
    """
    places = {name: place for place, name in enumerate(names)}
    if (stated := stated_names(rows)) is not None:
        if unknown := [name for name in stated if name not in places]:
            raise ValueError(f'label "{unknown[0]}" is not a class of the model; it has {", ".join(names)}')
        found = {number: places[name] for number, name in enumerate(stated)}  # False and True are 0 and 1 as keys
    else:
        found = places | {int(name): place for name, place in places.items() if name.lstrip("-").isdecimal()}
    if isinstance(rows, datasets.Dataset):
        unknown = [value for value in rows.unique(LABEL) if is_label(value) and value not in found]
        if unknown:
            raise ValueError(f'label "{unknown[0]}" is not a class of the model; it has {", ".join(names)}')
    return found


def encoded(value: Any) -> bytes:
    """The bytes of an image that is given as such, as a path or URL, or as `datasets.Image` stores it.

    Raises:
        BadImage: there is none.
        OSError: the file cannot be read, or is not a regular file.
    """
    with opened(value) as file:
        return file.read()


def opened(value: Any) -> Any:
    """The bytes of an image as a file; see `encoded`."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return BytesIO(value)
    if not isinstance(value, str):
        raise BadImage(f"there is no image, but {type(value).__name__}")
    if "://" not in value:
        return open_regular(value)
    if (url := urlsplit(value)).scheme in ("file", "local"):
        return open_regular(unquote(url.path))
    return fsspec.open(value, "rb")


def decode(value: Any) -> Tensor:
    """Read an image: RGB, upright, uint8 (3, h, w).

    JPEG by torchvision, straight to a tensor and about twice as fast as PIL with the same pixels; all else by PIL, PNG
    too, since torchvision's reader ends the process on a damaged one (seen with 0.29). The orientation a camera noted
    (EXIF) is followed, as `datasets` and the pipelines of transformers do. Transparency is dropped, as they do too; 16
    bits of grey become 8. Of an animation, the first image is read.

    Args:
        value: bytes, path, URL, PIL image, or a dict of ``bytes`` and ``path``.

    Raises:
        BadImage: it cannot be read to its end, or has more than `MAX_PIXELS`. Damage that the decoder can bridge goes
            unnoticed.
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
                pass  # PIL reads a few more, and says more clearly what is wrong with the others
        with open_image(BytesIO(data)) as image:
            return from_pil(image)
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage(unknown_format(data)) from None
    except Exception as error:  # PIL's readers raise whatever their format's parser meets
        raise BadImage(f"{type(error).__name__}: {error}") from error


def check_pixels(height: int, width: int) -> None:
    """Refuse an image that would fill the memory.

    Raises:
        BadImage: it has more than `MAX_PIXELS`.
    """
    if height * width > MAX_PIXELS:
        raise BadImage(f"it has {height} x {width} pixels, more than the limit of {MAX_PIXELS:,}")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG by its frame header (ITU-T T.81, B.2.2); None of other data.

    A few microseconds, where PIL takes a hundred.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # without a length: readers differ in what follows
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, not frames
            return struct.unpack_from(">HH", data, place + 5)
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


@functools.cache
def silence() -> None:
    """Turn off PIL's warning of large images: `open_image` refuses those it would warn of."""
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


@contextmanager
def open_image(file: Any) -> Iterator[PIL.Image.Image]:
    """PIL's image of a file, of which only the header is read.

    Raises:
        BadImage: it has more than `MAX_PIXELS`.
        UnidentifiedImageError: it has another format.
    """
    silence()
    if file.read(4) in POSTSCRIPT:
        raise PIL.UnidentifiedImageError("PIL would start another program to draw it")
    file.seek(0)
    with PIL.Image.open(file) as image:
        check_pixels(image.height, image.width)
        yield image


def unknown_format(data: bytes) -> str:
    """The reason why data are no image."""
    if not data:
        return "the file is empty"
    if b"<svg" in data[:1000]:
        return "it is an SVG drawing, not an image of pixels"
    return f"it is in no image format that can be read; it begins with {data[:8]!r}"


def from_pil(image: PIL.Image.Image) -> Tensor:
    """A PIL image of any mode as upright RGB, uint8 (3, h, w)."""
    check_pixels(image.height, image.width)
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
            raise ValueError(
                f"more images cannot be read than max_bad_images={self.max_bad_images} allows: {listed(self.bad)}"
            )


def listed(bad: Mapping[int, str]) -> str:
    """The first images that cannot be read, on one line."""
    told = "; ".join(f"image {i}: {why}" for i, why in list(bad.items())[:TOLD])
    return told + (f"; and {len(bad) - TOLD} more" if len(bad) > TOLD else "")


def require_readable(rows: Any, max_bad_images: int, split: str, read: Callable[[Any], Any] | None = None) -> None:
    """Refuse a split before a run where no image can be read, or none of the first ``max_bad_images`` + 1.

    Images are read up to the first that can be: mostly one.

    Args:
        rows: of `image_rows`, or others where ``read`` is given.
        max_bad_images: see `WatchedLoader`.
        split: its name, for the error.
        read: reads a row; default, decodes its image.

    Raises:
        ValueError: no image can be read; it says why. Or a stream has no rows.
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
        f"no image of {split} can be read, of {number} the first {len(bad)} were tried (max_bad_images is "
        f"{max_bad_images}): {listed(bad)}"
    )


def describe(image: Any, error: BadImage) -> str:
    """Why an image cannot be read, with its path where it has one."""
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return f"{path}: {error}" if path and path not in str(error) else str(error)
