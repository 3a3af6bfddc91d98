"""Pascal VOC folders, converted to the columns that `detection` reads.

    Annotations/<image>.xml + JPEGImages/<image>.jpg + ImageSets/Main/<split>.txt

(Everingham et al. 2010, doi:10.1007/s11263-009-0275-4.) Images stay where they are; only their paths are stored.
"""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value

from .annotation_folders import from_generator
from .fields import as_int64, flag, shown, twice
from .files import inside, read_bytes, read_text
from .run_lengths import MAX_SIDE

SPLITS = {"train": "train", "val": "validation", "trainval": "trainval", "test": "test"}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
FLAGGED = re.compile(r"(?P<name>.*\S)\s+(-1|0|1)")  # a line in the list of a single class; 1 if the image contains it


def is_voc(folder: Path) -> bool:
    """Return whether a folder is in Pascal VOC format."""
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def load_voc(folder: Path) -> datasets.DatasetDict:
    """Load every split of a VOC folder; all images are "train" if ImageSets/Main has no lists.

    Each line of a list names an image. The name may contain spaces, end in an extension, or be followed by 1, 0 or -1
    as in the lists of single classes; that number is ignored.

    Objects marked as difficult get ``iscrowd``: VOC neither requires them nor counts their detection as false
    positives, which is how COCO treats crowds.

    Returns:
        Splits with ``image`` (a path), ``image_id``, ``width``, ``height`` and ``objects``. Categories are all that
        occur in the folder, in alphabetical order.

    Raises:
        ValueError: if an annotation is missing or not VOC XML, a list contains an image twice, or a path leaves the
            folder.
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
    stems = {split: listed(file, folder) for split, file in lists.items()}
    stems = stems or {"train": [file.stem for file in every]}
    for split, chosen in stems.items():
        if not chosen:
            raise ValueError(f"{lists[split]} names no image")
    # A changed XML file does not change the lists, so the cache depends on all XML files as well.
    files = [*lists.values(), *every]
    splits = datasets.DatasetDict()
    for split, chosen in stems.items():
        options = {"folder": os.path.abspath(folder), "stems": tuple(chosen), "names": tuple(names)}
        splits[split] = from_generator(read_split, features, files, split, options)
    return splits


def listed(file: Path, folder: Path) -> list[str]:
    """Return the images of a list, by the names of their annotations.

    Raises:
        ValueError: if it cannot be read, contains an image twice, or names one outside the folder.
    """
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    stems = [stem_of(line, folder, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
    if (again := twice(stems)) is not None:
        raise ValueError(f"{file} names {again} twice")
    return stems


def stem_of(line: str, folder: Path, source: str) -> str:
    """Return the annotation name that a line of a list refers to; the line itself if no such file exists."""
    flagged = FLAGGED.fullmatch(line)
    for name in (line, flagged["name"] if flagged else line):
        stem, extension = os.path.splitext(name)
        for found in (name, stem if extension.lower() in (*EXTENSIONS, ".xml") else name):
            if os.path.isfile(inside(folder, f"Annotations/{found}.xml", source)):
                return found
    return line


def parse(file: Path) -> ElementTree.Element:
    """Return the root element of an annotation.

    Raises:
        ValueError: if the file is missing or not valid XML.
    """
    try:
        return ElementTree.fromstring(read_bytes(file))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise ValueError(f"{file} cannot be read: {error}") from error


def text(element: ElementTree.Element, path: str, file: Path) -> str:
    """Return the text at a path of an annotation.

    Raises:
        ValueError: if it is missing or empty.
    """
    value = (element.findtext(path) or "").strip()
    if not value:
        raise ValueError(f"{file} has no {path} in <{element.tag}>, as VOC's annotations have")
    return value


def number(element: ElementTree.Element, path: str, file: Path) -> float:
    """Return the number at a path of an annotation.

    Raises:
        ValueError: if there is none.
    """
    value = text(element, path, file)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f'{file} must have a number as {path}, got "{value}"') from None


def is_difficult(element: ElementTree.Element, file: Path) -> bool:
    """Return whether an object is marked as difficult.

    Raises:
        ValueError: if the mark is neither true nor false.
    """
    value = (element.findtext("difficult") or "0").strip()
    found = flag(value)
    if found is None:
        raise ValueError(f"{file} must have 0 or 1 as difficult, got {shown(value)}")
    return found


def object_names(file: Path) -> list[str]:
    """Return the category names of an annotation's objects."""
    return [text(found, "name", file) for found in parse(file).iter("object")]


def read_split(folder: str, stems: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split."""
    root, indices = Path(folder), {name: place for place, name in enumerate(names)}
    for row, stem in enumerate(stems):
        file = root / "Annotations" / f"{stem}.xml"
        annotation = parse(file)
        objects = []
        for found in annotation.iter("object"):
            left, top, right, bottom = (
                number(found, f"bndbox/{edge}", file) for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            # VOC counts pixels from 1, and the last pixel is part of the box.
            objects.append(
                {
                    "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],
                    "category": indices[text(found, "name", file)],
                    "iscrowd": is_difficult(found, file),
                }
            )
        yield {
            "image": {"bytes": None, "path": picture(root, stem, annotation, file)},
            "image_id": row,
            "width": side(annotation, "size/width"),
            "height": side(annotation, "size/height"),
            "objects": objects,
        }


def picture(root: Path, stem: str, annotation: ElementTree.Element, file: Path) -> str:
    """Return the image path of an annotation: the image with the annotation's name, or the stated one, in JPEGImages.

    Raises:
        ValueError: if the stated name is outside the folder.
    """
    stated = (annotation.findtext("filename") or f"{stem}.jpg").strip()
    stated = inside(root, stated, f"{file}, filename", root / "JPEGImages")
    paths = [inside(root, f"JPEGImages/{stem}{extension}", str(file)) for extension in EXTENSIONS]
    return next((place for place in paths if os.path.isfile(place)), stated)


def side(annotation: ElementTree.Element, path: str) -> int | None:
    """Return the height or width of the image; None if missing or 0, which some tools write for unknown sizes."""
    value = as_int64((annotation.findtext(path) or "").strip())
    return value if value is not None and 1 <= value <= MAX_SIDE else None
