"""The kinds of data files that are read, by their names, and why a file of a kind cannot be read.

name -> kind, the name of a builder of `datasets`; bytes -> None or the first thing that is wrong, with its place
"""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXT_KINDS = ("csv", "json", "text")
READ = f"{', '.join(KINDS)}, also compressed: {', '.join(COMPRESSED)}"
LOOKED_AT = 1 << 30  # bytes of a file, at most, in which the cause of an error is looked for


def kind_of(file: str | os.PathLike) -> str | None:
    """The builder that reads a file, by the end of its name in capitals or not; None of another file."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def usual_name(file: str | os.PathLike) -> bool:
    """Whether the end of a name is in the small letters by which `datasets` knows it."""
    ends = "".join(Path(file).suffixes[-2:])
    return ends == ends.lower()


def problem(files: Iterable[str]) -> str | None:
    """The first thing that is wrong with local files, with file and place; None where nothing is found."""
    for file in files:
        if kind_of(file) is None:
            continue
        try:
            if found := problem_of(file):
                return found
        except (OSError, EOFError, lzma.LZMAError) as error:
            return f"{file} cannot be read: {first_line(error)}"
    return None


def problem_of(file: str) -> str | None:
    """The first problem of one file of a known kind."""
    if not os.path.getsize(file):
        return f"{file} is empty (0 bytes)"
    kind = kind_of(file)
    if kind == "parquet":
        try:
            pyarrow.parquet.ParquetFile(file).metadata  # noqa: B018 reading it is the test
        except Exception as error:
            return f"{file} is not a Parquet file: {first_line(error)}"
    if kind not in TEXT_KINDS:
        return None
    with COMPRESSED.get(Path(file).suffix.lower(), open)(file, "rb") as stream:
        data = stream.read(LOOKED_AT)
    if not data:
        return f"{file} is empty"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return (
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}, line {line}; "
            "convert it to UTF-8, say with iconv"
        )
    return json_problem(file, text) if kind == "json" else None


def json_problem(file: str, text: str) -> str | None:
    """The first problem of a JSON list of objects, or of JSON lines."""
    if not text.strip():
        return f"{file} is empty"
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{file}, entry {place}", row) for place, row in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            return f"{file} is not JSON: {first_line(error)}"
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{file}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                return f"{file}, line {number} is not JSON: {first_line(error)}"
    kinds: dict[str, str] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            return f"{where}: an object with the columns is expected, got {row!r:.60}"
        for column, value in row.items():
            if "\\u" in text and not encodable(value):
                return f'{where}, column "{column}" holds half of a surrogate pair, which is no character'
            if value is None:
                continue
            kind = kind_in_words(value)
            if kinds.setdefault(column, kind) != kind:
                return f'{where}, column "{column}" holds {kind}, and rows before hold {kinds[column]}'
    return None


def encodable(value) -> bool:
    """Whether all text in a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_in_words(value) -> str:
    """The name of a JSON value's type, for errors."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return {str: "text", list: "a list", dict: "an object"}[type(value)]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return str(error).strip().split("\n")[0] or type(error).__name__
