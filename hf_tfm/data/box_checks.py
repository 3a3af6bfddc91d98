"""Are the boxes of a data set what they are said to be? Mistaken formats are found, bad boxes cut off or dropped.

boxes as stored (M, 4) + image sizes -> the format in which they lie inside their images -> clipped xywh + a report
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

log = logging.getLogger(__name__)

FORMATS = ("xywh", "xyxy", "cxcywh")
ROUNDING = 1.0  # pixels by which a box may leave its image without a word: COCO's own are off by hundredths
# A format is taken to be a mistake where another one puts nearly all boxes inside their images, and it does not.
NEARLY_ALL, LESS, EVIDENCE = 0.98, 0.05, 5


@dataclass(frozen=True)
class BoxFormat:
    """How four numbers stand for a box.

    Args:
        corners: "xywh" (left, top, width, height; COCO's), "xyxy" (left, top, right, bottom; Pascal VOC's) or "cxcywh"
            (centre, width, height; YOLO's).
        relative: in shares of the image's width and height instead of pixels.

    Raises:
        ValueError: there is no such format.
    """

    corners: str = "xywh"
    relative: bool = False

    def __post_init__(self):
        if self.corners not in FORMATS:
            raise ValueError(f'box_format must be one of {", ".join(FORMATS)}, got "{self.corners}"')

    def __str__(self) -> str:
        return f"{self.corners} in {'shares of the image' if self.relative else 'pixels'}"

    def to_corners(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes -> left, top, right, bottom in pixels.

        Args:
            boxes: (M, 4).
            sizes: (M, 2) height and width of each one's image.
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
    """How many boxes have it, and the image id of the first."""

    count: int
    image_id: int


@dataclass
class BoxReport:
    """What was found in the boxes of a data set.

    Args:
        images, boxes: how many there are.
        format: what the boxes are said to be.
        suspected: what they seem to be, where that is something else.
        inside: share of the boxes that lie in their images: as they are said to be, and as suspected.
        clipped: problems of boxes that were cut off at the image's edge.
        dropped: problems of boxes that were left out.
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
        """Boxes that were not left out."""
        return self.boxes - sum(problem.count for problem in self.dropped.values())

    def lines(self) -> Iterator[str]:
        """A line for each problem."""
        for action, problems in (("clipped", self.clipped), ("left out", self.dropped)):
            for name, problem in problems.items():
                yield f"{problem.count} of {self.boxes} boxes {action}: {name} (first in image {problem.image_id})"

    def require_format(self) -> None:
        """Refuse boxes that are something else than they are said to be.

        Raises:
            ValueError: they are; the error says what to do.
        """
        if self.suspected is not None:
            stated, found = self.inside
            raise ValueError(
                f"the boxes are read as {self.format}, and {stated:.0%} of them lie in their images so; as "
                f'{self.suspected}, {found:.0%} do: give box_format="{self.suspected.corners}" and '
                f"relative_boxes={self.suspected.relative}"
            )

    def log(self) -> None:
        """Tell of every problem, a line each."""
        for line in self.lines():
            log.warning("%s", line)


def inside(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes have an area and lie in their images, up to a hundredth of its sides or two pixels; (M,) bool."""
    height, width = sizes.T
    limits = np.stack([width, height], axis=1)
    slack = np.maximum(limits / 100, 2.0)
    first, second = corners[:, :2], corners[:, 2:]
    return ((first >= -slack) & (second <= limits + slack) & (second > first)).all(axis=1)


def suspect(boxes: np.ndarray, sizes: np.ndarray, stated: BoxFormat) -> tuple[BoxFormat | None, tuple[float, float]]:
    """Another format that boxes seem to have, by where they would lie.

    Boxes in shares of the image, read as pixels, all lie inside its first pixel. Corners read as corner and size stick
    out of it wherever a box is right of or below the middle; sizes read as corners end before they begin.

    Args:
        boxes: (M, 4), finite.
        sizes: (M, 2) height and width of their images.
        stated: what they are said to be.

    Returns:
        the format, or None where ``stated`` is as good, and the shares of boxes inside: as stated, as suspected.
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
    # Pixels of a tiny box in the corner look like shares, but not all boxes of a data set are such.
    mistaken_unit = relative and not stated.relative and len(boxes) >= EVIDENCE
    share = 0.0 if mistaken_unit else float(good.mean())
    wrong = len(boxes) if mistaken_unit else int((~good).sum())
    if others[best] >= NEARLY_ALL and others[best] - share >= LESS and wrong >= EVIDENCE:
        return best, (share, others[best])
    return None, (float(good.mean()), float(good.mean()))


def check_boxes(
    boxes: np.ndarray, sizes: np.ndarray, image_ids: np.ndarray, images: int, stated: BoxFormat
) -> tuple[np.ndarray, np.ndarray, BoxReport]:
    """Bring boxes into their images.

    Args:
        boxes: (M, 4) as stored; NaN stands for what is missing.
        sizes: (M, 2) height and width of each one's image in pixels; 0 where it is not known.
        image_ids: (M,) int64.
        images: how many images there are, those without a box among them.
        stated: what the boxes are said to be.

    Returns:
        xywh: (M, 4) float64 in pixels, inside the images.
        keep: (M,) bool, False for boxes that have no area or are no numbers.
        report: what was found.
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
