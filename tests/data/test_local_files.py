"""Rows are those of the given files, whatever was cached for files of the same name or path."""

import ast
import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import PIL.Image
import pytest
from datasets import Dataset, load_dataset

from hf_tfm.data import local_files
from hf_tfm.data.image_sizes import image_sizes
from hf_tfm.data.images import image_rows
from hf_tfm.data.labelled_texts import load_texts, text_rows
from hf_tfm.data.language import Corpus
from hf_tfm.data.local_files import cache_entry
from hf_tfm.data.source import load_splits

README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.{0}\n---\n"


def write_rows(file, texts):
    """Write rows of texts in the format of a file's suffix."""
    kind = file.name.split(".", 1)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(str(file))
        return
    lines = [json.dumps({"text": text}) for text in texts] if "json" in kind else list(texts)
    head = ["text"] if kind[1:3] == "sv" else []
    data = "\n".join([*head, *lines]).encode() + b"\n"
    file.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)


def folder(path, texts, kind="parquet", card=True):
    """A data set with one file and, as in Hub data sets, a card that names it."""
    write_rows(path / f"train.{kind}", texts)
    if card:
        (path / "README.md").write_text(README.format(kind))
    return str(path)


def texts_of(dataset, **options):
    return [row["text"] for row in load_splits(dataset, **options)["train"]]


OLD, NEW = ["old one", "old two"], ["new one", "new two"]  # the same number of bytes


@pytest.mark.parametrize(
    ("card", "streaming"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt", "jsonl.gz"])
def test_folders_of_the_same_name_and_changed_files_give_their_own_rows(tmp_path, kind, card, streaming):
    first = folder(tmp_path / "a" / "mydata", OLD, kind, card)
    second = folder(tmp_path / "b" / "mydata", NEW, kind, card)
    assert texts_of(first, streaming=streaming) == OLD
    assert texts_of(second, streaming=streaming) == NEW
    folder(tmp_path / "a" / "mydata", NEW + OLD, kind, card)
    assert texts_of(first, streaming=streaming) == NEW + OLD


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_changed_file_of_the_same_size_and_time_is_read_again(tmp_path, kind):
    file = tmp_path / f"train.{kind}"
    write_rows(file, OLD)
    assert texts_of(str(file)) == OLD
    before = file.stat()
    write_rows(file, NEW)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts_of(str(file)) == NEW


@pytest.mark.parametrize("form", ["name", "list", "glob", "splits"])
def test_changed_files_given_by_format_are_read_again(tmp_path, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"name": "train.csv", "list": ["train.csv"], "glob": "*.csv", "splits": {"train": "tra*.csv"}}[form]
    write_rows(tmp_path / "train.csv", OLD)
    assert texts_of("csv", data_files=given) == OLD
    write_rows(tmp_path / "train.csv", NEW)
    assert texts_of("csv", data_files=given) == NEW


def test_relative_names_depend_on_the_working_directory(tmp_path, monkeypatch):
    for name, texts in {"a": OLD, "b": NEW}.items():
        folder(tmp_path / name / "mydata", texts)
        stamp = tmp_path / name / "mydata" / "train.parquet"
        os.utime(stamp, ns=(1_700_000_000_000_000_000,) * 2)
        monkeypatch.chdir(tmp_path / name)
        assert texts_of("mydata") == texts


def test_changed_link_gives_the_rows_of_its_target(tmp_path):
    for name, texts in {"a": OLD, "b": NEW}.items():
        folder(tmp_path / name, texts)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        assert texts_of(str(tmp_path / "link")) == texts


def test_outdated_card_does_not_affect_a_changed_file(tmp_path):
    path = tmp_path / "mydata"
    stated = README.format("parquet").replace("---\nconfigs", "---\ndataset_info:\n  splits:\n  - name: train\n"
        "    num_bytes: 4\n    num_examples: 90\nconfigs")  # fmt: skip
    folder(path, OLD)
    (path / "README.md").write_text(stated)
    assert texts_of(str(path)) == OLD


def test_cache_of_datasets_itself_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    first, second = folder(tmp_path / "a" / "mydata", OLD), folder(tmp_path / "b" / "mydata", NEW)
    assert load_dataset(first)["train"]["text"][:] == OLD
    assert texts_of(second) == NEW
    with pytest.raises(ValueError, match='"mydata" is neither a local file or folder nor available'):
        load_splits("mydata")


def test_results_of_map_depend_on_the_rows(tmp_path):
    """`datasets` caches results of `map` by a fingerprint; here two sources differ only in the second of two parts."""
    first, second = folder(tmp_path / "a" / "mydata", OLD), folder(tmp_path / "b" / "mydata", OLD)
    for texts in (OLD, NEW):
        folder(tmp_path / "b" / "mydata", texts)
        parts = [text_rows(load_splits(path)["train"], labelled=False) for path in (first, second)]
        assert datasets.concatenate_datasets(parts)["text"][:] == OLD + texts
        joined = datasets.concatenate_datasets(parts).map(lambda row: {"upper": row["text"].upper()})
        assert joined["upper"][:] == [text.upper() for text in OLD + texts]


def test_additional_texts_and_labelled_texts_are_read_again(tmp_path):
    for texts in (OLD, NEW):
        path = folder(tmp_path / "mydata", texts)
        assert Corpus(dataset_name=path).rows()["text"][:] == texts
        assert load_texts(path)["train"]["text"][:] == texts


def jpeg(file, colour, size=(8, 6)):
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(file)


def test_image_folders_are_read_again(tmp_path):
    for name, label in {"a": "cat", "b": "dog"}.items():
        for other in (label, "ape"):
            jpeg(tmp_path / name / "pets" / "train" / other / "1.png", "red")
        rows = load_splits(str(tmp_path / name / "pets"))["train"]
        assert rows.features["label"].names == ["ape", label]
    jpeg(tmp_path / "a" / "pets" / "train" / "bird" / "1.png", "blue")
    assert load_splits(str(tmp_path / "a" / "pets"))["train"].features["label"].names == ["ape", "bird", "cat"]


def test_changed_archive_is_extracted_again(tmp_path):
    archive = tmp_path / "pets.zip"
    for colour in ("red", "blue"):
        jpeg(tmp_path / "1.png", colour)
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "1.png", "train/cat/1.png")
        rows = load_splits("imagefolder", data_files=str(archive))["train"]
        assert rows[0]["image"].getpixel((0, 0)) == PIL.Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def test_image_sizes_are_those_of_the_files(tmp_path):
    path = tmp_path / "pets"
    for size in ((8, 6), (4, 2)):
        jpeg(path / "train" / "cat" / "1.png", "red", size)
        jpeg(path / "train" / "dog" / "1.png", "red", (3, 3))
        rows = image_rows(load_splits(str(path))["train"])
        assert image_sizes(rows)[0].tolist() == [*size[::-1]]
    jpeg(path / "train" / "cat" / "1.png", "red", (7, 5))
    assert image_sizes(rows)[0].tolist() == [5, 7]  # rows loaded before the change


def coco(path, name):
    jpeg(path / "train" / "1.png", "red")
    annotations = path / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 6}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}],
        "categories": [{"id": 1, "name": name}],
    }
    (annotations / "instances_train.json").write_text(json.dumps(content))
    return str(path)


def voc(path, name):
    jpeg(path / "JPEGImages" / "1.png", "red")
    (path / "Annotations").mkdir(parents=True, exist_ok=True)
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax>"
    (path / "Annotations" / "1.xml").write_text(
        f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )
    return str(path)


def category(dataset):
    objects = load_splits(dataset)["train"].features["objects"].feature
    return objects["category"].names


@pytest.mark.parametrize("write", [coco, voc])
def test_annotations_are_read_again(tmp_path, write, monkeypatch):
    for name in ("cat", "dog"):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / name / "pets", name)
        monkeypatch.chdir(tmp_path / name)
        assert category("pets") == [name]
    write(tmp_path / "dog" / "pets", "cow")
    assert category("pets") == ["cow"]


def test_unchanged_files_are_prepared_once(tmp_path):
    path = folder(tmp_path / "mydata", OLD)
    first, again = (load_splits(path)["train"] for _ in range(2))
    assert first.cache_files == again.cache_files and first._fingerprint == again._fingerprint


@pytest.mark.slow
def test_prepared_rows_are_shared_between_processes(tmp_path):
    path = folder(tmp_path / "mydata", OLD)
    code = f"from hf_tfm.data.source import load_splits; print(load_splits({path!r})['train'].cache_files)"
    started = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "12"]
    assert started[0].stdout == started[1].stdout == f"{load_splits(path)['train'].cache_files}\n"


def test_all_data_loading_is_in_one_module():
    """Elsewhere `datasets` would find cached rows by a folder's name."""
    root = Path(__file__).parents[2]
    loaders = {"load_dataset", "load_dataset_builder", "load_from_disk"}
    loaders |= {f"from_{kind}" for kind in ("generator", "csv", "json", "parquet", "text", "file")}
    found = {
        str(file.relative_to(root))
        for path in ("hf_tfm", "recipes", "benchmarks")
        for file in (root / path).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in loaders and "ataset" in ast.unparse(node.value)
    }
    assert found == {"hf_tfm/data/source.py", "hf_tfm/data/annotation_folders.py"}


def test_file_changed_during_reading_is_refused(tmp_path, monkeypatch):
    path = folder(tmp_path / "mydata", OLD)
    prepare = datasets.DatasetBuilder.download_and_prepare

    def slow(self, *args, **options):
        prepare(self, *args, **options)
        folder(tmp_path / "mydata", NEW)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "download_and_prepare", slow)
        with pytest.raises(ValueError, match="changed while they were read"):
            load_splits(path)
    assert texts_of(path) == NEW


def test_unused_cache_entries_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    old, other = cache_entry("mine", "1" * 64), cache_entry("theirs", "2" * 64)
    for entry in (old, other):
        os.utime(entry / local_files.USED, (0, 0))
    cache_entry("mine", "3" * 64)
    assert old.is_dir() and other.is_dir()  # in use by this process
    for entry in (old, other):
        local_files._held.pop(entry).close()
    recent = cache_entry("mine", "4" * 64)
    assert not old.exists() and not other.exists()
    local_files._held.pop(recent).close()
    assert cache_entry("mine", "5" * 64).is_dir() and recent.is_dir()  # used within the last hour
    shutil.rmtree(recent)
    assert cache_entry("mine", "4" * 64).is_dir()


def test_splits_and_row_counts_are_printed(tmp_path, capsys, monkeypatch):
    path = folder(tmp_path / "mydata", OLD)
    load_splits(path)
    assert f"data {path}, split train: 2 rows" in capsys.readouterr().err
    write_rows(tmp_path / "train.csv", NEW)
    load_splits("csv", data_files={"train": [str(tmp_path / "train.csv")]})
    assert f"data csv {tmp_path / 'train.csv'}, split train: 2 rows" in capsys.readouterr().err
    load_splits(path, streaming=True)
    assert "split train: a stream, rows not counted" in capsys.readouterr().err
    load_texts("number-parity")
    assert "data number-parity, split validation: 500 rows" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    load_splits(path)
    assert "split train" not in capsys.readouterr().err
