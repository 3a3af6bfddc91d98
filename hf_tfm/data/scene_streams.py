"""Objects in images of a stream, read and checked in pieces like those of a data set.

stream -> columns of images and objects -> pieces of rows -> `scene_rows` or `panoptic_rows` of each
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value

from .arrow_lists import subfields
from .box_checks import BoxFormat
from .categories import CATEGORY_FIELDS, Category
from .detection import find_objects, scene_rows
from .images import CHECKED_ROWS, IMAGE, find_column, listed_names, with_feature
from .panoptic import PANOPTIC, SEGMENTS, panoptic_rows
from .source import gather


@dataclass(frozen=True)
class SceneReader:
    """Rows of a data set -> rows of `scene_rows`, or if there are categories those of `panoptic_rows`.

    Args:
        image_column, objects_column, box_format, roots: see `scene_rows`.
        categories, panoptic_column, segments_column: see `panoptic_rows`.
        class_names: of categories that are not a ClassLabel: what their numbers stand for, or all names.
    """

    image_column: str | None = None
    objects_column: str | None = None
    box_format: BoxFormat | None = None
    categories: Sequence[Category] | None = None
    panoptic_column: str = PANOPTIC
    segments_column: str = SEGMENTS
    roots: Sequence[str] | None = None
    class_names: Sequence[str] = ()

    def __call__(self, rows: datasets.Dataset, told: set[str] | None = None) -> datasets.Dataset:
        """Read rows.

        Args:
            told: see `scene_rows`; given for a part of a split.

        Raises:
            ValueError: see `scene_rows` and `panoptic_rows`.
        """
        if self.categories is not None:
            columns = self.image_column, self.panoptic_column, self.segments_column
            return panoptic_rows(rows, self.categories, *columns, self.roots, told)
        columns = self.image_column, self.objects_column
        if self.class_names:
            rows = self.named(rows)
        return scene_rows(rows, *columns, box_format=self.box_format, roots=self.roots, told=told)[0]

    def select(self, rows: datasets.IterableDataset) -> datasets.IterableDataset:
        """Return a stream with the columns that are read, images not decoded.

        Raises:
            ValueError: a column does not exist.
        """
        features = rows.features or gather(rows.take(CHECKED_ROWS)).features
        image = find_column(features, self.image_column, "image_column", Image, IMAGE)
        if self.categories is not None:
            chosen = {image, self.panoptic_column, self.segments_column}
        else:
            chosen = {image, find_objects(features, self.objects_column)}
        chosen |= {"image_id", "height", "width"}
        rows = rows.select_columns([name for name in features if name in chosen])
        return rows.decode(False) if rows.features else rows

    def head(self, rows: datasets.IterableDataset) -> tuple[datasets.Dataset, "ScenePieces"]:
        """Read the first `CHECKED_ROWS` rows of a stream of `select`; return them, and a reader of all pieces.

        Raises:
            ValueError: a row is invalid, or the names of the categories are not known without reading all rows.
        """
        first = gather(rows.take(CHECKED_ROWS))
        if not len(first):
            raise ValueError("the data set has no rows")
        if self.categories is None and not self.class_names:
            column, field, kind = self.category_of(first.features)
            if field is not None and not isinstance(kind, ClassLabel):
                raise ValueError(
                    f'{field} of column "{column}" of a stream must be a ClassLabel, whose values are known before it '
                    "is read: give class_names"
                )
        return self(first, set()), ScenePieces(first.features, self)

    def category_of(self, features: Features) -> tuple[str, str | None, Any]:
        """Return the column of objects, and name and type of the field with their categories; None if it has none."""
        column = find_objects(features, self.objects_column)
        kinds = subfields(features[column])
        field = next((name for name in CATEGORY_FIELDS if name in kinds), None)
        return column, field, field and kinds[field]

    def named(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return rows whose categories are a ClassLabel of ``class_names``.

        Raises:
            ValueError: they have other names, or a category is not among them.
        """
        column, field, kind = self.category_of(rows.features)
        if field is None:
            return rows
        own = ClassLabel(names=list(self.class_names))
        if isinstance(kind, ClassLabel):
            if kind.names != own.names:
                raise ValueError(
                    f"class_names is for categories without names, but those of the data set have "
                    f"{listed_names(kind.names)}"
                )
            return rows
        objects = rows.features[column]
        if isinstance(objects, Mapping):
            return with_feature(rows, column, {**objects, field: List(own)})
        return with_feature(rows, column, List({**objects.feature, field: own}))


class ScenePieces:
    """Some rows of a stream, by column -> rows of a `SceneReader`, by column; see `stream.StreamLoader`.

    Args:
        features: of the rows.
        read: their reader.
    """

    def __init__(self, features: Features, read: SceneReader):
        self.numbered = not is_integer(features.get("image_id"))
        self.features = Features({**features, "image_id": Value("int64")}) if self.numbered else features
        self.read, self.told = read, set[str]()

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        columns = {**batch, "image_id": indices} if self.numbered else dict(batch)
        return self.read(datasets.Dataset.from_dict(columns, features=self.features), self.told)[:]


def is_integer(kind: Any) -> bool:
    """Return whether a feature holds integers."""
    return isinstance(kind, Value) and kind.dtype.lstrip("u").startswith("int")
