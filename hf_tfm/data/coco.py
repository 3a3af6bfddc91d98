"""COCO's JSON files with their folders of images, as the columns `detection` and `panoptic` read.

    annotations/instances_<split>.json, panoptic_<split>.json + <split>/ or images/<split>/ or images/   COCO's own
    <split>/_annotations.coco.json beside the images                                                    Roboflow's

(Lin et al. 2014, arXiv:1405.0312.) Images stay where they are; their paths are stored.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value

from .annotation_folders import from_generator
from .run_lengths import FEATURE, run_lengths

log = logging.getLogger(__name__)

ROBOFLOW = "_annotations.coco.json"
KINDS = ("instances", "panoptic")
SEGMENT = {
    "id": Value("int64"),
    "category_id": Value("int64"),
    "area": Value("float32"),
    "iscrowd": Value("bool"),
}


def load_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON; the error names the file.
    """
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def coco_files(folder: Path) -> dict[str, dict[str, Path]]:
    """The JSON files of a folder, {split: {"instances" or "panoptic": file}}; {} if it is not one of COCO's kind."""
    found: dict[str, dict[str, Path]] = {}
    for kind in KINDS:
        for file in sorted(folder.glob(f"annotations/{kind}_*.json")):
            found.setdefault(file.stem.removeprefix(f"{kind}_"), {})[kind] = file
    for file in sorted(folder.glob(f"*/{ROBOFLOW}")):
        found.setdefault(file.parent.name, {})["instances"] = file
    return found


def split_names(names: list[str]) -> dict[str, str]:
    """What splits are called elsewhere: {"train2017": "train", "val2017": "validation", "valid": "validation"}.

    Where two would have the same name, all keep theirs.
    """
    usual = {}
    for name in names:
        stem = re.sub(r"[-_]?(19|20)\d\d$", "", name)
        usual[name] = {"val": "validation", "valid": "validation", "dev": "validation"}.get(stem, stem)
    return usual if len(set(usual.values())) == len(names) else {name: name for name in names}


def load_coco(folder: Path) -> datasets.DatasetDict:
    """Every split of a folder of COCO's kind.

    Returns:
        splits with ``image`` (a path), ``image_id``, ``width``, ``height``, and ``objects`` where there are instances,
        ``panoptic`` (a path) and ``segments_info`` where there are panoptic maps.

    Raises:
        ValueError: a file is not COCO's JSON, or names images that are nowhere, or categories it does not have.
    """
    files = coco_files(folder)
    usual = split_names(list(files))
    splits = datasets.DatasetDict()
    for split, kinds in files.items():
        names = [name for _, name in read_names(kinds["instances"])] if "instances" in kinds else None
        splits[usual[split]] = from_generator(
            read_split,
            features(names, "panoptic" in kinds),
            list(kinds.values()),
            usual[split],
            {
                "folder": str(folder.resolve()),
                "name": split,
                "files": {kind: str(file.resolve()) for kind, file in kinds.items()},
            },
        )
    return splits


def features(names: list[str] | None, panoptic: bool) -> Features:
    """The columns of a split, with objects of categories ``names``, with panoptic maps, or both."""
    columns: dict[str, Any] = {
        "image": Image(decode=False),
        "image_id": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
    }
    if names is not None:
        columns["objects"] = List(
            {
                "id": Value("int64"),
                "bbox": List(Value("float32"), length=4),
                "category": ClassLabel(names=names),
                "area": Value("float32"),
                "iscrowd": Value("bool"),
                "segmentation": FEATURE,
            }
        )
    if panoptic:
        columns |= {"panoptic": Image(decode=False), "segments_info": List(SEGMENT)}
    return Features(columns)


def read_names(file: Path) -> list[tuple[int, str]]:
    """Id and name of the categories of instances, by ascending id.

    Raises:
        ValueError: the file has none, or two have the same id or name.
    """
    categories = entries(load_json(file), "categories", file)
    pairs = sorted((field(c, "id", file), str(field(c, "name", file))) for c in categories)
    for values in zip(*pairs, strict=True):
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{file} has {twice[0]!r} for two categories")
    return pairs


def entries(content: Any, key: str, file: Path) -> list[dict[str, Any]]:
    """One of the lists of a COCO file.

    Raises:
        ValueError: there is none.
    """
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f'{file} has no list "{key}", as COCO\'s JSON has')
    return value


def field(entry: dict[str, Any], key: str, file: Path) -> Any:
    """``entry[key]``.

    Raises:
        ValueError: there is none; the error names the file and the entry.
    """
    if key not in entry:
        shown = {k: v for k, v in entry.items() if k != "segmentation"}
        raise ValueError(f'{file} has an entry without "{key}": {shown}')
    return entry[key]


def read_split(folder: str, name: str, files: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a split."""
    paths = {kind: Path(file) for kind, file in files.items()}
    contents = {kind: load_json(file) for kind, file in paths.items()}
    first = next(iter(paths))
    pictures = entries(contents[first], "images", paths[first])
    if not pictures:
        raise ValueError(f"{paths[first]} has no images")
    place = image_folder(Path(folder), name, paths[first], str(field(pictures[0], "file_name", paths[first])))
    objects = read_objects(contents["instances"], paths["instances"], pictures) if "instances" in paths else None
    maps = read_maps(contents["panoptic"], paths["panoptic"]) if "panoptic" in paths else None
    for number, picture in enumerate(pictures):
        key = field(picture, "id", paths[first])
        row = {
            "image": {"bytes": None, "path": str(place / field(picture, "file_name", paths[first]))},
            "image_id": int(key) if str(key).isdecimal() else number,
            "width": picture.get("width"),
            "height": picture.get("height"),
        }
        if objects is not None:
            row["objects"] = objects.get(key, [])
        if maps is not None:
            row |= maps.get(key, {"panoptic": None, "segments_info": []})
        yield row


def image_folder(folder: Path, split: str, file: Path, picture: str) -> Path:
    """Where the images of a JSON file lie.

    Raises:
        ValueError: nowhere; the error names the places.
    """
    places = [folder / split, folder / "images" / split, folder / "images", folder, file.parent / split, file.parent]
    for place in places:
        if (place / picture).is_file():
            return place
    raise ValueError(f"{file} names {picture}, which is in none of {', '.join(map(str, dict.fromkeys(places)))}")


def read_objects(content: Any, file: Path, pictures: list[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """The objects of each image, by its id in the file.

    Raises:
        ValueError: a category is not one of the file's, or an annotation lacks a field.
    """
    places = {key: place for place, (key, _) in enumerate(read_names(file))}
    sizes = {picture["id"]: (picture.get("height") or 0, picture.get("width") or 0) for picture in pictures}
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    strays = 0
    for number, annotation in enumerate(entries(content, "annotations", file)):
        key, category = field(annotation, "image_id", file), field(annotation, "category_id", file)
        if category not in places:
            raise ValueError(f"{file} has category_id {category}, which is not one of its {len(places)} categories")
        if key not in sizes:
            strays += 1
            continue
        outline = None
        if min(sizes[key]):
            try:
                outline = run_lengths(annotation.get("segmentation"), *sizes[key])
            except ValueError as error:
                raise ValueError(f"{file}, annotation {annotation.get('id', number)}: {error}") from error
        objects[key].append(
            {
                "id": annotation.get("id", number),
                "bbox": field(annotation, "bbox", file),
                "category": places[category],
                "area": annotation.get("area"),
                "iscrowd": bool(annotation.get("iscrowd", 0)),
                "segmentation": outline,
            }
        )
    if strays:
        log.warning("%s: %d annotations of images that it does not list are left out", file, strays)
    return objects


def read_maps(content: Any, file: Path) -> dict[Any, dict[str, Any]]:
    """Panoptic map and segments of each image, by its id in the file.

    Raises:
        ValueError: the maps are nowhere, or an annotation lacks a field.
    """
    annotations = entries(content, "annotations", file)
    if not annotations:
        return {}
    place = image_folder(file.parent.parent, file.stem, file, str(field(annotations[0], "file_name", file)))
    return {
        field(annotation, "image_id", file): {
            "panoptic": {"bytes": None, "path": str(place / field(annotation, "file_name", file))},
            "segments_info": [
                {
                    "id": field(segment, "id", file),
                    "category_id": field(segment, "category_id", file),
                    "area": segment.get("area"),
                    "iscrowd": bool(segment.get("iscrowd", 0)),
                }
                for segment in entries(annotation, "segments_info", file)
            ],
        }
        for annotation in annotations
    }
