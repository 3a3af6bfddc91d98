"""Validation of the boxes of a data set: detects a wrong box format, clips or drops invalid boxes.

boxes as stored (M, 4) + image sizes -> the format in which they lie inside their images -> clipped xywh + a report
"""

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import numpy as np

log = logging.getLogger(__name__)

FORMATS = ("xywh", "xyxy", "cxcywh")
ROUNDING = 1.0  # pixels by which a box may exceed its image without a report; COCO's own boxes are off by hundredths
# A format is considered wrong if another one puts nearly all boxes inside their images and the stated one does not.
NEARLY_ALL, LESS, EVIDENCE = 0.98, 0.05, 5


@dataclass(frozen=True)
class BoxFormat:
    """Format of the four numbers of a box.

    Args:
        corners: "xywh" (left, top, width, height; COCO), "xyxy" (left, top, right, bottom; Pascal VOC) or "cxcywh"
            (centre, width, height; YOLO).
        relative: coordinates are fractions of the image's width and height instead of pixels.

    Raises:
        ValueError: if the format is unknown.
    """

    corners: str = "xywh"
    relative: bool = False

    def __post_init__(self):
        if self.corners not in FORMATS:
            raise ValueError(f'box_format must be one of {", ".join(FORMATS)}, got "{self.corners}"')

    def __str__(self) -> str:
        return f"{self.corners} in {'shares of the image' if self.relative else 'pixels'}"

    def to_corners(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Convert boxes to left, top, right, bottom in pixels.

        Args:
            boxes: (M, 4).
            sizes: (M, 2) height and width of the image of each box.
        """
        first, second = boxes[:, :2], boxes[:, 2:]
        if self.relative:
            first, second = first * sizes[:, ::-1], second * sizes[:, ::-1]
        if self.corners == "cxcywh":
            first = first - second / 2
        if self.corners != "xyxy":
            second = first + second
        return np.concatenate([first, second], axis=1)


@dataclass
class Problem:
    """Number of boxes with a problem, the image id of the first one, and the path of that image if it has one."""

    count: int
    image_id: int
    path: str | None = None


@dataclass
class BoxReport:
    """Findings about the boxes of a data set.

    Args:
        images, boxes: number of images and boxes.
        format: the stated format.
        suspected: the format the boxes seem to have, if it differs.
        inside: fraction of boxes inside their images, in the stated and in the suspected format.
        clipped: problems of boxes that were clipped to the image.
        dropped: problems of boxes that were dropped.
    """

    images: int
    boxes: int
    format: BoxFormat
    suspected: BoxFormat | None = None
    inside: tuple[float, float] = (1.0, 1.0)
    clipped: dict[str, Problem] = field(default_factory=dict)
    dropped: dict[str, Problem] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Return the number of boxes that were not dropped."""
        return self.boxes - sum(problem.count for problem in self.dropped.values())

    def lines(self, known: Container[str] = ()) -> Iterator[str]:
        """Yield one line per problem whose name is not ``known``."""
        for action, problems in (("clipped", self.clipped), ("left out", self.dropped)):
            for name, problem in problems.items():
                if name not in known:
                    image = f"{problem.image_id}{f', {problem.path}' if problem.path else ''}"
                    yield f"{problem.count} of {self.boxes} boxes {action}: {name} (first in image {image})"

    def require_format(self) -> None:
        """Raise if the boxes seem to have another format than stated.

        Raises:
            ValueError: if they do; the message says which options to set.
        """
        if self.suspected is not None:
            stated, found = self.inside
            raise ValueError(
                f"read as {self.format}, {stated:.0%} of the boxes lie inside their images; as "
                f'{self.suspected}, {found:.0%} do: give box_format="{self.suspected.corners}" and '
                f"relative_boxes={self.suspected.relative}"
            )

    def log(self, told: set[str] | None = None) -> None:
        """Log one warning per problem.

        Args:
            told: names of problems that are not logged; those that are logged are added.
        """
        for line in self.lines(told or ()):
            log.warning("%s", line)
        if told is not None:
            told |= {*self.clipped, *self.dropped}


def inside(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes have a positive area and lie in their images, (M,) bool.

    A box may exceed its image by a hundredth of the side or by two pixels, whichever is larger.
    """
    height, width = sizes.T
    limits = np.stack([width, height], axis=1)
    slack = np.maximum(limits / 100, 2.0)
    first, second = corners[:, :2], corners[:, 2:]
    return ((first >= -slack) & (second <= limits + slack) & (second > first)).all(axis=1)


def suspect(boxes: np.ndarray, sizes: np.ndarray, stated: BoxFormat) -> tuple[BoxFormat | None, tuple[float, float]]:
    """Return another format that the boxes seem to have, judged by how many would lie inside their images.

    Relative boxes read as pixels all lie inside the first pixel. xyxy read as xywh extends beyond the image for boxes
    in the right or bottom half; xywh read as xyxy gives boxes that end before they begin.

    Args:
        boxes: (M, 4), finite.
        sizes: (M, 2) height and width of their images.
        stated: the stated format.

    Returns:
        The format, or None if ``stated`` fits as well; and the fractions of boxes inside, as stated and as suspected.
    """
    if not len(boxes):
        return None, (1.0, 1.0)
    relative = bool(np.abs(boxes).max() <= 1.5)
    good = inside(stated.to_corners(boxes, sizes), sizes)
    others = {
        other: float(inside(other.to_corners(boxes, sizes), sizes).mean())
        for corners in FORMATS
        if (other := BoxFormat(corners, relative)) != stated
    }
    best = max(others, key=others.get)
    # A tiny box in the corner in pixels can look relative, but not all boxes of a data set can.
    mistaken_unit = relative and not stated.relative and len(boxes) >= EVIDENCE
    share = 0.0 if mistaken_unit else float(good.mean())
    wrong = len(boxes) if mistaken_unit else int((~good).sum())
    if others[best] >= NEARLY_ALL and others[best] - share >= LESS and wrong >= EVIDENCE:
        return best, (share, others[best])
    return None, (float(good.mean()), float(good.mean()))


def check_boxes(
    boxes: np.ndarray, sizes: np.ndarray, image_ids: np.ndarray, images: int, stated: BoxFormat
) -> tuple[np.ndarray, np.ndarray, BoxReport]:
    """Validate boxes and clip them to their images.

    Args:
        boxes: (M, 4) as stored; NaN marks missing values.
        sizes: (M, 2) height and width in pixels of the image of each box; 0 if unknown.
        image_ids: (M,) int64.
        images: number of images, including those without boxes.
        stated: the stated format.

    Returns:
        xywh: (M, 4) float64 in pixels, inside the images.
        keep: (M,) bool, False for boxes that have no area or are not finite.
        report: the findings.
    """
    finite = np.isfinite(boxes).all(axis=1)
    known = finite & (sizes > 0).all(axis=1)
    found, shares = suspect(boxes[known], sizes[known], stated)
    limits = np.where(sizes > 0, sizes, np.inf)
    numbers = np.where(finite[:, None], boxes, 0.0)
    corners = stated.to_corners(numbers, sizes if stated.relative else limits)
    flat = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    edges = np.concatenate([limits[:, ::-1]] * 2, axis=1)
    clipped = np.clip(corners, 0.0, edges)
    moved = (np.abs(clipped - corners) > ROUNDING).any(axis=1)
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    report = BoxReport(images, len(boxes), stated, found, shares)
    kinds = {
        "not finite": ~finite,
        "width or height not above 0": finite & flat,
        "outside the image": finite & ~flat & empty,
    }
    keep = finite & ~flat & ~empty
    for problems, masks in ((report.dropped, kinds), (report.clipped, {"reach out of the image": keep & moved})):
        for name, mask in masks.items():
            if mask.any():
                problems[name] = Problem(int(mask.sum()), int(image_ids[mask.argmax()]))
    clipped[:, 2:] -= clipped[:, :2]
    return clipped, keep, report
