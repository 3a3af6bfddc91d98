"""Checks of the boxes of a split: format, range, size and duplicates.

A check takes a `Split` and a `Case` and returns one or more `Finding`s. It is named after its function, whose
docstring states the healthy condition.
"""

from collections.abc import Iterator

import numpy as np

from ..data.box_checks import EVIDENCE, LESS, NEARLY_ALL, check_boxes, inside
from ..data.scenes import scaled
from .findings import Finding, failed, graded, ok, skipped, warning
from .splits import Case, Split

TOLERATED = 0.01  # fraction of boxes that may have a fault, as in every large data set
MOSTLY = 0.5
MISREAD = skipped("box_format failed")
SMALL = 0.1  # fraction of objects below a cell of the feature map from which it is reported


def box_format(split: Split, case: Case) -> Finding:
    """The boxes lie inside their images, and another format does not fit much better."""
    report = split.report
    stated, suspected = report.inside
    if report.suspected is None:
        return ok(f"{report.boxes} boxes, read as {report.format}; {stated:.1%} inside their images")
    sizes = split.sizes[split.place]
    finite = np.isfinite(split.boxes).all(axis=1) & (sizes > 0).all(axis=1)
    outside = finite & ~inside(report.format.to_corners(split.boxes, sizes), sizes)
    message = f"read as {report.format}, {stated:.0%} of {report.boxes} boxes lie inside their images"
    if report.suspected.relative:
        outside, message = finite, f"no coordinate of {report.boxes} boxes is above 1.5, but they are read in pixels"
    return failed(
        f"{message}; read as {report.suspected}, {suspected:.0%} do (limit: {LESS:.0%} more)",
        f"convert the boxes to {report.format}; they seem to be {report.suspected}",
        split.stored_sample(int(outside.argmax())),
    )


def box_axes(split: Split, case: Case) -> Finding:
    """x comes before y, and width before height; square images are not conclusive."""
    sizes = split.sizes[split.place]
    told = np.isfinite(split.boxes).all(axis=1) & (sizes[:, 0] != sizes[:, 1])
    boxes, sizes = split.boxes[told], sizes[told]
    if split.report.suspected is not None:
        return MISREAD
    if not len(boxes):
        return ok("all images with boxes are square, so the axes cannot be checked")
    stated, swapped = (
        inside(split.report.format.to_corners(numbers, sizes), sizes) for numbers in (boxes, boxes[:, [1, 0, 3, 2]])
    )
    message = (
        f"{stated.mean():.0%} of {len(boxes)} boxes lie inside their images, {swapped.mean():.0%} with x and y swapped"
    )
    more = swapped.mean() - stated.mean()
    if swapped.mean() < NEARLY_ALL or more < LESS or (~stated).sum() < EVIDENCE:
        return ok(message)
    first = np.flatnonzero(told)[(~stated).argmax()]
    return failed(
        f"{message} (limit: {LESS:.0%} more)", "store x before y, and width before height", split.stored_sample(first)
    )


def box_range(split: Split, case: Case) -> Iterator[Finding]:
    """Boxes have an area and lie inside their images; a run clips or drops others."""
    report = split.report
    if report.suspected is not None:
        yield MISREAD
        return
    for action, problems in (("dropped", report.dropped), ("clipped", report.clipped)):
        for name, problem in problems.items():
            if name not in ("without a category", "without an outline"):
                yield graded(
                    problem.count > TOLERATED * report.boxes,
                    f"{problem.count} of {report.boxes} boxes are {action}: {name} (limit: {TOLERATED:.0%})",
                    "correct or delete these boxes; annotations may refer to images of another size",
                    split.stored_sample(first_with(split, name, problem.image_id)),
                )


def first_with(split: Split, name: str, image_id: int) -> int:
    """Return the first stored box of an image with a given problem of `BoxReport`."""
    there = np.flatnonzero(split.ids[split.place] == image_id)
    for k in there.tolist():
        place = split.place[k : k + 1]
        *_, report = check_boxes(split.boxes[k : k + 1], split.sizes[place], split.ids[place], 1, split.report.format)
        if name in report.dropped | report.clipped:
            return k
    return int(there[0])


def duplicate_boxes(split: Split, case: Case) -> Iterator[Finding]:
    """No two objects of an image have the same box; each would occupy a query."""
    if split.report.suspected is not None:
        yield MISREAD
        return
    boxes, rows = np.rint(split.kept.fours("bbox")).astype(np.int64), split.kept.rows()
    classes = split.kept.numbers("category", 0.0).astype(np.int64)
    for name, columns in (("with the same class", (rows, classes)), ("with another class", (rows,))):
        keys = np.column_stack([*columns, boxes])
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        again = first[group.ravel()] != np.arange(len(keys))
        if name == "with another class":
            again &= classes != classes[first[group.ravel()]]
        if again.any():
            yield graded(
                again.sum() > TOLERATED * len(keys),
                f"{again.sum()} of {len(keys)} boxes are duplicates, {name}, to the pixel (limit: {TOLERATED:.0%})",
                "keep one of each",
                split.kept_sample(int(again.argmax())),
            )


def tiny_objects(split: Split, case: Case) -> Finding:
    """Objects are at least as large as a cell of the largest feature map of the Transformer at evaluation size."""
    if split.report.suspected is not None:
        return MISREAD
    args = case.args
    sizes = split.sizes[split.kept.rows()]
    known = (sizes > 0).all(axis=1)
    if not known.any():
        return ok("no boxes")
    boxes, sizes = split.kept.fours("bbox")[known], sizes[known]
    larger = scaled(sizes, args.shortest_side, args.longest_side) / sizes
    sides = np.sqrt((boxes[:, 2:] * larger[:, ::-1]).prod(axis=1))
    cell = case.stride
    share = (sides < cell).mean()
    message = (
        f"{share:.1%} of {len(sides)} objects are smaller than a cell of {cell} x {cell} pixels (limit: {SMALL:.0%}) "
        f"and half are below {np.median(sides):.0f} x {np.median(sides):.0f}, with shortest_side {args.shortest_side}"
    )
    if share <= SMALL:
        return ok(message)
    remedy = "increase shortest_side, longest_side and augmentation.scales, set model.dilation, or tile the images"
    return graded(
        np.median(sides) < cell / 2, message, remedy, split.kept_sample(np.flatnonzero(known)[sides.argmin()])
    )


def empty_images(split: Split, case: Case) -> Finding:
    """Images contain objects that are not crowds; a few empty images do no harm."""
    if split.kept.counts.any() and not split.targets.any():
        return failed(
            f"all {split.kept.counts.sum()} objects are crowds (iscrowd), which are neither trained on nor scored",
            "set iscrowd to 0 (VOC: difficult) for single objects",
            split.kept_sample(0),
        )
    empty = split.kept.counts == 0
    message = f"{empty.sum()} of {len(empty)} images have no objects (limit: {MOSTLY:.0%})"
    if empty.mean() <= MOSTLY:
        return ok(message)
    remedy = "check that image_id of the annotations matches id of the images, or drop most of these images"
    return graded(bool(empty.all()), message, remedy, split.sample(empty.argmax()))


def box_count(split: Split, case: Case) -> Finding:
    """Every object of an image can be matched to a query; and most queries are not idle."""
    queries, most = case.config.num_queries, split.targets
    row = int(most.argmax())
    message = f"at most {most[row]} and on average {most.mean():.1f} objects per image, {queries} queries"
    if most[row] > queries:
        over = (most > queries).sum()
        return failed(
            f"{message}: {over} images have more objects than queries, so some cannot be detected",
            f"--model.num_queries {2 * most[row]}",
            split.sample(row),
        )
    return (
        ok(message)
        if split is not case.train or 10 * max(most[row], 1) >= queries
        else warning(
            f"{message}: nearly all queries are trained to predict no object (limit: 10 times the fullest image)",
            f"--model.num_queries {max(10, 2 * most[row])}",
            split.sample(row),
        )
    )
