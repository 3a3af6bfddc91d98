"""What the metrics of detection and segmentation share: an image is reduced to a few numbers as soon as it is added.

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

Rows = dict[str, np.ndarray]  # table -> structured array


class StreamingMetric(OfflineMetric):
    """An `OfflineMetric` that keeps no predictions, only rows of numbers made of them.

    Every image has an ``image_id``, an integer that no other image of the data set has, and counts once, however often
    it is added: samplers repeat images to give all processes equally many. Each process has a metric of its own, and

        metric.merge(accelerate.utils.gather_object([metric.state()]))

    makes each that of all images. The result depends neither on how the images were spread nor on their order.

    Args:
        class_names: of the classes 0 to N - 1 in order, or a configuration's ``id2label``. By default any class from 0
            on is taken, and called by its number.
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: class names are not those of 0 to N - 1 or not distinct, or an option is unknown.
    """

    tables: ClassVar[dict[str, np.dtype]]  # what is kept; each has a field "image", the image id of a row
    settings: dict[str, Any]  # what must be the same in two metrics whose states are merged

    def __init__(self, class_names: Sequence[str] | Mapping[int, str] | None = None, **kwargs):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process must be 1, got {kwargs['num_process']}: each process has a metric of its own, and "
                "merge makes it that of all images"
            )
        super().__init__(**kwargs)
        self.class_names = ordered_names(class_names)
        self.reset()

    @abstractmethod
    def labels(self, reference: Mapping, place: str) -> np.ndarray:
        """The classes of a reference's objects; ``place`` is what errors call it."""

    @abstractmethod
    def reduce(self, prediction: Mapping, reference: Mapping, places: tuple[str, str]) -> Rows:
        """What is kept of an image, without its id; ``places`` are what errors call prediction and reference."""

    @abstractmethod
    def result(self, rows: Rows) -> dict[str, Any]:
        """The scores of the rows of all images, which stand by ascending image id."""

    def reset(self) -> None:
        """Forget all images."""
        self.images: dict[int, int] = {}  # image id -> checksum of the classes in its reference
        self.parts: dict[str, list[np.ndarray]] = {table: [] for table in self.tables}

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None) -> None:
        """Add predictions for some images; those added before are left out.

        Raises:
            ValueError: there are not as many references as predictions, one of them cannot be read, or an image id
                comes again with other objects. Nothing of the batch is added then.
        """
        predictions, references = records(predictions, "predictions"), records(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must be equally many, got {len(predictions)} and {len(references)}"
            )
        images, rows = {}, []
        for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            places = (f"predictions[{i}]", f"references[{i}]")
            image = image_id(reference, places[1])
            checksum = zlib.crc32(np.sort(self.labels(reference, places[1])).tobytes())
            if not self.is_new(image, checksum, images):
                continue
            rows.append(self.reduce(prediction, reference, places))
            for of_table in rows[-1].values():
                of_table["image"] = image
            images[image] = checksum
        self.extend(images, rows)

    def is_new(self, image: int, checksum: int, others: Mapping[int, int]) -> bool:
        """Whether an image is neither among those added nor among ``others``.

        Raises:
            ValueError: it is, with other objects.
        """
        known = others.get(image, self.images.get(image))
        if known is not None and known != checksum:
            raise ValueError(f"image_id {image} belongs to two references with different objects")
        return known is None

    def extend(self, images: Mapping[int, int], rows: Sequence[Rows]) -> None:
        """Take over new images and their rows."""
        self.images.update(images)
        for table, parts in self.parts.items():
            if new := [of_image[table] for of_image in rows if len(of_image[table])]:
                parts.append(np.concatenate(new))

    def rows(self) -> Rows:
        """All rows, by ascending image id, and within an image as `reduce` gave them."""
        rows = {}
        for table, dtype in self.tables.items():
            whole = np.concatenate([np.zeros(0, dtype), *self.parts[table]])
            rows[table] = whole[np.argsort(whole["image"], kind="stable")]
        return rows

    def state(self) -> dict[str, np.ndarray]:
        """Everything that was added, as plain arrays, ready to be sent to another process or saved.

        Returns:
            ``images`` (I,) int64; ``checksums`` (I,) int64 of their objects' classes; ``settings`` (1,) int64, a
            checksum; and the columns of each table, called "table.column", as long as each other.
        """
        rows = self.rows()
        return {
            "images": np.array(list(self.images), np.int64),
            "checksums": np.array(list(self.images.values()), np.int64),
            "settings": np.array([self.settings_checksum()]),
            **{
                f"{table}.{column}": np.ascontiguousarray(rows[table][column])
                for table, dtype in self.tables.items()
                for column in dtype.names
            },
        }

    def settings_checksum(self) -> int:
        """A number that metrics with the same classes and settings share."""
        return zlib.crc32(repr((type(self).__name__, self.class_names, self.settings)).encode())

    def merge(self, states: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Add what other metrics were given; images that several have count once, as does a state given twice.

        Args:
            states: of metrics with the same options, this one's own or not. Earlier ones come first where the
                predictions for an image differ.

        Raises:
            ValueError: a state is of a metric with other options, or an image id belongs to two references with
                different objects.
        """
        for state in states:
            if "settings" not in state or int(state["settings"][0]) != self.settings_checksum():
                raise ValueError(f"states must be of {type(self).__name__} with the same options")
            pairs = zip(state["images"].tolist(), state["checksums"].tolist(), strict=True)
            new = {image: checksum for image, checksum in pairs if self.is_new(image, checksum, {})}
            rows = {}
            for table, dtype in self.tables.items():
                rows[table] = np.zeros(len(state[f"{table}.image"]), dtype)
                for column in dtype.names:
                    rows[table][column] = state[f"{table}.{column}"]
                rows[table] = rows[table][np.isin(rows[table]["image"], list(new))]
            self.extend(new, [rows])

    def compute(
        self, *, predictions: Sequence | None = None, references: Sequence | None = None, **options
    ) -> dict[str, Any]:
        """Score what was added or merged, and ``predictions`` with ``references`` if given; then start anew.

        Returns:
            the scores, and ``images``, how many there were.

        Raises:
            ValueError: there is nothing to score, or an option is given here instead of to the constructor.
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
        """Number and name of each class: all that have a name, or those of ``seen`` labels."""
        if self.class_names is None:
            return {label: str(label) for label in np.unique(seen).tolist()}
        return dict(enumerate(self.class_names))

    def check_labels(self, values: Any, place: str) -> np.ndarray:
        """Labels as (n,) int64, each of a class there is."""
        return integers(values, place, limit=None if self.class_names is None else len(self.class_names))

    def describe(self, inputs: str, features: Any) -> evaluate.MetricInfo:
        """The information `evaluate` keeps of a metric."""
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description=inputs,
            features=features,
        )


def mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else float("nan")
