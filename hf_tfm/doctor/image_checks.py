"""Checks of images without boxes: unreadable, small, blank, or shared between splits."""

import hashlib
from collections.abc import Iterator

from ..data.images import IMAGE, BadImage, encoded
from .data_case import DataCase, DataSplit
from .findings import Finding, graded, ok

MOSTLY = 0.5
FEW = 0.01
SMALL = 8  # minimum pixels of the shorter side


def unreadable_images(split: DataSplit, case: DataCase) -> Finding:
    """Images can be decoded."""
    seen = split.looks
    bad = [row for row, look in seen.items() if look.error]
    if not bad:
        return ok(f"{len(seen)} of {len(split.rows)} images decoded, all are readable")
    return graded(
        len(bad) > FEW * len(seen),
        f"{len(seen)} of {len(split.rows)} images decoded, {len(bad)} are unreadable (limit: {FEW:.0%}), first: "
        f"{seen[bad[0]].error}",
        "repair or delete these files; a run skips up to max_bad_images of them",
        split.sample(bad[0]),
    )


def small_images(split: DataSplit, case: DataCase) -> Finding:
    """Images have at least 8 pixels on each side."""
    sizes = {row: min(look.height, look.width) for row, look in split.looks.items() if not look.error}
    small = [row for row, side in sizes.items() if side < SMALL]
    if not small:
        return ok(f"{len(sizes)} images checked, none has a side below {SMALL} pixels")
    return graded(
        len(small) > MOSTLY * len(sizes),
        f"{len(small)} of {len(sizes)} images have a side below {SMALL} pixels (limit: {MOSTLY:.0%})",
        "remove thumbnails and placeholders",
        split.sample(small[0]),
    )


def blank_images(split: DataSplit, case: DataCase) -> Finding:
    """Images have more than one colour."""
    flags = {row: look.blank for row, look in split.looks.items() if not look.error}
    blank = [row for row, flag in flags.items() if flag]
    if not blank:
        return ok(f"{len(flags)} images checked, none has a single colour")
    return graded(
        len(blank) > MOSTLY * len(flags),
        f"{len(blank)} of {len(flags)} images have a single colour (limit: {MOSTLY:.0%})",
        "remove placeholders; check that the files were written correctly",
        split.sample(blank[0]),
    )


def digests(split: DataSplit) -> list[bytes | None]:
    """Return (N,) hashes of the images' bytes; None for an unreadable image."""
    found: list[bytes | None] = []
    for row in split.images:
        try:
            found.append(hashlib.blake2b(encoded(row[IMAGE]), digest_size=12).digest())
        except (BadImage, OSError):
            found.append(None)
    return found


def shared_images(case: DataCase) -> Iterator[Finding]:
    """No image of the training split is in another split, byte for byte."""
    if not case.held_out:
        return
    train = {digest: row for row, digest in enumerate(digests(case.train)) if digest is not None}
    for split in case.held_out:
        pairs = [(row, train[digest]) for row, digest in enumerate(digests(split)) if digest in train]
        if not pairs:
            yield ok(f"none of {len(split.rows)} images of {split.name} is in {case.train.name}")
            continue
        yield graded(
            len(pairs) > FEW * len(split.rows),
            f"{len(pairs)} of {len(split.rows)} images of {split.name} are also in {case.train.name} (limit: "
            f"{FEW:.0%}), the first as row {pairs[0][1]}",
            "delete them from one of the splits; scores would be too high",
            split.sample(pairs[0][0]),
        )
