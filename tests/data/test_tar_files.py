"""WebDataset tar files: columns of images, labels and objects; streams that continue in a file without reading it."""

import io
import itertools
import json
import tarfile
from functools import partial

import numpy as np
import pytest
from datasets import ClassLabel
from test_equal_batches import loader_of

from hf_tfm.data import source, tar_files
from hf_tfm.data.digit_scenes import png
from hf_tfm.data.images import image_rows, label_names, with_class_names
from hf_tfm.data.scene_streams import SceneReader
from hf_tfm.data.source import load_splits

SHARDS = (250, 3, 120)  # samples


def write(path, samples):
    """A tar file of samples, {extension: bytes}; also a hidden file and a folder, which are not read."""
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("images/.hidden"), io.BytesIO())
        for number, sample in samples:
            for kind, content in sample.items():
                member = tarfile.TarInfo(f"images/{number:05}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def written(folder, sample):
    """The folder with tar files of the samples that ``sample`` makes of their numbers."""
    for file, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(SHARDS, initial=0))):
        write(folder / f"train-{file}.tar", [(i, sample(i)) for i in range(start, end)])
    return str(folder)


def image(number):
    return png(np.full((4, 5, 3), [number % 256, 7, number // 256]))["bytes"]


def classified(number):
    return {"png": image(number), "cls": str(number % 3).encode()}


def detected(number, nested=True):
    # The boxes of the first samples are whole numbers.
    boxes = [[1, 1, 2 + i, 2 + (number > 9) / 4] for i in range(1 + number % 2)]
    objects = {"bbox": boxes, "category": [number % 3] * len(boxes)}
    if nested:
        objects = {"objects": [dict(zip(objects, one, strict=True)) for one in zip(*objects.values(), strict=True)]}
    return {"png": image(number), "json": json.dumps({"image_id": 7 * number, **objects}).encode()}


def test_classes_are_labels_and_numbers_can_be_named(tmp_path):
    folder = written(tmp_path, classified)
    stored = image_rows(load_splits(folder)["train"])
    assert len(stored) == sum(SHARDS) and label_names(stored) == ["0", "1", "2"]
    stream = image_rows(load_splits(folder, streaming=True)["train"])
    assert list(stream) == list(stored)
    assert next(iter(stream))["image"] == {"bytes": image(0), "path": "images/00000.png"}
    with pytest.raises(ValueError, match=r"labels of a stream must be a ClassLabel, .* give class_names"):
        label_names(stream)
    for rows in (stored, stream):
        named = with_class_names(rows, ["cat", "dog", "emu"])
        assert label_names(named) == ["cat", "dog", "emu"]
        assert [row["label"] for row in named] == [i % 3 for i in range(sum(SHARDS))]
    with pytest.raises(ValueError, match="Class label 2 greater than configured num_classes 2"):
        list(with_class_names(stream, ["cat", "dog"]))


def test_resume_reads_no_file_before_its_part(tmp_path, monkeypatch):
    rows = image_rows(load_splits(written(tmp_path, classified), streaming=True)["train"])

    def collate(examples, *_):
        return [example["label"] for example in examples], [example["image"]["path"] for example in examples]

    loader = partial(loader_of, rows, 8, pool_samples=16, collate=collate)
    whole = list(loader().epoch(0))
    paths = [path for step in whole for batch in step for path in batch[1]]
    assert sorted(paths) == [f"images/{i:05}.png" for i in range(sum(SHARDS))]
    opened = []
    read = tar_files.TarPart.__iter__

    def counted(self):
        for item in read(self):
            opened.append(item[0])
            yield item

    monkeypatch.setattr(tar_files.TarPart, "__iter__", counted)
    number = 40
    assert next(loader().epoch(0, json.loads(json.dumps(whole[number - 1].position)))) == whole[number]
    assert len(opened) < 2 * (2 * tar_files.PART_SAMPLES + 100), "files of the parts being read alone"


@pytest.mark.parametrize("nested", [True, False], ids=["objects", "lists"])
def test_objects_of_json_files(tmp_path, nested):
    folder = written(tmp_path, partial(detected, nested=nested))
    reader = SceneReader(class_names=["cat", "dog", "emu"])
    stored = reader(load_splits(folder)["train"])
    assert [[one["bbox"] for one in row["objects"]] for row in stored] == [
        [[1, 1, 2 + i, 2 + (number > 9) / 4] for i in range(1 + number % 2)] for number in range(sum(SHARDS))
    ]
    assert stored.features["objects"].feature["category"] == ClassLabel(names=["cat", "dog", "emu"])
    stream = reader.select(load_splits(folder, streaming=True)["train"])
    pieces = reader.head(stream)[1]
    batch = next(stream.iter(50))
    assert pieces(batch, list(range(50))) == stored[:50]


def test_cut_off_file_is_named(tmp_path):
    folder = written(tmp_path, classified)
    path = tmp_path / "train-0.tar"
    content = path.read_bytes()
    for size in (len(content) // 2 // 512 * 512 + 100, len(content) // 1024 * 512 + 700):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"train-0\.tar"):
            list(load_splits(folder, streaming=True)["train"].reshard())


def test_files_are_read_again_after_a_failed_disk(tmp_path, monkeypatch):
    folder = written(tmp_path, classified)
    monkeypatch.setattr(source, "RETRY_SECONDS", (0, 0))
    read, failing = tar_files.TarPart.__iter__, ["train-0"] * 2

    def broken(self):
        for number, item in enumerate(read(self)):
            if number == 150 and failing and failing[-1] in self.path:
                raise OSError(failing.pop())
            yield item

    monkeypatch.setattr(tar_files.TarPart, "__iter__", broken)
    rows = load_splits(folder, streaming=True)["train"].reshard().decode(False)
    assert [row["png"]["path"] for row in rows] == [f"images/{i:05}.png" for i in range(sum(SHARDS))] and not failing
    failing += ["train-2"] * 3
    with pytest.raises(ValueError, match=r"train-2 \(shard \S+/train-2\.tar, in 3 attempts\)$"):
        list(rows)
