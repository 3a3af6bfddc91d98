"""Panoptic quality: recognition and segmentation quality, for things and stuff alike."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import datasets
import evaluate
import numpy as np

from hf_tfm.metrics.annotations import entry, integers, records, segment_map
from hf_tfm.metrics.streaming import Rows, StreamingMetric, mean

INPUTS = """
Args:
    predictions: for each image "segmentation" (H, W), a segment id for each pixel, and "segments_info", a list of
        "id" and "label_id", as `post_process_panoptic_segmentation` gives them.
    references: for each image "image_id", "segmentation" (H, W) and "segments_info", a list of "id", "category_id" and
        where known "iscrowd". In both, pixels of 0 or -1 that no segment lists are void.
"""
VOID = (0, -1)  # COCO's void id, and transformers' id for an image in which no segment is found

CLASS = np.dtype(
    [
        ("image", np.int64),
        ("label", np.int32),
        ("iou", np.float64),
        *[(count, np.int32) for count in ("tp", "fp", "fn")],
    ]
)


class Segments(NamedTuple):
    """The segments of an image, after segments of the same stuff class are merged."""

    pixels: np.ndarray  # (H, W), segment index of each pixel; S if void
    labels: np.ndarray  # (S,)
    crowd: np.ndarray  # (S,) bool


class PanopticQuality(StreamingMetric):
    """PQ and its factors SQ (segmentation quality) and RQ (recognition quality).

        metric = PanopticQuality(class_names=model.config.id2label, thing_ids=range(80))
        metric.add_batch(predictions=processor.post_process_panoptic_segmentation(...), references=[...])
        metric.compute()["PQ"]

    A predicted and a true segment of the same class match if their IoU, excluding void pixels, is above 0.5. Unmatched
    predictions are ignored if more than half of their area is void or in crowds of their class; unmatched crowds are
    ignored too. Per class, PQ = SQ x RQ, SQ = mean IoU of the matches, RQ = TP / (TP + FP / 2 + FN / 2); the result is
    the mean over the classes that occur. SQ of a class without matches is 0, as in the authors' code; the paper leaves
    it undefined.

    The result holds ``PQ``, ``SQ``, ``RQ`` in [0, 1]; the same with suffixes ``_th`` and ``_st`` if ``thing_ids`` is
    given; ``per_class`` by name; and ``images``. NaN means that no such segment occurs.

    The metric keeps 32 bytes per class and image. It cannot keep sums over images, because images that samplers hand
    to two processes must count once.

    Args:
        thing_ids: ids of the thing classes. All other classes are stuff: segments of the same stuff class in an image
            are merged, whatever their ids, as in section 3 of the paper.
        class_names: see `StreamingMetric`.
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    source = "Kirillov et al. 2019, arXiv:1801.00868, section 4"
    tables: ClassVar = {"classes": CLASS}

    def __init__(
        self,
        *,
        thing_ids: Collection[int] | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        **kwargs,
    ):
        super().__init__(class_names, **kwargs)
        self.things = None if thing_ids is None else set(self.check_labels(list(thing_ids), "thing_ids").tolist())
        self.settings = {"thing_ids": None if self.things is None else sorted(self.things)}

    def labels(self, reference: Mapping, place: str) -> np.ndarray:
        """Return the classes of a reference's segments."""
        return self.read_segments(reference, place, "category_id")[1]

    def reduce(self, prediction: Mapping, reference: Mapping, names: tuple[str, str]) -> Rows:
        """Match the segments of an image."""
        found = self.segments(prediction, names[0], "label_id")
        real = self.segments(reference, names[1], "category_id")
        if found.pixels.shape != real.pixels.shape:
            raise ValueError(
                f'{names[0]}["segmentation"] must be {real.pixels.shape} pixels as the reference\'s, '
                f"got {found.pixels.shape}"
            )
        return {"classes": self.match(found, real)}

    def match(self, found: Segments, real: Segments) -> np.ndarray:
        """Build the rows of the table "classes", one per class in the image (sections 4.1 and 4.2).

        Shapes: P predicted and G true segments.
        """
        P, G = len(found.labels), len(real.labels)
        joint = np.bincount((found.pixels * (G + 1) + real.pixels).ravel(), minlength=(P + 1) * (G + 1))
        joint = joint.reshape(P + 1, G + 1)  # pixel counts; the last row and column are void
        same = found.labels[:, None] == real.labels
        overlap = joint[:P, :G]
        areas, areas_real = joint.sum(axis=1)[:P], joint.sum(axis=0)[:G]
        union = areas[:, None] - joint[:P, G:] + areas_real - overlap  # excludes void pixels of the reference
        iou = np.where(same & ~real.crowd, overlap / np.maximum(union, 1), 0.0)
        matched = iou > 0.5  # at most one per row and column
        left_out = joint[:P, G] + (overlap * (same & real.crowd)).sum(axis=1)
        fp = ~matched.any(axis=1) & (areas > 0) & (2 * left_out <= areas)
        fn = ~matched.any(axis=0) & ~real.crowd

        rows = np.zeros(len(present := np.union1d(found.labels, real.labels)), CLASS)
        rows["label"] = present
        for name, values in {"tp": matched.any(axis=1), "fp": fp, "iou": (iou * matched).sum(axis=1)}.items():
            np.add.at(rows[name], np.searchsorted(present, found.labels), values)
        np.add.at(rows["fn"], np.searchsorted(present, real.labels), fn)
        return rows

    def read_segments(self, record: Mapping, place: str, label_key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, classes and crowd flags of the segments listed in "segments_info"."""
        listed, place = entry(record, "segments_info", place), f'{place}["segments_info"]'
        listed = records(listed, place)
        ids = [entry(segment, "id", f"{place}[{i}]") for i, segment in enumerate(listed)]
        labels = [entry(segment, label_key, f"{place}[{i}]") for i, segment in enumerate(listed)]
        crowd = [segment.get("iscrowd") or 0 for segment in listed]
        return (
            integers(ids, f"{place}: id", limit=None, least=None),
            self.check_labels(labels, f"{place}: {label_key}"),
            integers(crowd, f"{place}: iscrowd", limit=2).astype(bool),
        )

    def segments(self, record: Mapping, place: str, label_key: str) -> Segments:
        """Read a segmentation.

        Raises:
            ValueError: if an id has two classes, or a pixel has an id that is not listed.
        """
        ids, labels, crowd = self.read_segments(record, place, label_key)
        number: dict[int, int] = {}  # segment id -> segment index
        first: dict[tuple, int] = {}  # merge key -> segment index
        kept: list[int] = []
        for i, (segment, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            if segment in number and labels[kept[number[segment]]] != label:
                # Happens with transformers' label_ids_to_fuse: after a fused segment it continues counting from that
                # segment's id.
                raise ValueError(
                    f'{place}["segments_info"] gives id {segment} to segments of the classes '
                    f"{labels[kept[number[segment]]]} and {label}"
                )
            is_stuff = self.things is not None and label not in self.things and not crowd[i]
            key = ("stuff", label) if is_stuff else ("segment", segment)
            if key not in first:
                first[key] = len(kept)
                kept.append(i)
            number[segment] = first[key]
        pixels = segment_map(entry(record, "segmentation", place), f'{place}["segmentation"]')
        number = {**dict.fromkeys(VOID, len(kept)), **number}
        known = np.array(sorted(number))
        found = np.minimum(np.searchsorted(known, pixels), len(known) - 1)
        if (unlisted := known[found] != pixels).any():
            raise ValueError(
                f'{place}["segmentation"] has the id {pixels[unlisted][0]}, which "segments_info" does not list'
            )
        return Segments(np.array([number[i] for i in known.tolist()])[found], labels[kept], crowd[kept])

    def result(self, rows: Rows) -> dict[str, Any]:
        """Compute PQ, SQ and RQ of each class and their means."""
        table = rows["classes"]
        names = self.classes(table["label"])
        scores = np.full((len(names), 3), np.nan)
        for k, label in enumerate(names):
            of_class = table[table["label"] == label]
            iou, tp, fp, fn = (of_class[column].sum() for column in ("iou", "tp", "fp", "fn"))
            if tp + fp + fn:
                sq, rq = iou / max(tp, 1), tp / (tp + fp / 2 + fn / 2)
                scores[k] = sq * rq, sq, rq
        groups = {"": np.ones(len(names), bool)}
        if self.things is not None:
            groups["_th"] = np.isin(list(names), list(self.things))
            groups["_st"] = ~groups["_th"]
        means = {
            f"{name}{group}": mean(scores[chosen, i])
            for group, chosen in groups.items()
            for i, name in enumerate(("PQ", "SQ", "RQ"))
        }
        per_class = {
            name: dict(zip(("PQ", "SQ", "RQ"), scores[k].tolist(), strict=True))
            for k, name in enumerate(names.values())
        }
        return {**means, "per_class": per_class}

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        segmentation = datasets.List(datasets.List(integer))
        features = {
            "predictions": {
                "segmentation": segmentation,
                "segments_info": datasets.List({"id": integer, "label_id": integer}),
            },
            "references": {
                "image_id": integer,
                "segmentation": segmentation,
                "segments_info": datasets.List({"id": integer, "category_id": integer, "iscrowd": integer}),
            },
        }
        return self.describe(INPUTS, datasets.Features(features))
