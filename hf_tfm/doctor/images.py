"""Checks of images with boxes: unreadable, stated size, orientation, enlargement, or shared between splits."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.box_checks import inside
from ..data.images import IMAGE, BadImage, encoded
from ..data.scenes import scaled
from .boxes import MOSTLY
from .findings import Finding, failed, graded, ok, warning
from .splits import Case, Split

UNKNOWN = -1  # byte length of an image that is not available locally
ENLARGED = 4  # factor above which objects are too blurred
TURNED = 5  # EXIF orientations from here on swap height and width


def looked_at(split: Split) -> str:
    """Describe how many images were decoded."""
    return f"{len(split.looks)} of {len(split.rows)} images decoded"


def unreadable_images(split: Split, case: Case) -> Finding:
    """Images can be decoded; a run skips up to ``max_bad_images`` of them, but not all, and then fails."""
    bad = [row for row, look in split.looks.items() if look.error]
    if not bad:
        return ok(f"{looked_at(split)}, all are readable")
    expected = len(bad) * len(split.rows) / len(split.looks)
    return graded(
        expected > case.args.max_bad_images or len(bad) == len(split.looks),
        f"{looked_at(split)}, {len(bad)} are unreadable (limit: max_bad_images = {case.args.max_bad_images} of all), "
        f"first: {split.looks[bad[0]].error}",
        "repair or delete these files and their annotations",
        split.sample(bad[0]),
    )


def image_size(split: Split, case: Case) -> Finding:
    """Images have the height and width stated in their rows; a run drops others."""
    stated = {row: tuple(split.sizes[row].tolist()) for row in split.looks}
    others = [row for row, look in split.looks.items() if not look.error and look.size != stated[row]]
    if not others:
        return ok(f"{looked_at(split)}, all have the stated size")
    row = others[0]
    look = split.looks[row]
    message = (
        f"{looked_at(split)}, {len(others)} differ from the stated size, the first has {look.size[0]} x {look.size[1]}"
    )
    message += f" pixels instead of {stated[row][0]} x {stated[row][1]} (height x width)"
    remedy = "write the actual height and width of each image; resize images and annotations together"
    if look.size == stated[row][::-1]:
        remedy = "height and width are swapped"
        if look.orientation >= TURNED:
            message += f"; EXIF orientation {look.orientation} rotates it"
            remedy = "save and annotate the images upright, without EXIF orientation; images are read upright"
    return failed(message, remedy, split.sample(row))


def image_orientation(split: Split, case: Case) -> Iterator[Finding]:
    """Images with an EXIF orientation have boxes of the upright image."""
    turned = [row for row, look in split.looks.items() if look.orientation > 1]
    if not turned:
        yield ok(f"{looked_at(split)}, none has an EXIF orientation")
        return
    for row in turned:
        there = split.place == row
        height, width = split.looks[row].size
        upright = np.full((there.sum(), 2), [height, width])
        corners = split.report.format.to_corners(split.boxes[there], upright)
        if split.looks[row].orientation < TURNED or inside(corners, upright).all():
            continue
        if inside(corners, upright[:, ::-1]).all():
            k = np.flatnonzero(there)[(~inside(corners, upright)).argmax()]
            yield failed(
                f"upright, it has {height} x {width} pixels (height x width), but its boxes fit {width} x {height}",
                "annotate the images upright, or save them without EXIF orientation",
                split.stored_sample(int(k)),
            )
            return
    yield warning(
        f"{looked_at(split)}, {len(turned)} have an EXIF orientation and are read upright",
        "check that the boxes refer to the upright images",
        split.sample(turned[0]),
    )


def tiny_images(split: Split, case: Case) -> Finding:
    """Images are not enlarged beyond their resolution; thumbnails and placeholders do not show objects well enough."""
    args, known = case.args, np.flatnonzero((split.sizes > 0).all(axis=1))
    if not len(known):
        return ok("no image states its size")
    sizes = split.sizes[known]
    larger = (scaled(sizes, args.shortest_side, args.longest_side) / sizes).max(axis=1)
    tiny = larger > ENLARGED
    smallest = int(larger.argmax())
    message = (
        f"{tiny.sum()} of {len(known)} images are enlarged more than {ENLARGED} times, to a shortest side of "
        f"{args.shortest_side}"
    )
    if not tiny.any():
        return ok(message)
    height, width = sizes[smallest].tolist()
    return graded(
        tiny.mean() > MOSTLY,
        f"{message}, the smallest, {height} x {width} pixels, {larger[smallest]:.1f} times (limit: {MOSTLY:.0%})",
        "remove thumbnails, or reduce shortest_side, longest_side and augmentation.scales",
        split.sample(int(known[smallest])),
    )


def shared_images(case: Case) -> Iterator[Finding]:
    """No image of the training split is in another split, byte for byte."""
    if not case.held_out:
        yield warning(
            f"{case.args.held_out} is the training split: its AP does not measure performance on new images",
            "hold out images with --holdout, or set another validation_split",
        )
    lengths = {name: byte_lengths(split) for name, split in case.splits.items()}
    for split in case.held_out:
        pairs = equal_images(case.train, split, lengths[case.train.name], lengths[split.name])
        if pairs:
            yield failed(
                f"{len(pairs)} of {len(split.rows)} images of {split.name} are also in {case.train.name}, the first "
                f"as image {case.train.ids[pairs[0][0]]} (limit: 0)",
                "delete them from one of the splits; scores would be too high",
                split.sample(pairs[0][1]),
            )
        else:
            yield ok(f"none of {len(split.rows)} images of {split.name} is in {case.train.name}")


def byte_lengths(split: Split) -> np.ndarray:
    """Return the (N,) byte lengths of the stored images, `UNKNOWN` if not local; reads only file sizes."""
    found = []
    for table in split.rows.select_columns([IMAGE]).with_format("arrow").iter(batch_size=1000):
        values = table.column(IMAGE).combine_chunks()
        data = path = values
        if pa.types.is_struct(values.type):
            data, path = pc.struct_field(values, "bytes"), pc.struct_field(values, "path")
        if pa.types.is_binary(data.type) or pa.types.is_large_binary(data.type):
            lengths = pc.fill_null(pc.binary_length(data), UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            lengths = np.full(len(values), UNKNOWN)
        for i in np.flatnonzero(lengths == UNKNOWN).tolist():
            file = path[i].as_py()
            if isinstance(file, str) and Path(file).is_file():
                lengths[i] = Path(file).stat().st_size
        found.append(lengths)
    return np.concatenate(found)


def equal_images(one: Split, other: Split, *lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of rows with the same bytes; reads only images whose length occurs in both splits."""
    shared = np.intersect1d(*lengths)
    shared = shared[shared != UNKNOWN]
    digests = []
    for split, own in zip((one, other), lengths, strict=True):
        rows_of: dict[bytes, list[int]] = defaultdict(list)
        pictures = split.rows.select_columns([IMAGE])
        for row in np.flatnonzero(np.isin(own, shared)).tolist():
            try:
                rows_of[hashlib.sha256(encoded(pictures[row][IMAGE])).digest()].append(row)
            except (BadImage, OSError):
                continue  # reported by unreadable_images
        digests.append(rows_of)
    return sorted(
        ((digests[0][key][0], row) for key in digests[0].keys() & digests[1].keys() for row in digests[1][key]),
        key=lambda pair: pair[1],
    )
