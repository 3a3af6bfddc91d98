"""JSON files in which text stays text: dates in ISO form too.

Arrow's reader of JSON takes a column of text such as "2024-01-02" for one of times, whose text cannot be had back.
Builders of `datasets` call the readers here instead, while they read for this package; other readers of the process
are as they were.
"""

import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import pandas
import pyarrow as pa
import pyarrow.json as pa_json
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.json.json import Json

from .rebuilt import Rebuilt


def read_json(file: BinaryIO, read_options: pa_json.ReadOptions | None = None) -> pa.Table:
    """`pyarrow.json.read_json` of a file that can be read twice, with text for times."""
    start = file.tell()
    table = pa_json.read_json(file, read_options)
    schema = pa.schema([field.with_type(text_for_times(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    file.seek(start)
    return pa_json.read_json(file, read_options, pa_json.ParseOptions(explicit_schema=schema))


def text_for_times(kind: pa.DataType) -> pa.DataType:
    """An inferred type with strings in the place of times, at any depth."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(text_for_times(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(text_for_times(field.type)) for field in kind])
    return kind


class JsonReaders(threading.local):
    """Replaces `pyarrow.json` in modules of `datasets`; while ``own`` is set, in this thread, it is `read_json`."""

    own = False

    def read_json(self, *args: Any, **options: Any) -> pa.Table:
        return (read_json if self.own else pa_json.read_json)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(pa_json, name)


READERS = JsonReaders()
for _builder in (Json, FolderBasedBuilder):
    sys.modules[_builder.__module__].paj = READERS
_by_pandas = sys.modules[Json.__module__].pandas_read_json


def pandas_read_json(file: Any, **options: Any) -> pandas.DataFrame:
    """`datasets`' function of this name, for files that Arrow does not read, without a search for dates."""
    return _by_pandas(file, **({"convert_dates": False} if READERS.own else {}), **options)


sys.modules[Json.__module__].pandas_read_json = pandas_read_json


def with_text(tables: Iterator[Any]) -> Iterator[Any]:
    """What a builder of `datasets` reads, with text for times."""
    while True:
        READERS.own = True
        try:
            item = next(tables, None)
        finally:
            READERS.own = False  # whoever takes the table may read other files
        if item is None:
            return
        yield item


class JsonFiles(Rebuilt, Json):
    """`datasets`' builder of JSON, which takes no text for times."""

    def _generate_tables(self, *args: Any, **options: Any) -> Iterator[tuple[Any, pa.Table]]:
        return with_text(super()._generate_tables(*args, **options))
