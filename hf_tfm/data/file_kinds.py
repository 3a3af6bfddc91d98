"""Supported kinds of data files, by file name, and diagnosis of files that cannot be read.

name -> kind, the name of a builder of `datasets`; bytes -> None or the first problem, with its location
"""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow.ipc
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
ARRAY = ".npy"  # of video frames (T, N, H, W), as in the public test file of Moving MNIST
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXT_KINDS = ("csv", "json", "text")
READ = f"{', '.join(KINDS)}, also compressed: {', '.join(COMPRESSED)}"
LOOKED_AT = 1 << 30  # maximum number of bytes of a file that are searched for the cause of an error


def kind_of(file: str | os.PathLike) -> str | None:
    """Return the builder for a file, by its extension in any case; None if the extension is not supported."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def usual_name(file: str | os.PathLike) -> bool:
    """Return whether a file's extensions are in lower case, the only form `datasets` recognises."""
    ends = "".join(Path(file).suffixes[-2:])
    return ends == ends.lower()


def problem(files: Iterable[str]) -> str | None:
    """Return the first problem of local files, with file and location; None if none is found."""
    for file in files:
        if kind_of(file) is None and Path(file).suffix.lower() != ".zip":
            continue
        try:
            if found := problem_of(file):
                return found
        except (OSError, EOFError, lzma.LZMAError) as error:
            return f"{file} cannot be read: {first_line(error)}"
    return None


def problem_of(file: str) -> str | None:
    """Return the first problem of one file of a supported kind."""
    if not os.path.getsize(file):
        return f"{file} is empty (0 bytes)"
    kind = kind_of(file)
    if kind == "parquet":
        try:
            pyarrow.parquet.ParquetFile(file).metadata  # noqa: B018 reading it is the test
        except Exception as error:
            return f"{file} is not a Parquet file: {first_line(error)}"
    if kind == "arrow" and Path(file).suffix.lower() not in COMPRESSED:
        return arrow_problem(file)
    if Path(file).suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # of zipfile and of the libraries that decompress
            return f"{file} is not a zip file, or a damaged one: {first_line(error)}"
        return damaged and f"{file} is damaged: its member {damaged} cannot be read"
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


def arrow_problem(file: str) -> str | None:
    """Return the first problem of an Arrow file, in either of its two formats."""
    with open(file, "rb") as stream:
        whole = stream.read(6) == b"ARROW1"
        stream.seek(0)
        try:
            if whole:
                reader = pyarrow.ipc.open_file(stream)
                for number in range(reader.num_record_batches):
                    reader.get_batch(number)
            else:
                for _ in pyarrow.ipc.open_stream(stream):
                    pass
        except Exception as error:
            return f"{file} is not an Arrow file, or a damaged one: {first_line(error)}"
    return None


def json_problem(file: str, text: str) -> str | None:
    """Return the first problem of a JSON list of objects, or of JSON lines."""
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
                return f'{where}, column "{column}" contains an unpaired surrogate, which is not a character'
            if value is None:
                continue
            kind = kind_in_words(value)
            if kinds.setdefault(column, kind) != kind:
                return f'{where}, column "{column}" holds {kind}, but earlier rows hold {kinds[column]}'
    return None


def encodable(value) -> bool:
    """Return whether all text in a value can be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_in_words(value) -> str:
    """Return the name of a JSON value's type, for error messages."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return {str: "text", list: "a list", dict: "an object"}[type(value)]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
