"""COCO's matching and accumulation, by faster-coco-eval's compiled functions, an image and a class at a time.

boxes or masks of an image -> `overlaps` (D, G) -> `match` -> flags of D detections -> `accumulate` over a class

Shapes: D detections; G objects; T = 10 IoU thresholds; A = 4 area ranges; R = 101 recall thresholds.
"""

from types import SimpleNamespace
from typing import NamedTuple

import faster_coco_eval.faster_eval_api_cpp as compiled
import numpy as np
from faster_coco_eval.core import mask as rle

# cocodataset.org/#detection-eval, section 2. NumPy's arange would not give the exact thresholds.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
FLAGS = (2, len(AREA_RANGES), len(IOU_THRESHOLDS))  # whether matched, whether ignored
BITS = int(np.prod(FLAGS))
FLAG_BYTES = -(-BITS // 8)


class Regions(NamedTuple):
    """Boxes or masks of an image, with their classes."""

    shapes: np.ndarray | list[dict]  # (n, 4) x, y, width, height in pixels; or n masks as run lengths
    labels: np.ndarray  # (n,)
    areas: np.ndarray  # (n,) square pixels
    size: tuple[int, ...]  # height and width of masks; nothing of boxes, nor where there are no masks


def encode(masks: np.ndarray) -> list[dict]:
    """Masks (n, H, W) bool -> n run-length codes."""
    if not len(masks):
        return []
    # The code runs down the columns: (n, W, H) in memory, seen as (H, W, n).
    return rle.encode(np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8).T)


def areas(codes: list[dict]) -> np.ndarray:
    """Pixels of each mask, (n,) float64."""
    return np.asarray(rle.area(codes) if codes else [], np.float64)


def take(shapes: np.ndarray | list[dict], indices: np.ndarray) -> np.ndarray | list[dict]:
    """Some boxes or masks."""
    return shapes[indices] if isinstance(shapes, np.ndarray) else [shapes[i] for i in indices]


def ranks(groups: np.ndarray) -> np.ndarray:
    """How many earlier entries are equal, for each of (n,)."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    result = np.empty(len(groups), np.int64)
    result[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return result


def overlaps(detections: Regions, objects: Regions, crowd: np.ndarray) -> np.ndarray:
    """IoU of detections and objects of the same class, 0 for others, (D, G) float64.

    With a crowd region the union is the detection alone, so that any detection inside matches it.
    """
    result = np.zeros((len(detections.labels), len(objects.labels)))
    for label in np.intersect1d(detections.labels, objects.labels):
        d, g = np.flatnonzero(detections.labels == label), np.flatnonzero(objects.labels == label)
        of_class = rle.iou(take(detections.shapes, d), take(objects.shapes, g), crowd[g].astype(int).tolist())
        result[np.ix_(d, g)] = of_class
    return result


def match(detections: Regions, scores: np.ndarray, objects: Regions, crowd: np.ndarray) -> np.ndarray:
    """Match the detections of an image to its objects, greedily by score.

    All classes are matched at once: without an overlap, those of different classes never match.

    Args:
        scores: (D,), descending.
        crowd: (G,) bool.

    Returns:
        (D, F) uint8, F = `FLAG_BYTES`: for each area range and threshold a bit whether a detection is matched, and one
        whether it is ignored.
    """
    detected, real = compiled.Dataset(), compiled.Dataset()
    # Identities begin at 1, for 0 says "unmatched".
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
        # Its pickle protocol is the only way into an evaluation.
        matches, _, _, _, ignored, _ = evaluation.__getstate__()
        flags[0, a] = np.array(matches, np.int64).reshape(len(IOU_THRESHOLDS), -1) > 0
        flags[1, a] = np.array(ignored, bool).reshape(len(IOU_THRESHOLDS), -1)
    return np.packbits(flags.reshape(BITS, len(scores)).T, axis=1)


def counted(areas: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Whether an object is to be found, in each area range, (G, A) bool."""
    low, high = np.array(list(AREA_RANGES.values())).T
    return ~crowd[:, None] & (areas[:, None] >= low) & (areas[:, None] <= high)


def accumulate(scores: np.ndarray, flags: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of a class from the detections of all images.

    Args:
        scores: (D,); of equal ones the first counts as the higher.
        flags: (D, F) of `match`.
        objects: (A,), how many there are to be found; shorter for the first area ranges alone.

    Returns:
        precision (A, T, R) and recall (A, T); NaN where there are no objects.
    """
    order = np.argsort(-scores, kind="stable")  # they are sorted anyway, but memory is then read in order
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
        # All images as one, for no limit on detections is left to apply.
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
