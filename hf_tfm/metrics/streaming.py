"""Base class of the detection and segmentation metrics: each image is reduced to a few numbers when it is added.

prediction, reference -> `reduce` -> rows of numbers -> `state` -> `merge` over processes -> `result`
"""

import inspect
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np

from hf_tfm.metrics.annotations import image_id, integers, ordered_names, records
from hf_tfm.metrics.base import OfflineMetric

Rows = dict[str, np.ndarray]  # table name -> structured array


class StreamingMetric(OfflineMetric):
    """An `OfflineMetric` that stores rows of numbers derived from the predictions instead of the predictions.

    Each image has an integer ``image_id``, unique in the data set. An image counts once even if it is added several
    times, since samplers repeat images to give all processes the same number. Each process has its own metric, and

        metric.merge(accelerate.utils.gather_object([metric.state()]))

    makes each of them cover all images. The result depends neither on the distribution of images over processes nor on
    their order.

    Args:
        class_names: names of classes 0 to N - 1 in order, or a config's ``id2label``. By default any non-negative
            class is accepted and named by its number.
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if class names do not cover 0 to N - 1 or are not distinct, or an option is unknown.
    """

    tables: ClassVar[dict[str, np.dtype]]  # stored tables; the field "image" of each holds the image id of a row
    settings: dict[str, Any]  # must be equal in metrics whose states are merged

    def __init__(self, class_names: Sequence[str] | Mapping[int, str] | None = None, **kwargs):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process must be 1, got {kwargs['num_process']}: each process has its own "
                "metric, and merge combines them"
            )
        super().__init__(**kwargs)
        self.class_names = ordered_names(class_names)
        self.reset()

    @abstractmethod
    def labels(self, reference: Mapping, place: str) -> np.ndarray:
        """Return the classes of a reference's objects; ``place`` names the reference in error messages."""

    @abstractmethod
    def reduce(self, prediction: Mapping, reference: Mapping, names: tuple[str, str]) -> Rows:
        """Reduce an image to rows, without its id; ``names`` names prediction and reference in error messages."""

    @abstractmethod
    def result(self, rows: Rows) -> dict[str, Any]:
        """Compute the scores from the rows of all images, sorted by ascending image id."""

    def reset(self) -> None:
        """Remove all images."""
        self.images: dict[int, int] = {}  # image id -> checksum of the classes in its reference
        self.parts: dict[str, list[np.ndarray]] = {table: [] for table in self.tables}

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add predictions for some images; images added before are skipped.

        Raises:
            ValueError: if the numbers of predictions and references differ, one of them cannot be read, or an image id
                was already added with other objects. In that case nothing of the batch is added.
        """
        predictions, references = records(predictions, "predictions"), records(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have equal lengths, got {len(predictions)} and {len(references)}"
            )
        images: dict[int, int] = {}
        rows: list[Rows] = []
        for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            names = (f"predictions[{i}]", f"references[{i}]")
            image = image_id(reference, names[1])
            checksum = zlib.crc32(np.sort(self.labels(reference, names[1])).tobytes())
            if not self.is_new(image, checksum, images):
                continue
            rows.append(self.reduce(prediction, reference, names))
            for of_table in rows[-1].values():
                of_table["image"] = image
            images[image] = checksum
        self.extend(images, rows)

    def is_new(self, image: int, checksum: int, others: Mapping[int, int]) -> bool:
        """Return whether an image is neither added yet nor in ``others``.

        Raises:
            ValueError: if it is there, with other objects.
        """
        known = others.get(image, self.images.get(image))
        if known is not None and known != checksum:
            raise ValueError(f"image_id {image} belongs to two references with different objects")
        return known is None

    def extend(self, images: Mapping[int, int], rows: Sequence[Rows]) -> None:
        """Add new images and their rows."""
        self.images.update(images)
        for table, parts in self.parts.items():
            if new := [of_image[table] for of_image in rows if len(of_image[table])]:
                parts.append(np.concatenate(new))

    def rows(self) -> Rows:
        """Return all rows, sorted by image id; within an image they keep the order of `reduce`."""
        rows = {}
        for table, dtype in self.tables.items():
            whole = np.concatenate([np.zeros(0, dtype), *self.parts[table]])
            rows[table] = whole[np.argsort(whole["image"], kind="stable")]
        return rows

    def state(self) -> dict[str, np.ndarray]:
        """Return the metric's contents as plain arrays, to send to another process or to save.

        Returns:
            ``images`` (I,) int64; ``checksums`` (I,) int64 of the classes of their objects; ``settings`` (1,) int64, a
            checksum; and the columns of each table as "table.column", equally long within a table.
        """
        rows = self.rows()
        return {
            "images": np.array(list(self.images), np.int64),
            "checksums": np.array(list(self.images.values()), np.int64),
            "settings": np.array([self.settings_checksum()]),
            **{
                f"{table}.{column}": np.ascontiguousarray(rows[table][column])
                for table, dtype in self.tables.items()
                for column in columns(dtype)
            },
        }

    def settings_checksum(self) -> int:
        """Return a checksum shared by metrics with the same classes and settings."""
        return zlib.crc32(repr((type(self).__name__, self.class_names, self.settings)).encode())

    def merge(self, states: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Add the contents of other metrics; an image that several of them hold, or a state given twice, counts once.

        Args:
            states: states of metrics with the same options; this metric's own state may be among them. If predictions
                for an image differ, the earliest state wins.

        Raises:
            ValueError: if a state comes from a metric with other options, or an image id belongs to two references
                with different objects.
        """
        for state in states:
            if "settings" not in state or int(state["settings"][0]) != self.settings_checksum():
                raise ValueError(f"states must be of {type(self).__name__} with the same options")
            pairs = zip(state["images"].tolist(), state["checksums"].tolist(), strict=True)
            new = {image: checksum for image, checksum in pairs if self.is_new(image, checksum, {})}
            rows = {}
            for table, dtype in self.tables.items():
                rows[table] = np.zeros(len(state[f"{table}.image"]), dtype)
                for column in columns(dtype):
                    rows[table][column] = state[f"{table}.{column}"]
                rows[table] = rows[table][np.isin(rows[table]["image"], list(new))]
            self.extend(new, [rows])

    def compute(
        self, *, predictions: Sequence | None = None, references: Sequence | None = None, **options
    ) -> dict[str, Any]:
        """Score all added or merged images, plus ``predictions`` and ``references`` if given, then reset.

        Returns:
            The scores, and ``images``, the number of images.

        Raises:
            ValueError: if there is nothing to score, or an option is passed here instead of to the constructor.
        """
        if options:
            raise ValueError(f"{', '.join(options)}: give options to {type(self).__name__}(...) or evaluate.load(...)")
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.images:
            raise ValueError("there are no predictions to score: predictions is empty and nothing was added")
        result = {**self.result(self.rows()), "images": len(self.images)}
        self.reset()
        return result

    def classes(self, seen: np.ndarray) -> dict[int, str]:
        """Return number and name of each class: all named classes, or those in ``seen`` if there are no names."""
        if self.class_names is None:
            return {label: str(label) for label in np.unique(seen).tolist()}
        return dict(enumerate(self.class_names))

    def check_labels(self, values: Any, place: str) -> np.ndarray:
        """Return labels as (n,) int64, after checking that each is a known class."""
        return integers(values, place, limit=None if self.class_names is None else len(self.class_names))

    def describe(self, inputs: str, features: Any) -> evaluate.MetricInfo:
        """Return the `evaluate.MetricInfo` of the metric."""
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description=inputs,
            features=features,
        )


def columns(dtype: np.dtype) -> tuple[str, ...]:
    """Return the names of the columns of a structured array."""
    return dtype.names or ()


def mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else float("nan")
