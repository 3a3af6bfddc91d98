"""Streams of images with objects: checked like a data set, each image once, the same steps on any number of ranks."""

import itertools
import json
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from thread_ranks import run_on_ranks

from hf_tfm.data import scenes
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.digit_scenes import CATEGORIES, digit_scenes, png
from hf_tfm.data.panoptic import panoptic_rows
from hf_tfm.data.pixels import PaddedPixels, scene_processor
from hf_tfm.data.scene_streams import SceneReader
from hf_tfm.data.scenes import SceneAugmentation
from hf_tfm.data.shape_batches import ShapeSampler
from hf_tfm.data.source import load_splits
from hf_tfm.data.stream import StreamLoader
from hf_tfm.tasks.scenes import SceneCollator

SHARDS = (5, 0, 11, 1, 7)  # images
NAMES = ["cat", "dog", "emu"]
KINDS = {"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=NAMES)}
FEATURES = Features({"image": Image(), "image_id": Value("int64"), "objects": List(KINDS)})
SMALL = SceneAugmentation(scales=(24, 32), max_size=64, crop_scales=(32,), crop_size=(16, 32))
BATCH = 4


def row_of(number, **box):
    """An image whose size depends on its number, with up to two boxes."""
    height, width = 20 + 4 * (number % 5), 20 + 6 * (number % 3)
    pixels = np.full((height, width, 3), number, np.uint8)
    objects = [{"bbox": [2, 3 + i, 9, 8], "category": (number + i) % 3, **box} for i in range(number % 3)]
    image = {**png(pixels), "path": f"photo-{number}.png"}
    return {"image": image, "image_id": 100 + number, "objects": objects}


def written(folder, rows, features=FEATURES, shards=SHARDS):
    """The stream of rows in Parquet files of these sizes."""
    ends = np.cumsum((0, *shards)).tolist()
    for file, (start, end) in enumerate(itertools.pairwise(ends)):
        part = rows[start:end]
        columns = {name: [row[name] for row in part] for name in features}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{file}.parquet", batch_size=3)
    return load_splits(str(folder), streaming=True)["train"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scenes"), [row_of(i) for i in range(sum(SHARDS))])


COLLATE = SceneCollator(PaddedPixels(scene_processor(32, 64)), range(3), training=True, augmentation=SMALL, seed=3)


def loader_of(stream, **options):
    reader = SceneReader()
    rows = reader.select(stream)

    def sampler(sizes, first):
        return ShapeSampler(sizes, BATCH, SMALL, 3, first=first)

    def size(row):
        return row["height"], row["width"]

    return StreamLoader(rows, sampler, COLLATE, size, 3, reader.head(rows)[1], 2 * BATCH, **options)


def content(steps):
    """Training data by step: image id, boxes, classes and the sum of the pixels of every image."""
    return [
        [
            (
                *(int(target["image_id"]), target["boxes"].tolist(), target["class_labels"].tolist()),
                *(int(pixels.sum()), tuple(pixels.shape)),
            )
            for batch in step
            if batch["images"]
            for target, pixels in zip(batch["labels"], batch["pixel_values"], strict=True)
        ]
        for step in steps
    ]


def joined(ranks):
    """The content of each step, over all ranks."""
    return [list(itertools.chain(*parts)) for parts in zip(*map(content, ranks), strict=True)]


def test_every_image_once_in_the_same_steps_on_any_number_of_ranks(stream, monkeypatch):
    whole = list(loader_of(stream).epoch(0))
    found = content(whole)
    ids = [image[0] for step in found for image in step]
    assert sorted(ids) == [100 + i for i in range(sum(SHARDS))] != ids
    assert all(len({image[-1] for image in step}) == 1 for step in found), "one canvas a step"
    assert content(loader_of(stream).epoch(1)) != found
    decoded = []
    monkeypatch.setattr(scenes, "decode", lambda value, decode=scenes.decode: decoded.append(1) or decode(value))
    ranks = [steps for steps, _ in run_on_ranks(3, loader_of, stream=stream)]
    assert joined(ranks) == found
    assert len(decoded) == sum(SHARDS), "each image by one rank"
    position = json.loads(json.dumps(whole[2].position))
    assert content(loader_of(stream, num_readers=1, num_workers=1).epoch(0, position)) == found[3:]
    ranks = [steps for steps, _ in run_on_ranks(2, loader_of, start=position, stream=stream)]
    assert joined(ranks) == found[3:]


def test_a_pool_is_batched_like_a_data_set(stream):
    """The only pool of a stream with one file: the steps of the rows as a data set."""
    rows = [row_of(i) for i in range(2 * BATCH)]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    source = Dataset.from_dict(columns, features=FEATURES)
    streamed = content(loader_of(source.to_iterable_dataset()).epoch(0))
    read = SceneReader()(source)
    sizes = np.stack([read["height"], read["width"]], axis=1)
    assert streamed == content(StepLoader(read, ShapeSampler(sizes, BATCH, SMALL, 3), COLLATE).epoch(0))


def test_invalid_boxes_are_left_out_with_the_name_of_the_image(tmp_path, caplog):
    rows = [row_of(i, bbox=[float("nan"), 1, 5, 5]) if i in (4, 5, 8) else row_of(i) for i in range(sum(SHARDS))]
    with caplog.at_level(logging.WARNING):
        found = content(loader_of(written(tmp_path, rows)).epoch(0))
    boxes = {image[0] - 100: image[1] for step in found for image in step}
    assert all(np.isfinite(one).all() for one in boxes.values()) and boxes[4] == boxes[5] == boxes[8] == []
    told = [text for text in caplog.messages if "not finite" in text]
    assert 1 <= len(told) <= 2, "by the head, and once by the reader"
    assert any(f"first in image {100 + i}, photo-{i}.png)" in told[-1] for i in (4, 5, 8))


def test_categories_of_a_stream_need_names(tmp_path):
    rows = [row_of(i) for i in range(3)]
    features = Features({**FEATURES, "objects": List({**KINDS, "category": Value("int64")})})
    stream = written(tmp_path, rows, features, (3,))
    with pytest.raises(ValueError, match=r'column "objects" of a stream must be a ClassLabel, .*: give class_names'):
        SceneReader().head(SceneReader().select(stream))


def test_panoptic_maps_of_a_piece_are_those_of_a_data_set():
    source = digit_scenes(train=5, validation=0, test=0, size=32)["train"]
    rows = source.to_iterable_dataset()
    reader = SceneReader(categories=CATEGORIES)
    pieces = reader.head(reader.select(rows))[1]
    columns = source.select_columns(list(reader.select(rows).features)).cast(pieces.features)
    found = pieces(columns[1:3], [1, 2])
    expected = panoptic_rows(source, CATEGORIES)[1:3]
    assert {name: expected[name] for name in found} == found and "segments_info" in found
    unmapped = {**columns[1:3], "panoptic": [None, None]}
    assert pieces(unmapped, [1, 2])["image_id"] == []


def test_damaged_image_is_left_out_by_the_rank_that_reads_it(tmp_path):
    rows = [row_of(i) for i in range(sum(SHARDS))]
    rows[6]["image"] = {"bytes": b"no image", "path": "photo-6.png"}
    ranks = [steps for steps, _ in run_on_ranks(2, loader_of, stream=written(tmp_path, rows))]
    bad = [reason for steps in ranks for step in steps for batch in step for _, reason in batch["bad"]]
    assert len(bad) == 1 and bad[0].startswith("photo-6.png")
    assert sum(len(step) for steps in ranks for step in content(steps)) == sum(SHARDS) - 1
