"""Folders of images with annotation formats that `datasets.load_dataset` does not support: COCO and Pascal VOC.

folder -> annotation format, from the files in it -> rows, which `datasets` caches until a file changes
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from .local_files import cache_entry, package_key, state_key

log = logging.getLogger(__name__)

NOTES: list[str] = []  # warnings about the rows being read


def note(message: str) -> None:
    """Warn about skipped annotations; the warning is repeated each time the rows are loaded from the cache."""
    NOTES.append(message)
    log.warning("%s", message)


@dataclass
class Count:
    """Number of annotations with a problem, and the first of them."""

    number: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Count one annotation."""
        self.number, self.first = self.number + 1, self.first or where


def from_generator(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    sources: Iterable[Path],
    split: str,
    options: dict[str, Any],
) -> datasets.Dataset:
    """Call `Dataset.from_generator`, regenerating if a file of ``sources``, an option or the readers' code changes.

    Args:
        generate: ``generate(**options)`` yields the rows. Options must not be lists, which `datasets` would treat as
            shards.

    Raises:
        ValueError: if ``generate`` raises it, or any other error, which the message then names.
    """
    sources = list(sources)
    about = (generate.__module__, generate.__qualname__, split, features.to_dict(), options)
    key = state_key(sources, about, package_key())
    folder = options.get("folder", generate.__module__)
    NOTES.clear()
    try:
        rows = datasets.Dataset.from_generator(
            generate,
            features=features,
            cache_dir=str(cache_entry(f"{folder} {split}", key)),
            gen_kwargs=options,
            split=datasets.NamedSplit(split),
            fingerprint=key[:32],
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError) and not isinstance(cause, pa.ArrowInvalid):
            raise cause from None
        raise ValueError(f"{sources[0]} cannot be read: {type(cause).__name__}: {cause}") from error
    told = Path(rows.cache_files[0]["filename"]).with_suffix(".notes.json")
    if NOTES:
        told.write_text(json.dumps(NOTES), encoding="utf-8")
    elif told.is_file():
        for message in json.loads(told.read_text(encoding="utf-8")):
            log.warning("%s", message)
    return rows
