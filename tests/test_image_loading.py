"""The image-loading benchmark compares equivalent pipelines."""

import pytest
from datasets import Dataset, Image
from torchvision import transforms

from benchmarks import image_loading, report
from hf_tfm.data.augment import Augmentation
from hf_tfm.data.images import decode, image_rows


@pytest.fixture(scope="module")
def rows():
    columns = {"image": [image_loading.photo(seed) for seed in range(4)], "label": [0, 1, 2, 3]}
    return image_rows(Dataset.from_dict(columns).cast_column("image", Image()))


def test_photos_have_a_natural_spectrum(rows):
    image = decode(rows[0]["image"]).float()
    assert image.shape == (3, *image_loading.PHOTO)
    assert image.std() > 30
    neighbours = (image[..., 1:] - image[..., :-1]).abs().mean()
    strangers = (image[..., 250:] - image[..., :250]).abs().mean()
    assert neighbours < strangers / 2
    assert image_loading.photo(0) != image_loading.photo(1)


def test_pipelines_give_equal_batches_without_random_crops(rows, monkeypatch):
    """Batches have the same images, up to the rounding of decoders and resizers."""
    monkeypatch.setattr(transforms, "RandomHorizontalFlip", lambda: lambda image: image)
    resize = transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC)
    augmentation = Augmentation(crop="none", flip=0.0)
    pipelines = image_loading.implementations(rows.select([0, 0, 0, 0]), 32, augmentation, resize, 2, 0)
    batches = [list(pipeline(0)) for pipeline in pipelines.values()]
    assert list(map(len, batches)) == [2, 2, 2]
    ours, uint8, peer = (both[0] for both in batches)
    assert ours.shape == peer.shape == uint8.shape == (2, 3, 32, 32)
    assert (ours - peer).abs().mean() < 0.02


def test_section_of_the_page():
    measured = {"images_per_second": {"ours": 3.0, "ours, uint8": 4.0, "pil": 2.0}, "ratios": {"a": 1.5, "b": 2.0}}
    results = {
        "num_workers": 0,
        "torchvision": "0.29",
        "threads": 1,
        "command": "c",
        "hardware": {"cpu": "x"},
        "versions": {"torch": "1", "transformers": "2"},
        "results": {"small": measured, "large": {**measured, "kilobytes": 9.5}},
    }
    page = report.image_loading(results)
    assert "| small | 3.0 | 4.0 | 2.0 | 1.5 | 2.0 |  |" in page
    assert "| large | 3.0 | 4.0 | 2.0 | 1.5 | 2.0 | 9.5 |" in page
