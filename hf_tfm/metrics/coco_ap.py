"""COCO average precision and recall for boxes or masks, computed by faster-coco-eval."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import datasets
import evaluate
import numpy as np

from hf_tfm.metrics import coco_matching
from hf_tfm.metrics.annotations import boxes, entry, integers, masks, numbers
from hf_tfm.metrics.coco_matching import Regions
from hf_tfm.metrics.streaming import Rows, StreamingMetric, mean

INPUTS = """
Args:
    predictions: for each image "boxes" (n, 4) x1, y1, x2, y2 in pixels, "scores" (n,) and "labels" (n,), as
        `post_process_object_detection` gives them; for masks, "masks" (n, H, W) instead of boxes.
    references: for each image "image_id", "labels" (m,) and "boxes" or "masks"; and where known "iscrowd" (m,), with
        0 for none, and "area" (m,) in square pixels, by default that of the box or mask.
"""

OBJECT = np.dtype([("image", np.int64), ("label", np.int32), ("counted", bool, len(coco_matching.AREA_RANGES))])
DETECTION = np.dtype(
    [("image", np.int64), ("label", np.int32), ("score", np.float64), ("flags", np.uint8, coco_matching.FLAG_BYTES)]
)


class CocoAP(StreamingMetric):
    """Detection average precision and recall as defined by COCO and computed by pycocotools.

        metric = CocoAP(class_names=model.config.id2label)
        metric.add_batch(predictions=[{"boxes": ..., "scores": ..., "labels": ...}], references=[...])
        metric.compute()["AP50"]

    The result holds ``AP`` (mean over IoU thresholds 0.5 to 0.95), ``AP50``, ``AP75``, ``AP_small`` (area up to 32²
    pixels), ``AP_medium`` (up to 96²), ``AP_large``; ``AR1``, ``AR10``, ``AR100`` (by detection limit), ``AR_small``,
    ``AR_medium``, ``AR_large``; ``per_class``, AP and AP50 by class name; and ``images``. Scores are in [0, 1], or NaN
    if there is no such object.

    The metric keeps 30 bytes per detection and 16 per object, but no boxes or masks.

    Args:
        iou_type: "bbox" compares boxes, "segm" compares masks.
        max_detections: ascending limits on the detections per image and class; AP uses the last one.
        class_names: see `StreamingMetric`.
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    source = "Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#detection-eval"
    tables: ClassVar = {"objects": OBJECT, "detections": DETECTION}

    def __init__(
        self,
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",
        max_detections: Sequence[int] = (1, 10, 100),
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        **kwargs,
    ):
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f'iou_type must be "bbox" or "segm", got "{iou_type}"')
        self.iou_type, self.limits = iou_type, [int(limit) for limit in max_detections]
        if not self.limits or self.limits[0] < 1 or self.limits != sorted(set(self.limits)):
            raise ValueError(f"max_detections must be ascending numbers from 1 on, got {max_detections}")
        self.settings = {"iou_type": iou_type, "max_detections": self.limits}
        super().__init__(class_names, **kwargs)

    def labels(self, reference: Mapping, place: str) -> np.ndarray:
        """Return the classes of a reference's objects."""
        return self.check_labels(entry(reference, "labels", place), f'{place}["labels"]')

    def reduce(self, prediction: Mapping, reference: Mapping, names: tuple[str, str]) -> Rows:
        """Match the detections of an image to its objects."""
        found, scores = self.detections(prediction, names[0])
        real, crowd = self.objects(reference, names[1])
        if found.size and real.size and found.size != real.size:
            raise ValueError(f'{names[0]}["masks"] must be {real.size} pixels as the reference\'s, got {found.size}')
        detections, objects = np.zeros(len(scores), DETECTION), np.zeros(len(crowd), OBJECT)
        detections["label"], detections["score"] = found.labels, scores
        detections["flags"] = coco_matching.match(found, scores, real, crowd)
        objects["label"], objects["counted"] = real.labels, coco_matching.counted(real.areas, crowd)
        return {"objects": objects, "detections": detections}

    def detections(self, prediction: Mapping, place: str) -> tuple[Regions, np.ndarray]:
        """Return the detections within the limit and their scores (D,), descending."""
        labels = self.labels(prediction, place)
        scores = numbers(entry(prediction, "scores", place), f'{place}["scores"]', len(labels))
        best = np.argsort(-scores, kind="stable")
        best = best[coco_matching.ranks(labels[best]) < self.limits[-1]]
        return self.regions(prediction, place, labels, best), scores[best]

    def objects(self, reference: Mapping, place: str) -> tuple[Regions, np.ndarray]:
        """Return the objects of an image and their crowd flags, (G,) bool."""
        labels = self.labels(reference, place)
        regions = self.regions(reference, place, labels, np.arange(len(labels)))
        if (area := reference.get("area")) is not None:
            regions = regions._replace(areas=numbers(area, f'{place}["area"]', len(labels)))
        crowd = np.zeros(len(labels), bool)
        if (iscrowd := reference.get("iscrowd")) is not None:
            crowd = integers(iscrowd, f'{place}["iscrowd"]', 2, len(labels)).astype(bool)
        return regions, crowd

    def regions(self, record: Mapping, place: str, labels: np.ndarray, chosen: np.ndarray) -> Regions:
        """Return the ``chosen`` boxes or masks of an image."""
        if self.iou_type == "bbox":
            found = boxes(entry(record, "boxes", place), f'{place}["boxes"]', len(labels))[chosen]
            return Regions(found, labels[chosen], found[:, 2] * found[:, 3], ())
        bits = masks(entry(record, "masks", place), f'{place}["masks"]', len(labels))
        codes = coco_matching.encode(bits[chosen])
        return Regions(codes, labels[chosen], coco_matching.areas(codes), bits.shape[1:] if len(bits) else ())

    def result(self, rows: Rows) -> dict[str, Any]:
        """Compute precision and recall of each class and their means."""
        objects, detections = rows["objects"], rows["detections"]
        names = self.classes(np.concatenate([objects["label"], detections["label"]]))
        ranges = list(coco_matching.AREA_RANGES)
        precision = np.full((len(names), len(ranges), len(coco_matching.IOU_THRESHOLDS)), np.nan)
        recall = np.full((len(names), len(self.limits) - 1 + len(ranges), precision.shape[2]), np.nan)
        for k, label in enumerate(names):
            there = objects["counted"][objects["label"] == label].sum(axis=0)
            found = detections[detections["label"] == label]
            rank = coco_matching.ranks(found["image"])
            for m, limit in enumerate(self.limits[:-1]):  # recall only, over objects of any size
                few = found[rank < limit]
                recall[k, m] = coco_matching.accumulate(few["score"], few["flags"], there[:1])[1][0]
            curves, recall[k, len(self.limits) - 1 :] = coco_matching.accumulate(found["score"], found["flags"], there)
            precision[k] = curves.mean(axis=2)
        scores = {"AP": mean(precision[:, 0]), "AP50": mean(precision[:, 0, 0]), "AP75": mean(precision[:, 0, 5])}
        scores |= {f"AP_{size}": mean(precision[:, a]) for a, size in enumerate(ranges) if a}
        recalls = [f"AR{limit}" for limit in self.limits] + [f"AR_{size}" for size in ranges[1:]]
        scores |= {name: mean(recall[:, column]) for column, name in enumerate(recalls)}
        per_class = {
            name: {"AP": mean(precision[k, 0]), "AP50": mean(precision[k, 0, :1])}
            for k, name in enumerate(names.values())
        }
        return {**scores, "per_class": per_class}

    def _info(self) -> evaluate.MetricInfo:
        labels, scores = datasets.List(datasets.Value("int64")), datasets.List(datasets.Value("float64"))
        bits = datasets.List(datasets.List(datasets.List(datasets.Value("bool"))))
        shapes = {"boxes": datasets.List(scores)} if self.iou_type == "bbox" else {"masks": bits}
        features = {
            "predictions": {**shapes, "scores": scores, "labels": labels},
            "references": {"image_id": datasets.Value("int64"), **shapes, "labels": labels},
        }
        return self.describe(INPUTS, datasets.Features(features))
