"""Lossless reading of CSV and TSV files: text stays text, only an empty field is missing, no row or digit is lost.

files -> fields as text -> columns of integers or decimals if the conversion is lossless -> Arrow tables

pandas, which `datasets` uses to read CSV, treats "NA", "None" and "null" as missing values, reads "01" as 1, and uses
the first of too many fields as an index.
"""

import csv
import gzip
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from datasets import Features, Value
from datasets.builder import Key
from datasets.download.streaming_download_manager import StreamingDownloadManager
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.table import table_cast

from .rebuilt import COMMON, Rebuilt, stated_options

log = logging.getLogger(__name__)

BLOCK = 32 << 20  # bytes of a file that are parsed at once; also the maximum length of a row
# Numbers written the way Python writes them, so that their text can be restored.
WHOLE = r"^(?:0|-?[1-9]\d{0,17})$"
DECIMAL = r"^-?(?:0|[1-9]\d{0,8})\.(?:0|\d{0,5}[1-9])$"
TINY = r"^-?0\.0000"  # Python writes these as 1e-05
PARSED = {"sep", "delimiter", "quotechar", "doublequote", "escapechar", "names", "column_names", "encoding"}


class CsvFiles(Rebuilt, Csv):
    """`datasets`' CSV builder with a lossless reader; options that the reader does not support are left to pandas."""

    @classmethod
    def like(cls, builder: Csv, **options: Any) -> "CsvFiles":
        """See `Rebuilt`."""
        found = super().like(builder, **options)
        if not stated_options(builder).keys() & {"na_values", "keep_default_na", "na_filter"}:
            found.config.na_values, found.config.keep_default_na = [""], False
        return found

    def by_pandas(self) -> bool:
        """Return whether an option is set that only pandas supports."""
        usual, own = CsvConfig(), PARSED | COMMON | {"na_values", "keep_default_na", "chunksize"}
        return len(self.config.sep) != 1 or any(
            getattr(self.config, f.name) != getattr(usual, f.name) for f in fields(CsvConfig) if f.name not in own
        )

    def _split_generators(self, dl_manager):
        generators = super()._split_generators(dl_manager)
        if self.by_pandas():
            return generators
        for generator in generators:
            paths = [path for paths in generator.gen_kwargs["files_iterables"] for path in paths]
            generator.gen_kwargs["files_iterables"] = [[path] for path in paths]
            if len(generator.gen_kwargs["base_files"]) != len(paths):
                generator.gen_kwargs["base_files"] = paths
        if self.info.features is None:
            files = [(g.gen_kwargs["base_files"], g.gen_kwargs["files_iterables"]) for g in generators]
            self.info.features = self.find_features(files, isinstance(dl_manager, StreamingDownloadManager))
        return generators

    def find_features(self, splits: Iterable[tuple[list[str], list[list[str]]]], streaming: bool) -> Features:
        """Infer the columns of all splits: numeric if every field is a number; for a stream, all columns are strings.

        Raises:
            ValueError: if the files of a split have different columns.
        """
        kinds: dict[str, set[str]] = {}
        for named, paths in splits:
            first: list[str] = []
            for name, (path,) in zip(named, paths, strict=True):
                columns = self.columns(path, name)
                first = first or columns
                if set(columns) != set(first):
                    odd = ", ".join(sorted(set(columns) ^ set(first)))
                    raise ValueError(f"{name} and {named[0]} belong to one split but have different columns: {odd}")
                for column in columns:
                    kinds.setdefault(column, {"int64", "float64"})
                if not streaming:
                    for table in self.read(path, name):
                        for column in table.column_names:
                            kinds[column] &= number_kinds(table[column])
        chosen = {column: "string" if streaming else min(found, default="string") for column, found in kinds.items()}
        chosen = {column: "int64" if kinds[column] == {"int64"} else kind for column, kind in chosen.items()}
        # A column without any value would fit both numeric types.
        return Features(
            {column: Value("string" if len(kinds[column]) == 2 else kind) for column, kind in chosen.items()}
        )

    def columns(self, path: str, name: str) -> list[str]:
        """Return the column names of a file.

        Raises:
            ValueError: if the file is empty, or two columns share a name.
        """
        if self.config.names:
            return list(self.config.names)
        with open_text(path, self.config.encoding) as file:
            reader = csv.reader(file, **self.dialect(name))
            names = next((row for row in reader if row), None)
        if names is None:
            raise ValueError(f"{name} is empty")
        if twice := sorted({column for column in names if column and names.count(column) > 1}):
            raise ValueError(f'{name} has two columns called "{twice[0]}"')
        return [column or f"Unnamed: {place}" for place, column in enumerate(names)]

    def dialect(self, name: str) -> dict[str, Any]:
        """Return the dialect for Python's csv reader."""
        return {
            "delimiter": self.separator(name),
            "quotechar": self.config.quotechar,
            "doublequote": self.config.doublequote,
            "escapechar": self.config.escapechar,
        }

    def separator(self, name: str) -> str:
        """Return the configured separator; by default, a tab for .tsv files."""
        return "\t" if self.config.sep == "," and ".tsv" in name.lower().rsplit("/", 1)[-1] else self.config.sep

    def read(self, path: str, name: str) -> Iterator[pa.Table]:
        """Yield tables of strings with the rows of a file.

        Raises:
            ValueError: if a row has too many or too few fields, or the text is not in the file's encoding.
        """
        columns = self.columns(path, name)
        row_problem: list[str] = []

        def wrong(row: pa_csv.InvalidRow) -> str:
            where = "" if row.number is None else f", row {row.number - (1 if self.config.names else 2)}"
            row_problem.append(
                f"{name}{where}: {row.expected_columns} fields expected, got {row.actual_columns}: {row.text[:80]!r}"
            )
            return "error"

        with open(path, "rb") as file:
            try:
                reader = pa_csv.open_csv(
                    file,
                    pa_csv.ReadOptions(
                        use_threads=False,  # needed for row numbers in errors
                        block_size=BLOCK,
                        column_names=columns,
                        skip_rows_after_names=0 if self.config.names else 1,
                        encoding=self.config.encoding or "utf8",
                    ),
                    pa_csv.ParseOptions(
                        delimiter=self.separator(name),
                        quote_char=self.config.quotechar or False,
                        double_quote=self.config.doublequote,
                        escape_char=self.config.escapechar or False,
                        newlines_in_values=True,
                        invalid_row_handler=wrong,
                    ),
                    pa_csv.ConvertOptions(
                        column_types=dict.fromkeys(columns, pa.string()),
                        null_values=[""],
                        strings_can_be_null=True,
                    ),
                )
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            except pa.ArrowInvalid as error:
                if row_problem:
                    raise ValueError(row_problem[0]) from None
                if "Empty CSV file" in str(error):  # only a header
                    return
                raise ValueError(f"{name} cannot be read as CSV: {error}") from error

    def _generate_tables(self, base_files, files_iterables):
        if self.by_pandas():
            yield from super()._generate_tables(base_files, files_iterables)
            return
        schema = self.info.features.arrow_schema
        for shard, (name, (path,)) in enumerate(zip(base_files, files_iterables, strict=True)):
            odd, first = 0, ""
            for number, table in enumerate(self.read(path, name)):
                count, column = null_bytes(table)
                odd, first = odd + count, first or column
                for column in schema.names:
                    if column not in table.column_names:
                        table = table.append_column(column, pa.nulls(len(table), pa.string()))
                yield Key(shard, number), table_cast(table.select(schema.names), schema)
            if odd:
                log.warning(
                    '%s: %d fields contain null bytes, the first in column "%s": is the file binary, or in UTF-16?',
                    *(name, odd, first),
                )


def null_bytes(table: pa.Table) -> tuple[int, str]:
    """Return how many fields of text contain a null byte, and the first of the columns that do."""
    counts = {name: pc.sum(pc.match_substring(table[name], "\0")).as_py() or 0 for name in table.column_names}
    return sum(counts.values()), next((name for name, count in counts.items() if count), "")


def separator_hint(columns: Iterable[str]) -> str:
    """Return the end of an error about columns: the separator that one of their names holds, if any does."""
    for mark in (";", "\t", "|"):
        if named := next((column for column in columns if mark in column.strip(mark)), None):
            return (
                f'; the column "{named}" looks like several columns separated by {mark!r}, but files must use commas'
            )
    return ""


def number_kinds(values: pa.ChunkedArray) -> set[str]:
    """Return which of int64 and float64 represent all fields losslessly, so that their text can be restored."""
    if values.null_count == len(values):
        return {"int64", "float64"}
    kinds = set()
    if pc.all(pc.match_substring_regex(values, WHOLE)).as_py():
        kinds.add("int64")
    decimal = pc.all(pc.match_substring_regex(values, DECIMAL)).as_py()
    if decimal and not pc.any(pc.match_substring_regex(values, TINY)).as_py():
        kinds.add("float64")
    return kinds


def open_text(path: str, encoding: str | None):
    """Open a text file, gzip-compressed or not."""
    file = open(path, "rb")  # noqa: SIM115 closed with what is returned
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return io.TextIOWrapper(gzip.GzipFile(fileobj=file) if zipped else file, encoding or "utf-8-sig", newline="")


def written(rows: datasets.Dataset, columns: Iterable[str]) -> datasets.Dataset:
    """Convert numeric columns read from a CSV file back to text, exactly as written in the file."""
    if getattr(rows.info, "builder_name", None) != __name__.rsplit(".", 1)[-1]:
        return rows
    for column in columns:
        if column in rows.column_names and rows.features[column].dtype in ("int64", "float64"):
            features = Features({**rows.features, column: Value("string")})

            def text(values: list, column: str = column) -> dict[str, list[str | None]]:
                return {column: [None if value is None else str(value) for value in values]}

            rows = rows.map(text, batched=True, input_columns=[column], features=features)
    return rows
