"""The reader of a folder of annotated images, by its layout."""

from collections.abc import Callable
from pathlib import Path

import datasets

from . import coco, voc


def annotation_reader(folder: Path) -> Callable[[Path], datasets.DatasetDict] | None:
    """What reads a folder's splits; None of a folder for `datasets.load_dataset`."""
    if coco.coco_files(folder):
        return coco.load_coco
    return voc.load_voc if voc.is_voc(folder) else None
