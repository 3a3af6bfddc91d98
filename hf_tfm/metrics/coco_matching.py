"""COCO matching and accumulation for one image and one class at a time, using faster-coco-eval's compiled functions.

boxes or masks of an image -> `overlaps` (D, G) -> `match` -> flags of D detections -> `accumulate` over a class

Shapes: D detections; G objects; T = 10 IoU thresholds; A = 4 area ranges; R = 101 recall thresholds.
"""

from types import SimpleNamespace
from typing import NamedTuple

import faster_coco_eval.faster_eval_api_cpp as compiled
import numpy as np
from faster_coco_eval.core import mask as rle

# cocodataset.org/#detection-eval, section 2. np.arange would not give the exact thresholds.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
FLAGS = (2, len(AREA_RANGES), len(IOU_THRESHOLDS))  # matched flag, ignored flag
BITS = int(np.prod(FLAGS))
FLAG_BYTES = -(-BITS // 8)


class Regions(NamedTuple):
    """Boxes or masks of an image, with their classes."""

    shapes: np.ndarray | list[dict]  # (n, 4) x, y, width, height in pixels; or n run-length encoded masks
    labels: np.ndarray  # (n,)
    areas: np.ndarray  # (n,) square pixels
    size: tuple[int, ...]  # height and width of the masks; empty for boxes and if there are no masks


def encode(masks: np.ndarray) -> list[dict]:
    """Run-length encode masks (n, H, W) bool into n codes."""
    if not len(masks):
        return []
    # The encoding is column-major: (n, W, H) in memory, viewed as (H, W, n).
    return rle.encode(np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8).T)


def areas(codes: list[dict]) -> np.ndarray:
    """Return the area of each mask in pixels, (n,) float64."""
    return np.asarray(rle.area(codes) if codes else [], np.float64)


def take(shapes: np.ndarray | list[dict], indices: np.ndarray) -> np.ndarray | list[dict]:
    """Select boxes or masks by index."""
    return shapes[indices] if isinstance(shapes, np.ndarray) else [shapes[i] for i in indices]


def ranks(groups: np.ndarray) -> np.ndarray:
    """Return, for each entry of (n,), the number of earlier equal entries."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    result = np.empty(len(groups), np.int64)
    result[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return result


def overlaps(detections: Regions, objects: Regions, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU of detections and objects of the same class, 0 for different classes, (D, G) float64.

    For a crowd region the denominator is the area of the detection, so any detection inside it matches.
    """
    result = np.zeros((len(detections.labels), len(objects.labels)))
    for label in np.intersect1d(detections.labels, objects.labels):
        d, g = np.flatnonzero(detections.labels == label), np.flatnonzero(objects.labels == label)
        of_class = rle.iou(take(detections.shapes, d), take(objects.shapes, g), crowd[g].astype(int).tolist())
        result[np.ix_(d, g)] = of_class
    return result


def match(detections: Regions, scores: np.ndarray, objects: Regions, crowd: np.ndarray) -> np.ndarray:
    """Match the detections of an image to its objects, greedily by score.

    All classes are matched in one call: detections and objects of different classes have no overlap and never match.

    Args:
        scores: (D,), descending.
        crowd: (G,) bool.

    Returns:
        (D, F) uint8, F = `FLAG_BYTES`: for each area range and IoU threshold, one bit for matched and one for ignored.
    """
    detected, real = compiled.Dataset(), compiled.Dataset()
    # Ids start at 1 because 0 means "unmatched".
    for i, (score, area) in enumerate(zip(scores.tolist(), detections.areas.tolist(), strict=True), 1):
        detected.append(0, 0, {"id": i, "score": score, "area": area})
    for i, (ignore, area) in enumerate(zip(crowd.tolist(), objects.areas.tolist(), strict=True), 1):
        real.append(0, 0, {"id": i, "iscrowd": ignore, "ignore": ignore, "area": area})
    ious = overlaps(detections, objects, crowd).tolist() if len(crowd) else []  # not D empty lists
    found = compiled.COCOevalEvaluateImages(
        [list(r) for r in AREA_RANGES.values()],
        len(scores),
        IOU_THRESHOLDS.tolist(),
        [[ious]],
        real,
        detected,
        [0],
        [0],
        True,
    )
    flags = np.zeros((*FLAGS, len(scores)), bool)
    for a, evaluation in enumerate(found):
        # The pickle protocol is the only access to the contents of an evaluation.
        matches, _, _, _, ignored, _ = evaluation.__getstate__()
        flags[0, a] = np.array(matches, np.int64).reshape(len(IOU_THRESHOLDS), -1) > 0
        flags[1, a] = np.array(ignored, bool).reshape(len(IOU_THRESHOLDS), -1)
    return np.packbits(flags.reshape(BITS, len(scores)).T, axis=1)


def counted(areas: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return whether each object counts in each area range, (G, A) bool."""
    low, high = np.array(list(AREA_RANGES.values())).T
    return ~crowd[:, None] & (areas[:, None] >= low) & (areas[:, None] <= high)


def accumulate(scores: np.ndarray, flags: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall of a class from the detections of all images.

    Args:
        scores: (D,); ties are broken by order.
        flags: (D, F), from `match`.
        objects: (A,), number of objects to find; a shorter array restricts the result to the first area ranges.

    Returns:
        Precision (A, T, R) and recall (A, T); NaN if there are no objects.
    """
    # The compiled code sorts anyway; sorting first makes its memory access sequential.
    order = np.argsort(-scores, kind="stable")
    scores, flags = scores[order], flags[order]
    bits = np.unpackbits(flags, axis=1, count=BITS).reshape(-1, *FLAGS).view(bool)
    thresholds = len(IOU_THRESHOLDS)
    precision = np.full((len(objects), thresholds, len(RECALL_THRESHOLDS)), np.nan)
    recall = np.full((len(objects), thresholds), np.nan)
    for a in np.flatnonzero(objects):
        matched, ignored = bits[:, :, a].transpose(1, 2, 0).reshape(2, -1)  # (T D) each
        evaluation = compiled.ImageEvaluation.__new__(compiled.ImageEvaluation)
        evaluation.__setstate__(
            (matched.tolist(), [], scores.tolist(), [False] * int(objects[a]), ignored.tolist(), [])
        )
        # All images are passed as one, since the limit on detections is already applied.
        parameters = SimpleNamespace(
            recThrs=RECALL_THRESHOLDS.tolist(),
            iouThrs=IOU_THRESHOLDS.tolist(),
            maxDets=[len(scores)],
            areaRng=[None],
            catIds=[0],
            imgIds=[0],
            useCats=1,
        )
        curves = compiled.COCOevalAccumulate(parameters, [evaluation])
        precision[a], recall[a] = curves["precision"][:, :, 0, 0, 0], curves["recall"][:, 0, 0, 0]
    return precision, recall
