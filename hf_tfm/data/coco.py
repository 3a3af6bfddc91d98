"""COCO's JSON files with their image folders, converted to the columns that `detection` and `panoptic` read.

    annotations/instances_<split>.json, panoptic_<split>.json + <split>/ or images/<split>/ or images/   COCO's own
    <split>/_annotations.coco.json next to the images                                                    Roboflow's

(Lin et al. 2014, arXiv:1405.0312.) Images stay where they are; only their paths are stored.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value

from .annotation_folders import Count, from_generator, note
from .fields import Entry, as_int64, identity, load_json, shown, twice
from .files import inside, joined
from .image_sizes import image_size
from .run_lengths import FEATURE, MAX_SIDE, run_lengths

ROBOFLOW = "_annotations.coco.json"
KINDS = ("instances", "panoptic")
SEGMENT = {
    "id": Value("int64"),
    "category_id": Value("int64"),
    "area": Value("float32"),
    "iscrowd": Value("bool"),
}
LARGEST_SEGMENT = 2**24 - 1  # id of a white pixel


def coco_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Return a folder's JSON files, {split: {"instances" or "panoptic": file}}; {} if it is not a COCO folder."""
    found: dict[str, dict[str, Path]] = {}
    for kind in KINDS:
        for file in sorted(folder.glob(f"annotations/{kind}_*.json")):
            found.setdefault(file.stem.removeprefix(f"{kind}_"), {})[kind] = file
    for file in sorted(folder.glob(f"*/{ROBOFLOW}")):
        found.setdefault(file.parent.name, {})["instances"] = file
    return found


def split_names(names: list[str]) -> dict[str, str]:
    """Map split names to the usual ones: {"train2017": "train", "val2017": "validation", "valid": "validation"}.

    If two names would become equal, all names are kept.
    """
    usual = {}
    for name in names:
        stem = re.sub(r"[-_]?(19|20)\d\d$", "", name)
        usual[name] = {"val": "validation", "valid": "validation", "dev": "validation"}.get(stem, stem)
    return usual if len(set(usual.values())) == len(names) else {name: name for name in names}


def load_coco(folder: Path) -> datasets.DatasetDict:
    """Load every split of a COCO folder.

    Ids are compared as strings, so that an annotation of image "7" belongs to image 7. A malformed outline is treated
    as missing and counted in the log; its box is kept.

    Returns:
        Splits with ``image`` (a path), ``image_id``, ``width``, ``height``, ``objects`` if there are instances, and
        ``panoptic`` (a path) and ``segments_info`` if there are panoptic maps.

    Raises:
        ValueError: if a file is not COCO JSON, two entries share an id, a field has an invalid value, a category is
            not listed, or a path leaves the folder; the message names file, entry and value.
    """
    files = coco_files(folder)
    usual = split_names(list(files))
    splits = datasets.DatasetDict()
    for split, kinds in files.items():
        file = kinds.get("instances")
        names = None if file is None else [name for _, name in read_names(load_json(file), file)]
        splits[usual[split]] = from_generator(
            read_split,
            features(names, "panoptic" in kinds),
            list(kinds.values()),
            usual[split],
            {
                "folder": os.path.abspath(folder),
                "name": split,
                "files": {kind: os.path.abspath(file) for kind, file in kinds.items()},
            },
        )
    return splits


def features(names: list[str] | None, panoptic: bool) -> Features:
    """Return the features of a split, with objects of categories ``names``, with panoptic maps, or with both."""
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


def entries(content: Any, key: str, file: Path, name: str) -> list[Entry]:
    """Return the entries of a list in a COCO file.

    Args:
        name: what an entry is called in error messages.

    Raises:
        ValueError: if there is no such list.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
        raise ValueError(f'{file} has no list "{key}", as COCO\'s JSON has')
    return Entry(content, file, "the file").entries(key, name)


def identities(found: list[Entry], file: Path, name: str) -> list[str]:
    """Return the ids of entries.

    Raises:
        ValueError: if two entries share an id.
    """
    ids = [entry.identity("id") for entry in found]
    if (again := twice(ids)) is not None:
        raise ValueError(f"{file} has two {name} with id {again}")
    return ids


def read_names(content: Any, file: Path) -> list[tuple[str, str]]:
    """Return (id as string, name) of the instance categories, sorted by id.

    Raises:
        ValueError: if the file has none, or two share an id or a name.
    """
    categories = entries(content, "categories", file, "category")
    ids = identities(categories, file, "categories")
    names = [category.text("name") for category in categories]
    if (again := twice(names)) is not None:
        raise ValueError(f'{file} has two categories with name "{again}"')
    whole = [as_int64(key) for key in ids]
    order = sorted(range(len(ids)), key=ids.__getitem__ if None in whole else whole.__getitem__)
    return [(ids[i], names[i]) for i in order]


def read_split(folder: str, name: str, files: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split."""
    paths = {kind: Path(file) for kind, file in files.items()}
    contents = {kind: load_json(file) for kind, file in paths.items()}
    first = next(iter(paths))
    pictures = entries(contents[first], "images", paths[first], "image")
    if not pictures:
        raise ValueError(f"{paths[first]} has no images")
    keys = identities(pictures, paths[first], "images")
    images = locate(pictures, Path(folder), name, paths[first])
    if again := len(images) - len(set(images)):
        note(f"{paths[first]}: {again} images have the file_name of another (first {twice(images)})")
    sizes = {key: stated_size(picture) for key, picture in zip(keys, pictures, strict=True)}
    objects = None
    if "instances" in paths:
        objects = read_objects(contents["instances"], paths["instances"], sizes, dict(zip(keys, images, strict=True)))
    maps = read_maps(contents["panoptic"], paths["panoptic"], Path(folder), sizes) if "panoptic" in paths else None
    # The id column holds integers: if some ids are not integers, as some tools write them, image numbers replace them.
    whole = [as_int64(key) for key in keys]
    numbered = None not in whole
    for number, (key, path) in enumerate(zip(keys, images, strict=True)):
        height, width = sizes[key]
        row = {
            "image": {"bytes": None, "path": path},
            "image_id": whole[number] if numbered else number,
            "width": width,
            "height": height,
        }
        if objects is not None:
            row["objects"] = objects.get(key, [])
        if maps is not None:
            row |= maps.get(key, {"panoptic": None, "segments_info": []})
        yield row


def stated_size(picture: Entry) -> tuple[int | None, int | None]:
    """Return the stated height and width; None if missing or 0, which tools write for unknown values."""
    height, width = (picture.integer(key, None, least=0, most=MAX_SIDE) or None for key in ("height", "width"))
    return height, width


def locate(named: list[Entry], folder: Path, split: str, file: Path) -> list[str]:
    """Return the paths of the images or maps that entries name, in the folder that contains the first one found.

    Args:
        folder: folder of the data set.
        split: name of the image folder.
        file: file that contains the entries.

    Raises:
        ValueError: if a path leaves the data set or none of the files exists; the message lists the folders tried.
    """
    folders = [folder / split, folder / "images" / split, folder / "images", folder, file.parent / split, file.parent]
    folders = list(dict.fromkeys(folders))
    names = [entry.text("file_name") for entry in named]
    place = next((p for n in names for p in folders if os.path.isfile(joined(p, n))), None)
    paths = [
        inside(folder, name, f"{file}, {entry.name}", place or folders[0])
        for name, entry in zip(names, named, strict=True)
    ]
    if place is not None:
        return paths
    raise ValueError(f"{file} names {names[0]}, which is in none of {', '.join(map(str, folders))}")


def read_objects(
    content: Any, file: Path, sizes: Mapping[str, tuple[int | None, int | None]], images: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the objects of each image, by image id as string.

    Args:
        sizes: stated height and width of the images, by id as string.
        images: paths of the images, whose headers are read if a size is not stated.

    Raises:
        ValueError: see `load_coco`.
    """
    indices = {key: place for place, (key, _) in enumerate(read_names(content, file))}
    annotations = entries(content, "annotations", file, "annotation")
    identities([entry for entry in annotations if "id" in entry.values], file, "annotations")
    objects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    strays, odd = Count(), Count()
    for number, annotation in enumerate(annotations):
        key, category = annotation.identity("image_id"), annotation.identity("category_id")
        if category not in indices:
            raise ValueError(
                f"{file}, {annotation.name} has category_id {category}, which is not one of its {len(indices)} "
                "categories"
            )
        if key not in sizes:
            strays.add(f"{annotation.name}, of image {key}")
            continue
        outline = annotation.values.get("segmentation")
        try:
            size = sizes[key] if not outline or all(sizes[key]) else image_size(images[key])
            outline = run_lengths(outline, *size) if all(size) else None
        except ValueError as error:
            outline = odd.add(f"{annotation.name}: {error}")
        own = as_int64(identity(annotation.values.get("id")) or "")
        objects[key].append(
            {
                "id": number if own is None else own,
                "bbox": annotation.box("bbox"),
                "category": indices[category],
                "area": annotation.number("area", None),
                "iscrowd": annotation.flag("iscrowd", False),
                "segmentation": outline,
            }
        )
    if strays.number:
        note(
            f"{file}: {strays.number} annotations of images that it does not list are left out (first {strays.first})"
        )
    if odd.number:
        note(f"{file}: {odd.number} malformed outlines are left out, their boxes are kept (first {odd.first})")
    return objects


def read_maps(content: Any, file: Path, folder: Path, images: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the panoptic map and segments of each image, by image id as string.

    Args:
        folder: folder of the data set.
        images: ids of the images as strings.

    Raises:
        ValueError: if no map is found, two maps belong to one image, two segments of a map share an id, or see
            `load_coco`.
    """
    annotations = [
        Entry(entry.values, file, f"annotation of image {shown(entry.values.get('image_id'))}")
        for entry in entries(content, "annotations", file, "annotation")
    ]
    keys = [annotation.identity("image_id") for annotation in annotations]
    if (again := twice(keys)) is not None:
        raise ValueError(f"{file} has two annotations of image {again}")
    if not annotations:
        return {}
    paths = locate(annotations, folder, file.stem, file)
    if strays := [key for key in keys if key not in images]:
        note(f"{file}: {len(strays)} maps of images that it does not list are left out (first of image {strays[0]})")
    return {
        key: {
            "panoptic": {"bytes": None, "path": path},
            "segments_info": read_segments(annotation, file),
        }
        for key, path, annotation in zip(keys, paths, annotations, strict=True)
    }


def read_segments(annotation: Entry, file: Path) -> list[dict[str, Any]]:
    """Return the segments of a panoptic map.

    Raises:
        ValueError: if two segments share an id, or a field has an invalid value.
    """
    segments = [
        Entry(segment.values, file, f"{annotation.name}, {segment.name}")
        for segment in annotation.entries("segments_info", "segment")
    ]
    found = [
        {
            "id": segment.integer("id", least=1, most=LARGEST_SEGMENT),
            "category_id": segment.integer("category_id"),
            "area": segment.number("area", None),
            "iscrowd": segment.flag("iscrowd", False),
        }
        for segment in segments
    ]
    if (again := twice([segment["id"] for segment in found])) is not None:
        raise ValueError(f"{file}, {annotation.name} has two segments with id {again}")
    return found
