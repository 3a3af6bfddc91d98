"""Objects of the examination: splits as stored and as a run reads them, arguments and model.

load_splits -> objects as stored, flat (`FlatList`) next to `scene_rows` -> `Split`, `Case`
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO

import datasets
import numpy as np
import PIL.Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.arrow_lists import FlatList
from ..data.box_checks import BoxFormat, BoxReport
from ..data.detection import BOX_FIELDS, OBJECTS, find_objects, number_categories, picture_rows, scene_rows
from ..data.files import data_roots
from ..data.image_sizes import ORIENTATION
from ..data.images import IMAGE, BadImage, decode, encoded
from ..data.source import load_splits, take_split
from ..tasks.object_detection import DetectionArguments
from ..tasks.splits import split_rows
from .findings import Sample

STRIDE, WIDTH = 32, 256  # of the paper's DETR, for a model that does not tell
LOOKED_AT = 500  # number of evenly spaced images of a split to decode


@dataclass(frozen=True)
class Look:
    """Result of decoding an image.

    Args:
        size: upright height and width in pixels; (0, 0) if unreadable.
        orientation: EXIF orientation, 1 to 8; 1 is upright as stored, 5 and above swap height and width.
        error: why it is unreadable.
    """

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    error: str | None = None


@dataclass(frozen=True)
class Split:
    """A split as stored, and as a run reads it.

    Shapes: N images; M objects as stored; K objects that are kept.

    Args:
        name: name of the split.
        rows: rows of `scene_rows`.
        report: report of `scene_rows`.
        found: the objects as stored.
        ids: (N,) image ids.
        sizes: (N, 2) height and width as stated in the rows, or else from the images' headers.
        names: category names.
        categories: (M,) index of each stored object's category in the names, -1 without one.
    """

    name: str
    rows: datasets.Dataset
    report: BoxReport
    found: FlatList
    ids: np.ndarray
    sizes: np.ndarray
    names: list[str]
    categories: np.ndarray

    @classmethod
    def read(cls, name: str, rows: datasets.Dataset, args: DetectionArguments) -> "Split":
        """Read the rows of a split from `load_splits`.

        Raises:
            ValueError: they cannot be read, see `scene_rows`.
        """
        roots = data_roots(args.dataset_name, args.data_files)
        _, ids, sizes = picture_rows(rows, args.image_column, roots)
        found = FlatList.of(rows, find_objects(rows.features, args.objects_column))
        boxes = BoxFormat(args.box_format, args.relative_boxes)
        scenes, report = scene_rows(
            rows, args.image_column, args.objects_column, box_format=boxes, strict=False, roots=roots
        )
        return cls(name, scenes, report, found, ids, sizes, *number_categories(found))

    @cached_property
    def boxes(self) -> np.ndarray:
        """(M, 4) as stored."""
        return self.found.fours(self.found.find(BOX_FIELDS))

    @cached_property
    def place(self) -> np.ndarray:
        """(M,) row of each stored object."""
        return self.found.rows()

    @cached_property
    def kept(self) -> FlatList:
        """Objects that a run trains on or evaluates."""
        return FlatList.of(self.rows, OBJECTS)

    @cached_property
    def targets(self) -> np.ndarray:
        """(N,) number of objects to detect in each image, without crowds."""
        there = self.kept.numbers("iscrowd", 0.0) == 0
        return np.bincount(self.kept.rows()[there], minlength=len(self.rows))

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Number of objects of each category."""
        return np.bincount(self.kept.numbers("category", 0.0).astype(np.int64), minlength=len(self.names))

    @cached_property
    def looks(self) -> dict[int, Look]:
        """Inspection results of up to `LOOKED_AT` images, by row."""
        chosen = np.unique(np.linspace(0, len(self.rows) - 1, min(LOOKED_AT, len(self.rows))).astype(np.int64))
        pictures = self.rows.select_columns([IMAGE])
        return {row: look_at(pictures[row][IMAGE]) for row in chosen.tolist()}

    def sample(self, row: int, box: np.ndarray | None = None) -> Sample:
        """Return an image, and a box in it, as a sample."""
        value = self.rows.select_columns([IMAGE])[int(row)][IMAGE]
        path = value["path"] if isinstance(value, Mapping) else value
        numbers = None if box is None else tuple(float(value) for value in box)
        return Sample(int(self.ids[row]), self.name, numbers, path if isinstance(path, str) else None)

    def stored_sample(self, k: int) -> Sample:
        """Return the k-th stored object as a sample."""
        return self.sample(self.place[k], self.boxes[k])

    def kept_sample(self, k: int) -> Sample:
        """Return the k-th kept object as a sample; its box is x, y, width and height in pixels."""
        return self.sample(self.kept.rows()[k], self.kept.fours("bbox")[k])


def look_at(value) -> Look:
    """Decode an image, see `decode`."""
    try:
        data = encoded(value)
        height, width = decode(data).shape[-2:]
        with PIL.Image.open(BytesIO(data)) as image:
            return Look((height, width), image.getexif().get(ORIENTATION, 1))
    except (BadImage, OSError) as error:
        return Look(error=str(error))


@dataclass
class Case:
    """Everything that is examined.

    Args:
        args: arguments of the run.
        splits: splits by name.
        model: model to train; its backbone has random weights instead of downloaded ones.
        earlier: model of ``model_name_or_path`` as saved; None without one.
        missing: names of the weights that it lacks.
    """

    args: DetectionArguments
    splits: dict[str, Split]
    model: PreTrainedModel | None = None
    earlier: PreTrainedModel | None = None
    missing: set[str] = field(default_factory=set)

    @property
    def train(self) -> Split:
        """Training split."""
        return self.splits[self.args.train_split]

    @property
    def held_out(self) -> list[Split]:
        """All other splits."""
        return [split for split in self.splits.values() if split is not self.train]

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the model to train."""
        return self.model.config

    @property
    def backbone(self) -> nn.Module | None:
        """Backbone of the model; None for a detector without one."""
        return getattr(self.model.base_model, "backbone", None)

    @property
    def stride(self) -> int:
        """Side of a cell of the largest feature map that the Transformer reads, in pixels."""
        return getattr(self.model.base_model, "stride", getattr(self.backbone, "stride", STRIDE))

    @property
    def width(self) -> int:
        """Hidden size of the model."""
        return getattr(self.config, "hidden_size", WIDTH)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; an incomplete last step is dropped."""
        return max(1, len(self.train.rows) // self.args.batch_size)


def read_splits(args: DetectionArguments) -> dict[str, Split]:
    """Read the splits that a run uses, the training split first.

    Raises:
        ValueError: the data set cannot be read.
    """
    splits = load_splits(*args.source)
    rows = split_rows(args, args.test_splits, lambda name, argument: take_split(splits, name, argument))
    ordered = sorted(rows, key=lambda name: name != args.train_split)
    return {name: Split.read(name, rows[name], args) for name in ordered}
