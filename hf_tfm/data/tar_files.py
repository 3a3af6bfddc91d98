"""WebDataset tar files: `datasets`' reader, with plain columns, and entered at any part of a local file.

    000001.jpg, 000001.cls, 000001.json, 000002.jpg, ... -> jpg, label, the fields of the JSON file

A sample is the files of one name, which are neighbours. Of a local file that is not compressed, the headers are read
once to find parts of `PART_SAMPLES` samples; a resumed run seeks its part instead of reading what comes before it.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from datasets import List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from .arrow_lists import subfields
from .categories import BOX_FIELDS, CATEGORY_FIELDS, OBJECTS
from .rebuilt import Rebuilt

PART_SAMPLES = 100
TAR = ".tar"
NUMBER, FIELDS, LABEL = "cls", "json", "label"  # extensions of a class number and of further fields; a column
LISTS = (*BOX_FIELDS, *CATEGORY_FIELDS, "area", "iscrowd")  # fields with an entry for each object


class TarFiles(Rebuilt, WebDataset):
    """`datasets`' WebDataset builder. Unless the features of the data set say otherwise, a class number is the column
    "label", and the fields of a JSON object are columns, those of the first samples; but its lists of boxes,
    categories and so on are the column "objects"."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        known = bool(self.info.features)
        splits = super()._split_generators(dl_manager)
        features = self.info.features
        if not known:
            if isinstance(kinds := features.get(FIELDS), dict):
                del features[FIELDS]
                if lists := object_lists(kinds):
                    kinds = {**{name: kind for name, kind in kinds.items() if name not in lists}, OBJECTS: lists}
                features.update({name: with_floats(kind) for name, kind in kinds.items() if name not in features})
            if NUMBER in features and LABEL not in features:
                features[LABEL] = features.pop(NUMBER)
        return splits

    def _generate_examples(self, tar_paths: list[str], tar_iterators: list[Any]) -> Iterator[tuple[Any, dict]]:
        features = self.info.features
        for key, example in super()._generate_examples(tar_paths, tar_iterators):
            if FIELDS not in features and isinstance(fields := example.pop(FIELDS, None), dict):
                if lists := object_lists(fields):
                    fields[OBJECTS] = {name: lists.get(name) or [] for name in features[OBJECTS]}
                example |= {name: fields[name] for name in features if example[name] is None and name in fields}
            if NUMBER not in features and (number := example.pop(NUMBER, None)) is not None:
                example[LABEL] = number
            yield key, {name: example[name] for name in features}

    def _generate_more_gen_kwargs(self, tar_paths: list[str], tar_iterators: list[Any]) -> Iterator[dict[str, list]]:
        for path, whole in zip(tar_paths, tar_iterators, strict=True):
            parts = list(parts_of(path)) if path.lower().endswith(TAR) and os.path.isfile(path) else [whole]
            for part in parts:
                yield {"tar_paths": [path], "tar_iterators": [part]}


def object_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object that are lists with an entry for each object; {} if none has boxes."""
    if not set(BOX_FIELDS) & fields.keys():
        return {}
    lists = {name: value for name, value in fields.items() if isinstance(value, list) or hasattr(value, "feature")}
    return {name: value for name, value in lists.items() if name in LISTS}


def with_floats(kind: Any) -> Any:
    """Return the type of objects with numbers of boxes that may be fractions, though those of the first are not."""
    fields = subfields(kind)
    if not set(BOX_FIELDS) & fields.keys():
        return kind
    changed = {
        **{name: List(Value("float64")) for name in fields.keys() & {*BOX_FIELDS}},
        **{name: Value("float64") for name in fields.keys() & {"area"}},
    }
    if isinstance(kind, Mapping):
        return {**kind, **{name: List(one) for name, one in changed.items()}}
    return List({**kind.feature, **changed})


@dataclass(frozen=True)
class TarPart:
    """(name, file) of each regular file in a part of a tar file, hidden ones left out.

    Args:
        path: of the tar file.
        start: first byte of the part.
        end: byte after it; None for the end of the file.
    """

    path: str
    start: int = 0
    end: int | None = None

    def members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Yield each file, and the archive that it can be read from until the next one."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if self.end is not None and member.offset >= self.end:
                        return
                    archive.members = []  # otherwise it keeps all
                    if member.isreg() and not os.path.basename(member.name).startswith((".", "__")):
                        yield archive, member
                if 0 < os.path.getsize(self.path) - archive.offset < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(f"{self.path} is cut off: its last header is incomplete")

    def __iter__(self) -> Iterator[tuple[str, BinaryIO | None]]:
        for archive, member in self.members():
            yield member.name, archive.extractfile(member)


def parts_of(path: str) -> Iterator[TarPart]:
    """Divide a tar file into parts of `PART_SAMPLES` samples, reading its headers alone.

    Raises:
        OSError: it cannot be read.
        tarfile.TarError: it is damaged.
    """
    start, count, last = 0, 0, None
    for _, member in TarPart(path).members():
        key = base_plus_ext(member.name)[0]
        if key is None or key == last:
            continue
        if count == PART_SAMPLES:
            yield TarPart(path, start, member.offset)
            start, count = member.offset, 0
        count, last = count + 1, key
    yield TarPart(path, start)
