"""Pascal VOC's folders, as the columns `detection` reads.

    Annotations/<image>.xml + JPEGImages/<image>.jpg + ImageSets/Main/<split>.txt

(Everingham et al. 2010, doi:10.1007/s11263-009-0275-4.) Images stay where they are; their paths are stored.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value

from .annotation_folders import from_generator

SPLITS = {"train": "train", "val": "validation", "trainval": "trainval", "test": "test"}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")


def is_voc(folder: Path) -> bool:
    """Whether a folder is one of Pascal VOC's kind."""
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def load_voc(folder: Path) -> datasets.DatasetDict:
    """Every split of a folder of VOC's kind; all images are "train" where ImageSets/Main has no lists.

    Objects marked as difficult get ``iscrowd``: VOC's rules neither ask for them nor hold finding them against a
    detector, and so it is with COCO's crowds.

    Returns:
        splits with ``image`` (a path), ``image_id``, ``width``, ``height`` and ``objects``. Categories are all that
        occur in the folder, by the alphabet.

    Raises:
        ValueError: an annotation is missing or not VOC's XML.
    """
    lists = {split: folder / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    lists = {SPLITS[split]: file for split, file in lists.items() if file.is_file()}
    every = sorted((folder / "Annotations").glob("*.xml"))
    if not every:
        raise ValueError(f"{folder / 'Annotations'} has no annotations")
    names = sorted({name for file in every for name in object_names(file)})
    features = Features(
        {
            "image": Image(decode=False),
            "image_id": Value("int64"),
            "width": Value("int32"),
            "height": Value("int32"),
            "objects": List(
                {
                    "bbox": List(Value("float32"), length=4),
                    "category": ClassLabel(names=names),
                    "iscrowd": Value("bool"),
                }
            ),
        }
    )
    stems = {split: file.read_text(encoding="utf-8").split() for split, file in lists.items()}
    stems = stems or {"train": [file.stem for file in every]}
    for split, chosen in stems.items():
        if not chosen:
            raise ValueError(f"{lists[split]} names no image")
    # A changed XML file does not change the lists, so all of them decide whether to read again.
    files = [*lists.values(), *every]
    splits = datasets.DatasetDict()
    for split, chosen in stems.items():
        options = {"folder": str(folder.resolve()), "stems": tuple(chosen), "names": tuple(names)}
        splits[split] = from_generator(read_split, features, files, split, options)
    return splits


def parse(file: Path) -> ElementTree.Element:
    """The root of an annotation.

    Raises:
        ValueError: it is missing or no XML.
    """
    try:
        return ElementTree.fromstring(file.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def text(element: ElementTree.Element, path: str, file: Path) -> str:
    """What stands at a path of an annotation.

    Raises:
        ValueError: there is nothing.
    """
    value = (element.findtext(path) or "").strip()
    if not value:
        raise ValueError(f"{file} has no {path} in <{element.tag}>, as VOC's annotations have")
    return value


def number(element: ElementTree.Element, path: str, file: Path) -> float:
    """The number at a path of an annotation.

    Raises:
        ValueError: there is none.
    """
    value = text(element, path, file)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f'{file} must have a number as {path}, got "{value}"') from None


def object_names(file: Path) -> list[str]:
    """The categories of an annotation's objects."""
    return [text(found, "name", file) for found in parse(file).iter("object")]


def read_split(folder: str, stems: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a split."""
    root, places = Path(folder), {name: place for place, name in enumerate(names)}
    for row, stem in enumerate(stems):
        file = root / "Annotations" / f"{stem}.xml"
        annotation = parse(file)
        objects = []
        for found in annotation.iter("object"):
            left, top, right, bottom = (
                number(found, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            # VOC counts pixels from 1, and the last one belongs to the box.
            objects.append(
                {
                    "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],
                    "category": places[text(found, "name", file)],
                    "iscrowd": (found.findtext("difficult") or "0").strip() == "1",
                }
            )
        yield {
            "image": {"bytes": None, "path": str(picture(root, stem, annotation))},
            "image_id": row,
            "width": integer(annotation.findtext("size/width")),
            "height": integer(annotation.findtext("size/height")),
            "objects": objects,
        }


def picture(root: Path, stem: str, annotation: ElementTree.Element) -> Path:
    """The image of an annotation: of its own name, or of the name that it states, in JPEGImages."""
    places = [root / "JPEGImages" / f"{stem}{extension}" for extension in EXTENSIONS]
    stated = root / "JPEGImages" / (annotation.findtext("filename") or f"{stem}.jpg").strip()
    return next((place for place in places if place.is_file()), stated)


def integer(value: str | None) -> int | None:
    """A whole number; None where there is none, or 0, as some tools write sizes they do not know."""
    return int(value) if value and value.strip().isdecimal() and int(value) > 0 else None
