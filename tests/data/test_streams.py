"""The beginning of a stream is checked before a run; later errors are reported in one line."""

import itertools

import pytest
from datasets import Dataset, Features, Image, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image as PILImage

from hf_tfm.data import images, source
from hf_tfm.data.files import data_roots
from hf_tfm.data.images import image_rows
from hf_tfm.data.language import text_rows
from hf_tfm.data.source import load_splits
from hf_tfm.data.stream import Lane

BAD = {
    "a.jsonl": ('{"text": "good"}\n', '{"text": "bad"\n', "line 30001 is not JSON"),
    "a.csv": ("text,other\n" + "good,1\n", "bad,1,2\n", "row 30000: 2 fields expected, got 3"),
    "a.txt": ("good\n", b"\xff\n", "not UTF-8"),
}


def damaged(path, kind):
    """A file with 30,000 valid rows and one invalid row at the end."""
    good, bad, _ = BAD[kind]
    head, row = good.rsplit("\n", 2)[0], good.splitlines()[-1]
    filler = "x" * 800 if kind != "a.csv" else ""
    rows = [row.replace("good", f"good{filler}")] * 30_000
    text = "\n".join(([head] if kind == "a.csv" else []) + rows) + "\n"
    path.write_bytes(text.encode() + (bad if isinstance(bad, bytes) else bad.encode()))


@pytest.mark.parametrize("kind", BAD)
def test_late_invalid_row_of_a_stream_gives_a_one_line_error(tmp_path, kind):
    path = tmp_path / kind
    damaged(path, kind)
    with pytest.raises(ValueError, match=BAD[kind][2]) as error:
        list(text_rows(load_splits(str(path), streaming=True)["train"], "text"))
    assert "\n" not in str(error.value) and kind in str(error.value)


def three_files(tmp_path, monkeypatch, fail):
    """A stream of three files of 40 rows; ``fail`` is called before every group of 10 rows, with the file."""
    for file in range(3):
        rows = Dataset.from_dict({"text": [f"{file} {row}" for row in range(40)]})
        rows.to_parquet(tmp_path / f"train-{file}.parquet", batch_size=10)
    generate = Parquet._generate_tables

    def failing(self, files, **options):
        for item in generate(self, files, **options):
            fail(files[0])
            yield item

    monkeypatch.setattr(Parquet, "_generate_tables", failing)
    monkeypatch.setattr(source, "RETRY_SECONDS", (0, 0, 0))
    return load_splits(str(tmp_path), streaming=True)["train"]


def test_rows_of_a_stream_are_read_once_after_a_lost_connection(tmp_path, monkeypatch, caplog):
    calls = itertools.count()

    def fail(file):
        if next(calls) in (2, 6, 7):
            raise ConnectionResetError("connection reset")

    rows = three_files(tmp_path, monkeypatch, fail)
    assert [row["text"] for row in rows] == [f"{file} {row}" for file in range(3) for row in range(40)]
    assert sum("cannot be read, next attempt in 0 s: connection reset" in text for text in caplog.messages) == 3


def test_a_connection_may_also_be_lost_when_a_file_is_divided(tmp_path, monkeypatch):
    divide, calls = Parquet._generate_more_gen_kwargs, itertools.count()

    def failing(self, **options):
        for item in divide(self, **options):
            if next(calls) == 1:
                raise ConnectionResetError("connection reset")
            yield item

    monkeypatch.setattr(Parquet, "_generate_more_gen_kwargs", failing)
    lane = Lane(three_files(tmp_path, monkeypatch, lambda file: None), [2, 0, 1], 7)
    texts = [text for batch in iter(lane.read, {}) for text in batch["text"]]
    assert texts == [f"{file} {row}" for file in (2, 0, 1) for row in range(40)]
    assert next(calls) > 3


@pytest.mark.parametrize(("error", "attempts"), [(TimeoutError("timed out"), 4), (ValueError("bad row"), 1)])
def test_an_unreadable_shard_is_named_in_one_line(tmp_path, monkeypatch, error, attempts):
    calls = []

    def fail(file):
        if "train-1" in file:
            calls.append(file)
            raise error

    with pytest.raises(
        ValueError, match=r"^dataset_name .* cannot be loaded: .*\(shard \S+/train-1\.parquet"
    ) as found:
        list(three_files(tmp_path, monkeypatch, fail))
    assert len(calls) == attempts and "\n" not in str(found.value)
    assert ("in 4 attempts" in str(found.value)) == (attempts == 4)


@pytest.fixture
def folder(tmp_path):
    """Two images in a data set, and one outside."""
    (tmp_path / "data").mkdir()
    for name in ("data/a.png", "data/b.png", "secret.png"):
        PILImage.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "data"


def streamed(folder, paths, kind):
    values = [{"bytes": None, "path": path} for path in paths] if isinstance(kind, Image) else list(paths)
    rows = Dataset.from_dict({"image": values, "label": [0] * len(paths)}, features=kinds(kind))
    return rows.to_iterable_dataset()


def kinds(kind):
    return Features({"image": kind, "label": Value("int64")})


KINDS = pytest.mark.parametrize("kind", [Image(), Value("string")], ids=["images", "paths"])


@KINDS
def test_paths_of_a_stream_must_stay_in_the_data_set(folder, kind):
    roots = data_roots(str(folder))
    inside = [str(folder / "a.png"), str(folder / "b.png")]
    assert len(list(image_rows(streamed(folder, inside, kind), roots=roots))) == 2
    for outside in (str(folder.parent / "secret.png"), str(folder / ".." / "secret.png"), "/etc/passwd"):
        with pytest.raises(ValueError, match=r'image_column "image", row 1 names .* outside the data set\'s folder'):
            image_rows(streamed(folder, [inside[0], outside], kind), roots=roots)


@KINDS
def test_later_paths_of_a_stream_are_checked_when_read(folder, kind, monkeypatch):
    monkeypatch.setattr(images, "CHECKED_ROWS", 2)
    paths = [str(folder / "a.png"), str(folder / "b.png"), "/etc/passwd"]
    rows = image_rows(streamed(folder, paths, kind), roots=data_roots(str(folder)))
    with pytest.raises(ValueError, match=r'image_column "image" names "/etc/passwd", which is outside the data set'):
        list(rows)


def test_relative_paths_of_a_stream_are_resolved_in_the_data_set(folder):
    rows = image_rows(streamed(folder, ["a.png", "b.png"], Value("string")), roots=data_roots(str(folder)))
    assert [row["image"] for row in rows] == [str(folder / "a.png"), str(folder / "b.png")]


def test_columns_of_a_stream_keep_their_types(folder):
    rows = streamed(folder, [str(folder / "a.png")], Image())
    found = image_rows(rows, roots=data_roots(str(folder)))
    assert found.features == {"image": Image(decode=False), "label": Value("int64")}
