"""Loading images, and converting a model's input back to an image."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from image_models import image_model, image_processor, photo
from PIL import Image

from hf_tfm import TfmMAEModel
from hf_tfm.data import images
from hf_tfm.data.digits import digits
from hf_tfm.hub.loading import load_image_processor
from hf_tfm.viz import read_image
from hf_tfm.viz.images import enlarge, load_autoencoder, load_encoder, pixels, visible


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data set of three images with another column before them, and a split without images."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"label": i, "picture": photo(seed=i).image} for i in range(3)]
    Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    other = tmp_path_factory.mktemp("words")
    Dataset.from_list([{"word": "one"}]).to_parquet(other / "test.parquet")
    return folder, other


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    read = read_image(str(tmp_path / "turned.png"))
    assert read.name == "turned.png"
    np.testing.assert_array_equal(np.asarray(read.image.convert("L")), np.rot90(np.asarray(image), -1))


def test_images_over_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    Image.new("RGB", (3, 4)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r'large.png" cannot be read: it has 4 x 3 pixels, more than the'):
        read_image(str(tmp_path / "large.png"))
    rows = Dataset.from_dict({"image": [{"bytes": (tmp_path / "large.png").read_bytes(), "path": None}]})
    rows.cast_column("image", ImageFeature()).to_parquet(tmp_path / "data" / "test.parquet")
    with pytest.raises(ValueError, match=r'data:test:0" cannot be read: it has 4 x 3 pixels'):
        read_image(f"{tmp_path / 'data'}:test:0")


@pytest.mark.parametrize(("index", "row"), [(0, 0), (2, 2)])
def test_data_set_row(rows, index, row):
    read = read_image(f"{rows[0]}:test:{index}")
    assert read.name == f"{rows[0].name} test {index}"
    np.testing.assert_array_equal(np.asarray(read.image), np.asarray(photo(seed=row).image))


@pytest.mark.parametrize("index", [-1, 3])
def test_row_index_out_of_range(rows, index):
    with pytest.raises(ValueError, match=f"index must be from 0 to 2 .*, got {index}"):
        read_image(f"{rows[0]}:test:{index}")


def test_embedded_data_set_row():
    read = read_image("digits:validation:7")
    assert read.name == "digits validation 7"
    np.testing.assert_array_equal(np.asarray(read.image), np.asarray(digits()["validation"][7]["image"]))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{0}:test:3", 'index must be from 0 to 2 for split "test" of ".*", got 3'),
        ("{0}:test:-4", "index must be from 0 to 2 .* got -4"),
        ("{0}:tset:0", 'split "tset" is not a split of the data set; it has test'),
        ("{1}:test:0", 'data set ".*" has no column of images; it has word'),
        ("{0}/nothing:test:0", "cannot be loaded"),
        ("{0}/no.png", 'there is no image ".*no.png": it must be a file, or a row of a data set, dataset:split:index'),
        ("{0}/test.parquet", 'test.parquet" cannot be read: '),
    ],
)
def test_invalid_image_source_is_refused(rows, where, message):
    with pytest.raises(ValueError, match=message):
        read_image(where.format(*rows))


@pytest.mark.parametrize("fields", [{}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}])
def test_model_input_is_converted_back(fields):
    image = photo(8, 12)
    values, grid = pixels(image_model("vit"), image_processor(**fields), image.image)
    assert (values.shape, grid) == ((1, 3, 8, 12), (2, 3))
    seen = visible(image_processor(**fields), values)
    assert (seen.dtype, seen.shape) == (np.float32, (8, 12, 3))
    np.testing.assert_allclose(seen, np.asarray(image.image) / 255, atol=1e-6)


def test_grayscale_models_read_grayscale():
    model = image_model("vit", num_channels=1)
    processor = image_processor(image_mean=[0.5], image_std=[0.5])
    image = photo()
    values, _ = pixels(model, processor, image.image)
    assert values.shape == (1, 1, 16, 16)
    grey = np.asarray(image.image.convert("L"))[..., None] / 255
    np.testing.assert_allclose(visible(processor, values), grey.repeat(3, axis=2), atol=1e-6)


def test_unsuitable_images_are_refused():
    with pytest.raises(ValueError, match=r"the image after its processor must be a multiple of the patch .* 18 x 16"):
        pixels(image_model("vit"), image_processor(), photo(18, 16).image)
    with pytest.raises(ValueError, match="num_channels must be 1 or 3 for a plot, got 4"):
        pixels(image_model("vit", num_channels=4), image_processor(), photo().image)


def test_patch_values_cover_their_pixels():
    values = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    large = enlarge(values, np.zeros((4, 9, 3)))
    for y in range(4):
        for x in range(9):
            assert large[y, x] == values[y // 2, x // 3]


@pytest.mark.parametrize("name", ["vit", "mae", "native_vit", "native_mae"])
def test_saved_model_is_loaded_with_its_head(name, tmp_path):
    model = image_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_encoder_is_not_an_autoencoder(tmp_path):
    image_model("mae").vit.save_pretrained(tmp_path)
    assert isinstance(load_encoder(str(tmp_path)), TfmMAEModel)
    with pytest.raises(ValueError, match=r"has no weights for decoder"):
        load_autoencoder(str(tmp_path))


def test_model_without_processor_is_refused(tmp_path):
    image_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no image processor"):
        load_image_processor(str(tmp_path))
    image_processor().save_pretrained(tmp_path)
    assert load_image_processor(str(tmp_path)).image_mean == image_processor().image_mean
