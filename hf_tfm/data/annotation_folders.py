"""Folders of images with annotation files that `datasets.load_dataset` does not know: COCO's and Pascal VOC's.

folder -> its kind, by the files in it -> rows, which `datasets` keeps on disk until a file changes
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError


def annotation_reader(folder: Path) -> Callable[[Path], datasets.DatasetDict] | None:
    """What reads a folder's splits; None of a folder for `datasets.load_dataset`."""
    from . import coco, voc

    if coco.coco_files(folder):
        return coco.load_coco
    return voc.load_voc if voc.is_voc(folder) else None


def from_generator(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    files: Iterable[Path],
    split: str,
    options: dict[str, Any],
) -> datasets.Dataset:
    """`Dataset.from_generator`, read again whenever one of ``files``, an option or the reader's own code changes.

    Args:
        generate: ``generate(**options)`` gives the rows; among the options are no lists, for `datasets` would take
            them for shards.

    Raises:
        ValueError: what ``generate`` raised; `datasets` would hide it.
    """
    state = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    code = inspect.getsource(inspect.getmodule(generate))
    key = json.dumps([code, generate.__qualname__, split, features.to_dict(), state, options], sort_keys=True)
    try:
        return datasets.Dataset.from_generator(
            generate,
            features=features,
            gen_kwargs=options,
            split=datasets.NamedSplit(split),
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
