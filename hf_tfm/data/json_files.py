"""JSON reading in which strings stay strings, including ISO dates.

Arrow's JSON reader converts a column of strings such as "2024-01-02" to timestamps, whose text cannot be restored.
`datasets`' builders call the readers defined here instead while they read for this package; other readers in the
process are not affected.
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
    """Call `pyarrow.json.read_json` on a seekable file, with strings instead of timestamps."""
    start = file.tell()
    table = pa_json.read_json(file, read_options)
    schema = pa.schema([field.with_type(text_for_times(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    file.seek(start)
    return pa_json.read_json(file, read_options, pa_json.ParseOptions(explicit_schema=schema))


def text_for_times(kind: pa.DataType) -> pa.DataType:
    """Replace timestamps by strings in an inferred type, at any depth."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(text_for_times(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(text_for_times(field.type)) for field in kind])
    return kind


class JsonReaders(threading.local):
    """Replaces `pyarrow.json` in `datasets`' modules; uses `read_json` above in threads in which ``own`` is set."""

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
    """Wrap `datasets`' function of this name, used for files that Arrow cannot read, to disable date detection."""
    return _by_pandas(file, **({"convert_dates": False} if READERS.own else {}), **options)


sys.modules[Json.__module__].pandas_read_json = pandas_read_json


def with_text(tables: Iterator[Any]) -> Iterator[Any]:
    """Yield what a `datasets` builder yields, reading strings instead of timestamps."""
    while True:
        READERS.own = True
        try:
            item = next(tables, None)
        finally:
            READERS.own = False  # the consumer of the table may read other files
        if item is None:
            return
        yield item


class JsonFiles(Rebuilt, Json):
    """`datasets`' JSON builder, with strings instead of timestamps."""

    def _generate_tables(self, *args: Any, **options: Any) -> Iterator[tuple[Any, pa.Table]]:
        return with_text(super()._generate_tables(*args, **options))
