"""Videos of any data set: lists of images, animated images, video files, and NumPy arrays of frames.

load_dataset(...) -> {"image": a video, not decoded} -> the frames that are needed: uint8 (T, 3, h, w), upright, RGB
"""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Image, List, Video
from torch import Tensor

from .csv_files import separator_hint
from .file_kinds import ARRAY
from .files import anchored
from .images import IMAGE, BadImage, decode, encoded, from_pil, is_encoded, open_image, opened, unknown_format

FINGERPRINT_VIDEOS = 100
POSITION = "position"  # of a video in an array


def is_array(dataset: str) -> bool:
    """Return whether a data set is a NumPy file of frames."""
    return Path(dataset).suffix == ARRAY


def array_rows(file: str) -> datasets.DatasetDict:
    """Return a split "train" with a row for each video of a NumPy file of uint8 frames (T, N, H, W).

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    shape = open_array(file).shape
    rows = {IMAGE: [{"path": str(file), POSITION: i} for i in range(shape[1])]}
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})


def open_array(file: str) -> np.ndarray:
    """Open a NumPy file of frames, without reading them.

    Raises:
        ValueError: see `array_rows`.
    """
    if not Path(file).is_file():
        raise ValueError(f'dataset_name "{file}" cannot be loaded: it is not a file')
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f'dataset_name "{file}" is not a NumPy array: {str(error).splitlines()[0]}') from error
    if found.ndim != 4 or found.dtype != np.uint8 or 0 in found.shape:
        raise ValueError(
            f'dataset_name "{file}" must hold uint8 frames of shape (frames, videos, height, width), got '
            f"{found.dtype} {found.shape}"
        )
    return found


def holds_videos(feature: Any) -> bool:
    """Return whether a feature can hold videos: lists of images, images, which may be animated, or videos."""
    if isinstance(feature, List):
        one = feature.feature
        return isinstance(one, Image) or (isinstance(one, Mapping) and is_encoded(one))
    return isinstance(feature, (Image, Video))


def video_column(features: Mapping[str, Any], column: str | None) -> str:
    """Return the column of videos.

    Args:
        column: its name; default: the only one that `holds_videos`.

    Raises:
        ValueError: there is no such column; the message lists the columns.
    """
    known = [name for name, kind in features.items() if holds_videos(kind)]
    columns = f"{', '.join(features)}{separator_hint(features)}"
    if column is None:
        if len(known) != 1:
            raise ValueError(f"image_column must name a column of videos; the data set has {columns}")
        return known[0]
    if column not in features:
        raise ValueError(f'image_column "{column}" is not a column of the data set; it has {columns}')
    if column not in known:
        raise ValueError(
            f'image_column "{column}" must hold lists of images, animated images or videos, got {features[column]}'
        )
    return column


def video_rows(rows: datasets.Dataset, column: str | None, roots: Sequence[str] | None = None) -> datasets.Dataset:
    """Return rows with a video in ``image``, not decoded.

    Args:
        column: see `video_column`.
        roots: folders that paths must be in, see `data_roots`.

    Raises:
        ValueError: there is no such column, a package that reads its videos is missing, or a path is outside the
            folders.
    """
    column = video_column(rows.features, column)
    kind = rows.features[column]
    if isinstance(kind, Video) and importlib.util.find_spec("torchcodec") is None:
        raise ValueError(f'image_column "{column}" holds videos, which need the package torchcodec: install it')
    plain = List(Image(decode=False)) if isinstance(kind, List) else type(kind)(decode=False)
    rows = rows.cast_column(column, plain).select_columns([column])
    if roots is not None:
        for chunk in rows.data.column(column).chunks:
            files = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
            alone = pc.if_else(pc.is_null(files.field("bytes")), files.field("path"), None)
            anchored(alone.to_pylist(), roots, f'image_column "{column}"')
    return rows.rename_column(column, IMAGE) if column != IMAGE else rows


def read_video(value: Any, choose: Callable[[int], range], is_file: bool = False) -> Tensor:
    """Decode some frames of a video: uint8 (T, 3, h, w).

    Args:
        value: as `video_rows` or `array_rows` stores it.
        choose: number of frames of the video -> those to decode.
        is_file: it is a `datasets.Video`.

    Raises:
        BadImage: a frame cannot be decoded, frames differ in size, or `choose` raises it.
    """
    if isinstance(value, list):
        frames = [decode(value[i]) for i in choose(len(value))]
        if len({frame.shape for frame in frames}) > 1:
            raise BadImage("its frames differ in size")
        return torch.stack(frames)
    if isinstance(value, Mapping) and POSITION in value:
        array = open_array(value["path"])
        frames = torch.from_numpy(array[list(choose(len(array))), value[POSITION]])
        return frames[:, None].expand(-1, 3, -1, -1)
    if is_file:
        return read_file(value, choose)
    try:
        with open_image(opened(value)) as image:
            found = []
            for number in choose(getattr(image, "n_frames", 1)):
                image.seek(number)
                found.append(from_pil(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage(unknown_format(encoded(value))) from None
    except Exception as error:  # PIL's decoders raise whatever error their parser runs into
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return torch.stack(found)


def read_file(value: Any, choose: Callable[[int], range]) -> Tensor:
    """Decode some frames of a video file with torchcodec; see `read_video`."""
    try:
        decoder = Video().decode_example(value)
        chosen = choose(len(decoder))
        return decoder[chosen.start : chosen.stop : chosen.step]
    except BadImage:
        raise
    except Exception as error:  # torchcodec raises many kinds
        raise BadImage(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def fingerprint(rows: datasets.Dataset) -> str:
    """Return a hash of the number of videos, and of 100 evenly spaced ones as stored."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in np.unique(np.linspace(0, len(rows) - 1, FINGERPRINT_VIDEOS).astype(int)).tolist():
        value = rows[index][IMAGE]
        try:
            if isinstance(value, Mapping) and POSITION in value:
                digest.update(np.ascontiguousarray(open_array(value["path"])[:, value[POSITION]]).data)
                continue
            for frame in value if isinstance(value, list) else [value]:
                digest.update(hashlib.sha256(encoded(frame)).digest())
        except (BadImage, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]
