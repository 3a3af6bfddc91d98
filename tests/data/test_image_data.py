"""Images from any data set: columns, labels, decoding as in PIL, and unreadable images."""

import csv
import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.ImageOps
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from hf_tfm.data import images
from hf_tfm.data.files import data_roots
from hf_tfm.data.image_sizes import image_size
from hf_tfm.data.images import (
    BadImage,
    WatchedLoader,
    decode,
    encoded,
    fingerprint,
    image_rows,
    jpeg_size,
    label_ids,
    label_names,
    require_readable,
)
from hf_tfm.data.source import load_splits

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def squares(seed=0, height=48, width=40):
    """An image of large random squares, which JPEG preserves well."""
    colors = np.random.default_rng(seed).integers(0, 256, (6, 5, 3))
    big = np.kron(colors, np.ones((8, 8, 1))).astype(np.uint8)
    return PILImage.fromarray(big).resize((width, height), PILImage.Resampling.NEAREST)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(orientation=6):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    return exif


def transparent(image):
    image = image.copy()
    image.putalpha(PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (48, 40)).astype(np.uint8)))
    return image


KINDS = {
    "jpeg": encode(squares(), "JPEG"),
    "progressive": encode(squares(), "JPEG", progressive=True),
    "grey jpeg": encode(squares().convert("L"), "JPEG"),
    "cmyk jpeg": encode(squares().convert("CMYK"), "JPEG"),
    "rotated jpeg": encode(squares(), "JPEG", exif=rotated()),
    "rotated png": encode(squares(), "PNG", exif=rotated()),
    "png": encode(squares(), "PNG"),
    "grey png": encode(squares().convert("L"), "PNG"),
    "bilevel png": encode(squares().convert("1"), "PNG"),
    "alpha png": encode(transparent(squares()), "PNG"),
    "palette png": encode(squares().quantize(16), "PNG", transparency=3),
    "webp": encode(squares(), "WEBP", lossless=True),
    "animated gif": encode(squares().quantize(16), "GIF", save_all=True, append_images=[squares(1).quantize(16)]),
    "bmp": encode(squares(), "BMP"),
    "tiff": encode(squares(), "TIFF"),
}


# --- decoding


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_format_and_mode_is_decoded_as_by_pil(kind):
    image = decode(KINDS[kind])
    with PILImage.open(io.BytesIO(KINDS[kind])) as file:
        expected = np.array(PIL.ImageOps.exif_transpose(file).convert("RGB")).transpose(2, 0, 1)
    assert image.dtype == torch.uint8 and image.shape == ((3, 40, 48) if "rotated" in kind else (3, 48, 40))
    np.testing.assert_array_equal(image.numpy(), expected)


def test_16_bit_grayscale_becomes_8_bit():
    grey = np.array(squares().convert("L"))
    image = decode(encode(PILImage.fromarray(grey.astype(np.uint16) * 257), "PNG"))
    np.testing.assert_array_equal(image.numpy(), np.stack([grey] * 3))


def test_bytes_paths_dicts_and_pil_images_are_equivalent(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(KINDS["png"])
    expected = decode(KINDS["png"])
    given = [str(path), path.as_uri(), {"bytes": None, "path": str(path)}, {"bytes": KINDS["png"], "path": "gone.png"}]
    for value in [*given, squares()]:
        assert torch.equal(decode(value), expected)


def damaged():
    jpeg, png = KINDS["jpeg"], KINDS["png"]
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "jpeg without its end": jpeg[:-20],
        "truncated png": png[:-60],
        "png with a wrong byte": bytes(flipped),
        "nothing": b"",
        "no image": b"GET / HTTP/1.1" * 20,
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_images_are_refused(kind):
    with pytest.raises(BadImage, match=r"Error|the file is empty|its image format is not supported; it begins"):
        decode(damaged()[kind])


@pytest.mark.parametrize("value", [None, 3, "no/such/file.png", {"bytes": None, "path": None}])
def test_invalid_images_are_refused(value):
    with pytest.raises(BadImage):
        decode(value)


def test_float_images_are_refused():
    with pytest.raises(BadImage, match='mode "F"'):
        decode(PILImage.fromarray(np.ones((4, 4), np.float32)))


# --- limits


def claims(kind, side):
    """A small file whose header claims side x side pixels."""
    data = bytearray(KINDS[kind])
    if kind in ("jpeg", "progressive"):
        offset = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[offset + 5 : offset + 9] = struct.pack(">HH", side, side)
    elif kind == "png":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", side, side)
    else:
        data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "bmp", "animated gif"])
def test_images_that_claim_too_many_pixels_are_not_decoded(kind, monkeypatch):
    for name in ("decode_image", "from_pil"):
        monkeypatch.setattr(images, name, lambda *args, **options: pytest.fail("it was decoded"))
    side = 13_000 if kind == "bmp" else 40_000  # PIL itself refuses a BMP of this size
    claimed = claims(kind, side)
    with pytest.raises(BadImage, match=rf"{side} x {side} pixels, more than the limit|DecompressionBombError"):
        decode(claimed)
    assert image_size(claimed) == (0, 0)


def test_pixel_limit_applies_to_the_image_not_the_file(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 40)
    for kind in ("jpeg", "rotated jpeg", "png", "webp", "tiff"):
        assert decode(KINDS[kind]).numel() == 3 * 48 * 40
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 40 - 1)
    for kind in ("jpeg", "rotated jpeg", "png", "webp", "tiff"):
        with pytest.raises(BadImage, match="more than the limit of 1,919"):
            decode(KINDS[kind])
    with pytest.raises(BadImage, match="more than the limit of 1,919"):
        decode(squares())


def test_jpeg_size_is_read_from_its_frame_header():
    for kind in ("jpeg", "progressive", "grey jpeg", "cmyk jpeg", "rotated jpeg"):
        assert jpeg_size(KINDS[kind]) == (48, 40)
    for data in (b"", b"\xff\xd8", KINDS["jpeg"][:20], KINDS["png"], b"\xff\xd8\xff\x01" + KINDS["jpeg"][2:]):
        assert jpeg_size(data) is None


def test_only_regular_files_are_opened(tmp_path):
    pipe, link = tmp_path / "pipe.png", tmp_path / "zero.png"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    for value in (str(pipe), str(link), "/dev/zero", str(tmp_path), pipe.as_uri(), "local:///dev/zero"):
        with pytest.raises(BadImage, match=r"is not a regular file|Is a directory"):
            decode(value)
        assert image_size({"bytes": None, "path": value}) == (0, 0)
    with pytest.raises(BadImage, match=r"FileNotFoundError.*gone.png"):
        decode(str(tmp_path / "gone.png"))


def test_huge_file_is_not_read(tmp_path):
    sparse = tmp_path / "sparse.png"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImage, match=r"sparse.png has 1,099,511,627,776 bytes, the limit is"):
        decode(str(sparse))


def test_decompression_bomb_in_text_is_refused():
    data = KINDS["png"]
    text = b"comment\0\0" + zlib.compress(b" " * 50_000_000, 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(BadImage, match="too large"):
        decode(data[:33] + chunk + data[33:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'<?xml version="1.0"?><svg width="9" height="9"/>', "it is an SVG drawing"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "its image format is not supported"),
    ],
)
def test_svg_is_refused(data, message):
    with pytest.raises(BadImage, match=message):
        decode(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sizes_equal_those_of_the_decoded_image(kind, orientation, tmp_path):
    data = encode(squares(), kind, exif=rotated(orientation))
    (tmp_path / "image").write_bytes(data)
    for value in (data, str(tmp_path / "image"), {"bytes": data, "path": None}, PILImage.open(io.BytesIO(data))):
        assert image_size(value) == tuple(decode(value).shape[1:])


def test_jpeg_rotated_only_in_xmp_has_its_decoded_size():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(squares(), "JPEG", xmp=xmp)
    assert image_size(data) == tuple(decode(data).shape[1:])


def test_split_without_readable_images_is_refused_before_a_run():
    good, bad = KINDS["png"], b"no image"
    for files in ([bad] * 3, [bad] * 3 + [good]):
        rows = Dataset.from_dict({"image": files})
        with pytest.raises(
            ValueError, match=r"no image of train can be read: the first 3 of \d .* image 0: its image format is not"
        ):
            require_readable(rows, 2, "train")
    require_readable(Dataset.from_dict({"image": [bad, bad, good]}), 2, "train")


def test_stream_without_readable_images_is_refused_before_a_run():
    good, bad = KINDS["png"], b"no image"
    for files in ([bad] * 3, [bad] * 3 + [good]):
        with pytest.raises(
            ValueError, match=r"no image of train can be read: the first 3 of a stream .* image 0: its"
        ):
            require_readable(Dataset.from_dict({"image": files}).to_iterable_dataset(), 2, "train")
    require_readable(Dataset.from_dict({"image": [bad, bad, good]}).to_iterable_dataset(), 2, "train")
    with pytest.raises(ValueError, match="train has no rows"):
        require_readable(IterableDataset.from_generator(lambda: iter(())), 2, "train")


# --- columns and labels

PICTURES = [squares(i) for i in range(6)]
LABELS = [0, 1, 2, 0, 1, 2]
NAMES = ["cat", "dog", "bird"]


def memory(**columns):
    return Dataset.from_dict({"img": PICTURES, **columns}, features=None).cast_column("img", Image())


def folder(tmp_path):
    for index, (image, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        class_folder = tmp_path / "folder" / "train" / NAMES[label]
        class_folder.mkdir(parents=True, exist_ok=True)
        image.save(class_folder / f"{index}.png")
    return str(tmp_path / "folder")


def pixels(rows):
    """The images of rows in a canonical order."""
    return sorted(decode(row["image"]).numpy().tobytes() for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_imagefolder_and_parquet_are_the_same_images(tmp_path, streaming):
    from_folder = load_splits(folder(tmp_path), streaming=streaming)["train"]
    memory(label=LABELS).to_parquet(str(tmp_path / "data" / "train.parquet"))
    from_parquet = load_splits(str(tmp_path / "data"), streaming=streaming)["train"]
    expected = sorted(np.array(image).transpose(2, 0, 1).tobytes() for image in PICTURES)
    for rows in (image_rows(from_folder), image_rows(from_parquet)):
        assert pixels(rows) == expected
        assert set(next(iter(rows))) == {"image", "label"}
    rows = image_rows(from_folder)
    ids = label_ids(rows, ["dog", "bird", "cat"])  # in the order of the model, not of the data set
    assert label_names(rows) == ["bird", "cat", "dog"]
    for row in rows:
        name = Path(row["image"]["path"]).parent.name
        assert ids[row["label"]] == ["dog", "bird", "cat"].index(name)


def test_columns_of_paths_and_bytes(tmp_path):
    folder(tmp_path)
    files = sorted((tmp_path / "folder").rglob("*.png"))
    with (tmp_path / "list.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class"])
        writer.writerows([str(path), path.parent.name] for path in files)
    by_path = image_rows(load_splits(str(tmp_path / "list.csv"))["train"], "path", "class")
    by_bytes = image_rows(Dataset.from_dict({"raw": [p.read_bytes() for p in files], "label": LABELS}), "raw")
    assert pixels(by_path) == pixels(by_bytes)
    assert label_names(by_path) == ["bird", "cat", "dog"]
    assert label_ids(by_path, NAMES)["bird"] == 2


def table_of_paths(tmp_path, paths):
    with (tmp_path / "list.csv").open("w") as file:
        csv.writer(file).writerows([["path", "class"], *([path, "ab"[i % 2]] for i, path in enumerate(paths))])
    rows = load_splits(str(tmp_path / "list.csv"))["train"]
    return image_rows(rows, "path", "class", roots=data_roots(str(tmp_path / "list.csv")))


def test_table_paths_are_relative_and_stay_in_the_folder(tmp_path, monkeypatch):
    folder(tmp_path)
    files = sorted((tmp_path / "folder").rglob("*.png"))
    expected = sorted(decode(str(file)).numpy().tobytes() for file in files)
    own = [str(file.relative_to(tmp_path)) for file in files]
    for paths in (own, [str(file) for file in files], [file.as_uri() for file in files]):
        assert pixels(table_of_paths(tmp_path, paths)) == expected
    monkeypatch.chdir(tmp_path / "folder")  # relative to the working directory of the command, if inside the folder
    assert pixels(table_of_paths(tmp_path, [str(file.relative_to(tmp_path / "folder")) for file in files])) == expected
    for path in ("/etc/passwd", "../secret.png", "folder/../../secret.png", "file:///etc/passwd"):
        with pytest.raises(ValueError, match=r'image_column "path", row 1 names .* outside the data set'):
            table_of_paths(tmp_path, [own[0], path])


def test_stored_images_without_bytes_stay_in_the_folder(tmp_path):
    kind = Features(image=Image(decode=False), label=Value("int64"))
    paths = [str(tmp_path / "a.png"), "/etc/passwd"]
    table = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1]}
    pq.write_table(Dataset.from_dict(table, features=kind).data.table, tmp_path / "train.parquet")
    rows = load_splits(str(tmp_path))["train"]
    with pytest.raises(ValueError, match=r'image_column "image", row 1 names "/etc/passwd", which is outside'):
        image_rows(rows, roots=data_roots(str(tmp_path)))
    with pytest.raises(ValueError, match=r'names "/.*/a.png", which is outside'):  # as in a data set of the Hub
        image_rows(rows, roots=data_roots("someone/images"))
    inside = [{"bytes": None, "path": paths[0]}, {"bytes": KINDS["png"], "path": "/gone/b.png"}]  # never opened
    image_rows(Dataset.from_dict(table | {"image": inside}, features=kind), roots=data_roots(str(tmp_path)))


def test_labels_of_every_type():
    numbers = image_rows(memory(label=[10, 20, 30, 10, 20, -1]))
    assert label_names(numbers) == ["10", "20", "30"]  # -1 is not a class
    assert label_ids(numbers, ["10", "20", "30"])[20] == 1
    strings = image_rows(memory(label=["b", "a", None, "b", "a", "b"]))
    assert label_names(strings) == ["a", "b"]
    classes = image_rows(memory(label=LABELS).cast_column("label", ClassLabel(names=NAMES)))
    assert label_names(classes) == NAMES
    assert label_ids(classes, NAMES) == {0: 0, 1: 1, 2: 2}
    with pytest.raises(ValueError, match='label "cat" is not a class of the model; it has dog, bird'):
        label_ids(classes, ["dog", "bird"])
    with pytest.raises(ValueError, match="labels must be integers or strings"):
        label_names(image_rows(memory(label=[0.5, 1.0, 2.0, 1.0, 1.0, 1.0])))
    floats = image_rows(memory(label=[1.0, 0.0, 2.0, None, float("nan"), 1.0]))  # as in tables with an empty cell
    assert label_names(floats) == ["0", "1", "2"]
    assert [label_ids(floats, ["2", "1", "0"])[value] for value in (1.0, 0.0, 2.0)] == [1, 2, 0]
    assert label_names(image_rows(memory(label=["b", "", "a", " ", "b", "a"]))) == ["a", "b"]  # empty is no class
    for kind, labels in (("List", [[0], [1], [0], [1], [0], [1]]), ("a.*int64", [{"a": i} for i in LABELS])):
        with pytest.raises(ValueError, match=rf'label_column "label" must hold integers or strings, got .*{kind}'):
            image_rows(memory(label=labels), label_column="label")
    for labels in (["a", "b", "zzz", "a", "b", "a"], [0, 1, 7, 0, 1, 0]):
        names = ["a", "b"] if isinstance(labels[0], str) else ["0", "1"]
        with pytest.raises(ValueError, match=rf'label "{labels[2]}" is not a class of the model; it has {names[0]}'):
            label_ids(image_rows(memory(label=labels)), names)
    flags = image_rows(memory(label=[True, False, None, True, True, False]))
    assert label_names(flags) == label_names(flags.to_iterable_dataset()) == ["False", "True"]
    for names, expected in (
        (["False", "True"], [1, 0, None, 1, 1, 0]),
        (["True", "no", "False"], [0, 2, None, 0, 0, 2]),
    ):
        ids = label_ids(flags, names)
        assert [None if label is None else ids[label] for label in flags["label"]] == expected
    with pytest.raises(ValueError, match='label "False" is not a class of the model; it has no, yes'):
        label_ids(flags, ["no", "yes"])
    with pytest.raises(ValueError, match="labels of a stream must be a ClassLabel"):
        label_names(image_rows(memory(label=LABELS).to_iterable_dataset()))


def test_stream_without_known_columns():
    stream = IterableDataset.from_generator(lambda: ({"image": p, "label": i} for i, p in enumerate(PICTURES)))
    assert stream.features is None
    rows = list(image_rows(stream))
    assert [row["label"] for row in rows] == list(range(6))
    assert torch.equal(decode(rows[3]["image"]), decode(PICTURES[3]))


def test_broken_first_image_affects_nothing_else():
    rows = Dataset.from_dict({"img": [b"no image", KINDS["png"]], "label": [0, 1]}).cast_column("img", Image())
    for source in (rows, rows.to_iterable_dataset()):
        broken, whole = image_rows(source)
        with pytest.raises(BadImage):
            decode(broken["image"])
        assert torch.equal(decode(whole["image"]), decode(KINDS["png"]))


def test_columns_are_inferred_or_named():
    rows = memory(fine=LABELS, coarse=LABELS)
    with pytest.raises(ValueError, match=r"label_column must name a column, .*; the data set has img, fine, coarse"):
        image_rows(rows)
    assert set(image_rows(rows, labelled=False).column_names) == {"image"}
    assert set(image_rows(rows, label_column="coarse").column_names) == {"image", "label"}
    with pytest.raises(ValueError, match='image_column "picture" is not a column of the data set; it has img'):
        image_rows(rows, "picture")
    with pytest.raises(ValueError, match='image_column "fine" must hold images, their bytes or their paths'):
        image_rows(rows, "fine", "coarse")
    with pytest.raises(ValueError, match="the data set has no rows"):
        image_rows(rows.select([]))


def test_fingerprint_depends_on_the_content(tmp_path):
    rows = image_rows(memory(label=LABELS))
    again = image_rows(memory(label=LABELS).cast_column("img", Image()))
    others = [
        image_rows(memory(label=LABELS[::-1])),
        rows.select(range(5)),
        image_rows(Dataset.from_dict({"img": PICTURES[::-1], "label": LABELS}).cast_column("img", Image())),
    ]
    assert fingerprint(rows) == fingerprint(again)
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 4
    gone = Dataset.from_dict({"image": [str(tmp_path / "gone.png")]}, features=Features(image=Value("string")))
    assert fingerprint(image_rows(gone, labelled=False))  # an unreadable image is not an error here


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs shared/data/cifar10")
def test_cifar10():
    rows = image_rows(load_splits(str(CIFAR10))["test"])
    assert label_names(rows)[:2] == ["airplane", "automobile"]
    assert decode(rows[0]["image"]).shape == (3, 32, 32)
    assert encoded(rows[0]["image"])[:2] == b"\xff\xd8"


# --- unreadable images


class Loader:
    """Two steps of two micro-batches; images 3 and 2^40 + 5 of the data set are bad."""

    def steps_per_epoch(self, epoch=0):
        return 2

    def epoch(self, epoch, start=0):
        steps = [[{"bad": []}, {"bad": [(3, "a.png: broken")]}], [{"bad": [(5, "no image")]}, {"bad": []}]]
        return iter(steps[start:])


def test_bad_images_are_reported_once_and_removed_from_the_batch(caplog):
    loader = WatchedLoader(Loader(), max_bad_images=2)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            assert list(loader.epoch(epoch)) == [[{}, {}], [{}, {}]]
    assert caplog.messages == ["image 3 is left out: a.png: broken", "image 5 is left out: no image"]
    assert loader.bad == {3: "a.png: broken", 5: "no image"}
    assert loader.steps_per_epoch() == 2 and list(loader.epoch(0, start=1)) == [[{}, {}]]


def test_too_many_bad_images_end_the_run():
    epoch = WatchedLoader(Loader(), max_bad_images=1).epoch(0)
    next(epoch)
    with pytest.raises(ValueError, match=r"max_bad_images=1 allows: image 3: a.png: broken; image 5: no image$"):
        next(epoch)
    with pytest.raises(ValueError, match="max_bad_images must be at least 0, got -1"):
        WatchedLoader(Loader(), -1)


def test_missing_value_markers_are_classes_in_image_metadata(tmp_path):
    """pandas, with which `datasets` reads metadata.csv, would treat "NA" and "None" as missing values."""
    rows = ["file_name,label"]
    for number, label in enumerate(["NA", "None", "null", "cat", ""]):
        PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{label}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    found = image_rows(load_splits(str(tmp_path))["train"])
    assert sorted(label or "" for label in found["label"]) == ["", "NA", "None", "cat", "null"]
    assert label_names(found) == ["NA", "None", "cat", "null"]
