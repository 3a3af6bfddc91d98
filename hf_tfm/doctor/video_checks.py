"""Checks of videos: unreadable, of different lengths and sizes."""

from collections.abc import Iterator

import datasets
import numpy as np

from ..data import videos
from ..data.images import IMAGE, BadImage
from .data_case import DataCase, DataSplit
from .findings import Finding, graded, ok, warning

FEW = 0.01
DECODED = 100  # number of evenly spaced videos of a split


def frames_of_videos(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Videos can be decoded, and have frames enough to be read and predicted."""
    rows = videos.video_rows(split.rows, split.columns.video)
    is_file = isinstance(rows.features[IMAGE], datasets.Video)
    lengths: dict[int, int] = {}
    bad: dict[int, str] = {}
    for row in np.unique(np.linspace(0, len(rows) - 1, min(DECODED, len(rows))).astype(int)).tolist():
        count = 0

        def choose(length: int) -> range:
            nonlocal count
            count = length
            return range(length)

        try:
            videos.read_video(rows[row][IMAGE], choose, is_file)
        except (BadImage, OSError) as error:
            bad[row] = str(error)
        else:
            lengths[row] = count
    seen = len(lengths) + len(bad)
    if bad:
        yield graded(
            len(bad) > FEW * seen,
            f"{seen} of {len(rows)} videos decoded, {len(bad)} are unreadable (limit: {FEW:.0%}), first: "
            f"{next(iter(bad.values()))}",
            "repair or delete these videos; a run skips up to max_bad_images of them",
            split.sample(next(iter(bad))),
        )
    else:
        yield ok(f"{seen} of {len(rows)} videos decoded, all are readable")
    if lengths:
        shortest = min(lengths, key=lambda row: lengths[row])
        message = f"videos have {lengths[shortest]} to {max(lengths.values())} frames"
        yield (
            ok(message)
            if lengths[shortest] > 1
            else warning(
                message,
                "a single frame cannot be forecast; to generate videos from images, give moving_images to the run",
                split.sample(shortest),
            )
        )
