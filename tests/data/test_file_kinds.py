"""Text files are read as written, or refused in one line with file and position."""

import csv
import gzip
import io

import pytest

from hf_tfm.data.source import load_splits

CSV = b"text,label\na,NA\nb,1\n"
TSV = CSV.replace(b",", b"\t")
JSONL = b'{"text": "a", "label": "NA"}\n{"text": "b", "label": "1"}\n'
ROWS = [{"text": "a", "label": "NA"}, {"text": "b", "label": "1"}]


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return str(file)


def rows(dataset, split="train", **options):
    return list(load_splits(str(dataset), **options)[split])


CONTENTS = {
    "csv": CSV,
    "tsv": TSV,
    "CSV": CSV,
    "csv.gz": gzip.compress(CSV),
    "TSV.GZ": gzip.compress(TSV),
    "jsonl": JSONL,
    "JSONL": JSONL,
    "ndjson": JSONL,
    "jsonl.gz": gzip.compress(JSONL),
    "json": b"[" + JSONL.replace(b"\n", b",", 1) + b"]",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_format_is_read_as_a_file_and_in_a_folder(tmp_path, suffix, streaming):
    file = write(tmp_path / "folder" / f"train.{suffix}", CONTENTS[suffix])
    write(tmp_path / "folder" / f"test.{suffix}", CONTENTS[suffix])
    assert rows(file, streaming=streaming) == ROWS
    assert rows(tmp_path / "folder", "test", streaming=streaming) == ROWS


def test_plain_text_and_upper_case_extensions(tmp_path):
    assert rows(write(tmp_path / "a.TXT", b"one\ntwo\n")) == [{"text": "one"}, {"text": "two"}]
    write(tmp_path / "folder" / "train.csv", CSV)
    write(tmp_path / "folder" / "test.CSV", CSV)
    assert list(load_splits(str(tmp_path / "folder"))) == ["train", "test"]
    assert rows("csv", data_files=write(tmp_path / "b.tsv", TSV)) == ROWS


def test_only_empty_csv_fields_are_missing(tmp_path):
    words = [
        "NA",
        "None",
        "null",
        "nan",
        "NaN",
        "N/A",
        "n/a",
        "NULL",
        "<NA>",
        "#N/A",
        "-nan",
        "True",
        "",
        "1e5",
        "-1.#IND",
    ]
    content = "text,label\n" + "".join(f"{word},{word}\n" for word in words)
    found = rows(write(tmp_path / "a.csv", content.encode()))
    assert [row["label"] for row in found] == [row["text"] for row in found] == [word or None for word in words]


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        (["0", "1", "-2"], [0, 1, -2]),
        (["0", "", "1"], [0, None, 1]),
        (["01", "1"], ["01", "1"]),
        (["0.0", "1.0"], [0.0, 1.0]),
        (["0.5", "1.25"], [0.5, 1.25]),
        (["1.50", "2"], ["1.50", "2"]),
        (["+1", "1"], ["+1", "1"]),
        (["12345678901234567890"], ["12345678901234567890"]),
        (["0.00001"], ["0.00001"]),
        (["true", "false"], ["true", "false"]),
        (["2020-01-01"], ["2020-01-01"]),
    ],
)
def test_csv_numbers_are_parsed_only_if_lossless(tmp_path, fields, values):
    content = "label,text\n" + "".join(f"{field},x\n" for field in fields)
    found = [row["label"] for row in rows(write(tmp_path / "a.csv", content.encode()))]
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xef\xbb\xbftext,label\na,NA\nb,1\n", ROWS),
        (CSV.replace(b"\n", b"\r\n"), ROWS),
        (CSV.replace(b"\n", b"\r"), ROWS),
        (CSV.replace(b"\n", b"\n\n"), ROWS),
        (CSV[:-1], ROWS),
        (b'text,label\n"a\nb, ""c""",x\n', [{"text": 'a\nb, "c"', "label": "x"}]),
        (b"text,label\na\x00b,x\n", [{"text": "a\x00b", "label": "x"}]),
        (b",text\n0,a\n", [{"Unnamed: 0": 0, "text": "a"}]),
    ],
)
def test_csv_dialects(tmp_path, content, found):
    assert rows(write(tmp_path / "a.csv", content)) == found


BAD = {
    "empty.csv": (b"", "empty.csv is empty"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.txt": (b"", "empty.txt is empty"),
    "empty.parquet": (b"", "empty.parquet is empty"),
    "wide.csv": (b"text,label\na,1\nb,2,3\n", "wide.csv, row 1: 2 fields expected, got 3: 'b,2,3'"),
    "index.csv": (b"text,label\na,1,x\nb,2,x\n", "index.csv, row 0: 2 fields expected, got 3"),
    "narrow.csv": (b"text,label\na,1\nb\n", "narrow.csv, row 1: 2 fields expected, got 1"),
    "quote.csv": (b'text,label\n"a,1\nb,2\n', "quote.csv, row 0: 2 fields expected, got 1"),
    "twice.csv": (b"text,text\na,b\n", 'twice.csv has two columns called "text"'),
    "latin.csv": ("text\ncafé\n".encode("latin1"), "latin.csv is not UTF-8: byte 0xe9 at position 8, line 2"),
    "latin.txt": ("café\n".encode("latin1"), "latin.txt is not UTF-8: byte 0xe9 at position 3, line 1"),
    "latin.jsonl": ('{"text": "café"}\n'.encode("latin1"), "latin.jsonl is not UTF-8: byte 0xe9 at position 13"),
    "wide.tsv": ("text\n".encode("utf-16"), "wide.tsv is not UTF-8: byte 0xff at position 0"),
    "cut.jsonl": (b'{"text": "a"}\n{"text":', "cut.jsonl, line 2 is not JSON"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', 'half.jsonl, line 1, column "text" contains an unpaired surrogate'),
    "cut.csv.gz": (gzip.compress(CSV * 1000)[:50], "cut.csv.gz cannot be read: Compressed file ended"),
    "not.csv.gz": (CSV, "not.csv.gz cannot be read: Not a gzipped file"),
    "not.parquet": (b"PAR1xxxx", "not.parquet is not a Parquet file"),
    "sheet.xlsx": (b"x", 'sheet.xlsx" is not a supported kind of file: .csv, .tsv, '),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_files_are_reported_with_the_position(tmp_path, name):
    content, message = BAD[name]
    for _ in range(2):  # a partially prepared cache must not be used
        with pytest.raises(ValueError) as error:
            load_splits(write(tmp_path / name, content))
        assert type(error.value) is ValueError and message in str(error.value) and "\n" not in str(error.value)


def test_folder_without_data_lists_the_supported_formats(tmp_path):
    write(tmp_path / "folder" / "a.doc", b"x")
    with pytest.raises(ValueError, match=r"has no file of a supported kind \(.csv, .tsv.*: it has a.doc"):
        load_splits(str(tmp_path / "folder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        load_splits(str(tmp_path / "empty"))


def test_missing_files_and_formats_without_files(tmp_path):
    for dataset, data_files, message in (
        (str(tmp_path / "no"), None, "does not exist"),
        ("no.csv", None, "does not exist"),
        ("/dev/zero", None, "neither a regular file nor a folder"),
        ("csv", None, "is the name of a format: give data_files"),
        ("csv", "no/*.csv", "match no file for split train"),
        ("csv", {"train": str(tmp_path / "no.csv")}, "Unable to find"),
    ):
        with pytest.raises(ValueError, match=message):
            load_splits(dataset, data_files=data_files)


def test_splits_may_differ_in_columns_but_files_of_a_split_must_not(tmp_path):
    write(tmp_path / "a" / "train.csv", CSV)
    write(tmp_path / "a" / "validation.csv", b"text,label\n")
    write(tmp_path / "a" / "test.csv", b"text\nq\n")
    splits = load_splits(str(tmp_path / "a"))
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "validation": 0, "test": 1}
    assert splits["test"][0] == {"text": "q", "label": None}
    write(tmp_path / "b" / "train-1.csv", CSV)
    write(tmp_path / "b" / "train-2.csv", b"text,lable\nq,1\n")
    with pytest.raises(
        ValueError, match=r"train-2.csv and .*train-1.csv belong to one split but have different columns: label, lable"
    ):
        load_splits(str(tmp_path / "b"))


def test_any_text_survives_a_csv_round_trip(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    numbers = strategies.one_of(strategies.integers(), strategies.floats()).map(str)
    characters = strategies.characters(exclude_categories=["Cs"])
    text = strategies.one_of(
        numbers, strategies.text(characters), strategies.sampled_from(["NA", "null", "01", "1.50"])
    )

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(strategies.lists(strategies.tuples(text, text), min_size=1, max_size=8))
    def round_trip(pairs):
        file = io.StringIO(newline="")
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *pairs])
        found = rows(write(tmp_path / "a.csv", file.getvalue().encode()))
        expected = [(first or None, second or None) for first, second in pairs]
        assert [tuple(None if v is None else str(v) for v in row.values()) for row in found] == expected

    round_trip()


def test_ignored_files_of_a_folder_are_reported(tmp_path, caplog):
    """`datasets` reads the format that most files of a split have."""
    for name in ("train-1.csv", "train-2.csv"):
        (tmp_path / name).write_text("text,label\na,b\n")
    (tmp_path / "train-3.jsonl").write_text('{"text": "a", "label": "b"}\n')
    assert len(load_splits(str(tmp_path))["train"]) == 2
    assert "1 files are not read" in caplog.text and "train-3.jsonl" in caplog.text
    caplog.clear()
    (tmp_path / "train-3.jsonl").unlink()
    load_splits(str(tmp_path))
    assert not caplog.text
