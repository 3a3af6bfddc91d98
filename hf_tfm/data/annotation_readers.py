"""The reader of a folder of annotated images, by its layout."""

from collections.abc import Callable
from pathlib import Path

import datasets

from . import coco, voc


def annotation_reader(folder: Path) -> Callable[[Path], datasets.DatasetDict] | None:
    """Return the function that loads a folder's splits; None if `datasets.load_dataset` should load the folder."""
    if coco.coco_files(folder):
        return coco.load_coco
    return voc.load_voc if voc.is_voc(folder) else None
