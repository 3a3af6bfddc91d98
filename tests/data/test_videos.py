"""Videos of data sets: lists of images, animations, NumPy arrays, and video files."""

import io
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Video
from datasets import Image as ImageFeature
from PIL import Image

from hf_tfm.data import videos
from hf_tfm.data.images import BadImage
from hf_tfm.data.source import load_splits


def clip(length: int = 4, size: tuple[int, int] = (5, 6), seed: int = 0) -> np.ndarray:
    """Frames (T, h, w) of few colours, which GIF keeps."""
    return np.random.RandomState(seed).choice([0, 128, 255], (length, *size)).astype(np.uint8)


def png(frame: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def lists(*clips: np.ndarray) -> Dataset:
    rows = [{"frames": [png(frame) for frame in one], "name": "x"} for one in clips]
    return Dataset.from_list(
        rows, features=Features({"frames": List(ImageFeature()), "name": datasets.Value("string")})
    )


def everything(length: int) -> range:
    return range(length)


def test_lists_of_images():
    rows = videos.video_rows(lists(clip(), clip(3, seed=1)), None)
    assert rows.column_names == ["image"]
    found = videos.read_video(rows[0]["image"], everything)
    assert found.shape == (4, 3, 5, 6) and torch.equal(found[:, 1], torch.from_numpy(clip()))
    some = videos.read_video(rows[0]["image"], lambda length: range(1, length, 2))
    assert torch.equal(some, found[1::2])
    uneven = [png(clip()[0]), png(clip(size=(4, 6))[0])]
    with pytest.raises(BadImage, match="its frames differ in size"):
        videos.read_video(uneven, everything)
    assert videos.fingerprint(rows) == videos.fingerprint(rows.select([0, 1])) != videos.fingerprint(rows.select([0]))


def test_folder_of_animations(tmp_path):
    frames = [Image.fromarray(frame) for frame in clip()]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        frames[0].save(tmp_path / split / "a.gif", save_all=True, append_images=frames[1:])
    rows = videos.video_rows(load_splits(str(tmp_path))["test"], None, [str(tmp_path)])
    found = videos.read_video(rows[0]["image"], everything)
    assert torch.equal(found[:, 0], torch.from_numpy(clip()))
    with pytest.raises(BadImage, match="its image format is not supported"):
        videos.read_video({"bytes": b"no image at all", "path": None}, everything)
    with pytest.raises(ValueError, match="outside"):
        videos.video_rows(load_splits(str(tmp_path))["test"], None, [str(tmp_path / "train")])


def test_array_of_moving_mnist(tmp_path):
    """The layout of the public test file: frames, videos, height, width."""
    array = np.stack([clip(seed=seed) for seed in range(3)], axis=1)
    np.save(tmp_path / "m.npy", array)
    rows = load_splits(str(tmp_path / "m.npy"))["train"]
    assert len(rows) == 3
    found = videos.read_video(rows[1]["image"], lambda length: range(0, length, 2))
    assert found.shape == (2, 3, 5, 6) and torch.equal(found[:, 2], torch.from_numpy(array[::2, 1]))
    assert videos.fingerprint(rows) != videos.fingerprint(rows.select([0, 1]))
    np.save(tmp_path / "float.npy", array / 255)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    for name, message in {
        "float": r"must hold uint8 frames of shape \(frames, videos, height, width\), got float64 \(4, 3, 5, 6\)",
        "objects": "is not a NumPy array: .*objects",
        "text": "is not a NumPy array",
        "none": "cannot be loaded: it is not a file",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_splits(str(tmp_path / f"{name}.npy"))


def test_video_files_need_torchcodec(monkeypatch):
    rows = Dataset.from_dict({"clip": [b"x"]}).cast(Features({"clip": Video(decode=False)}))
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='image_column "clip" holds videos, which need the package torchcodec'):
        videos.video_rows(rows, None)
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda name: object())
    found = videos.video_rows(rows, None)
    frames = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    monkeypatch.setattr(Video, "decode_example", lambda self, value: frames)  # a decoder is sliced like a tensor
    read = videos.read_video(found[0]["image"], lambda length: range(1, length, 2), is_file=True)
    assert torch.equal(read, frames[1::2])
    monkeypatch.setattr(Video, "decode_example", lambda self, value: 1 / 0)
    with pytest.raises(BadImage, match="ZeroDivisionError"):
        videos.read_video(found[0]["image"], everything, is_file=True)


def test_columns():
    rows = lists(clip())
    for column, message in {
        "name": 'image_column "name" must hold lists of images, animated images or videos, got Value',
        "gone": 'image_column "gone" is not a column of the data set; it has frames, name',
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            videos.video_rows(rows, column)
    with pytest.raises(ValueError, match="image_column must name a column of videos; the data set has name"):
        videos.video_rows(rows.select_columns(["name"]), None)
