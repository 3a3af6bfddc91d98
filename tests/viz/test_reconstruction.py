"""Reconstructions: masked patches, predictions, and their scale."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_models import image_model, image_processor, photo
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from hf_tfm.viz import plot_reconstructions, reconstruct_images
from hf_tfm.viz.mosaic import Mosaic, shorten

NAMES = ["mae", "native_mae"]


def hidden_pixels(mask: np.ndarray, patch: int = 4) -> np.ndarray:
    """(rows, columns) -> (H, W), by hand."""
    rows, columns = mask.shape
    return np.array([[mask[y // patch, x // patch] for x in range(columns * patch)] for y in range(rows * patch)])


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_masked_patches_are_gray_or_replaced_by_predictions(name, norm_pix_loss):
    model, images = image_model(name, norm_pix_loss=norm_pix_loss), [photo(seed=1), photo(seed=2)]
    found = reconstruct_images(model, image_processor(), images)
    assert [one.name for one in found] == ["photo 1", "photo 2"]
    for one, image in zip(found, images, strict=True):
        np.testing.assert_allclose(one.original, np.asarray(image.image) / 255, atol=1e-6)
        assert one.mask.shape == (4, 4) and one.mask.sum() == 12
        hidden = hidden_pixels(one.mask)
        assert (one.masked[hidden] == 0.5).all()
        np.testing.assert_array_equal(one.masked[~hidden], one.original[~hidden])
        np.testing.assert_allclose(one.pasted[~hidden], one.original[~hidden], atol=1e-6)
        np.testing.assert_allclose(one.pasted[hidden], one.reconstructed[hidden], atol=1e-6)
        assert np.abs(one.reconstructed[~hidden] - one.original[~hidden]).max() > 0.1
    assert not np.array_equal(found[0].mask, found[1].mask)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_shown_in_pixel_scale(name, monkeypatch):
    """A model that is right in normalized scale must show the original image; its raw output would not."""
    image = photo(seed=3)
    for norm_pix_loss in (False, True):
        model = image_model(name, norm_pix_loss=norm_pix_loss)

        def right(pixel_values, noise, norm_pix_loss=norm_pix_loss):
            patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, C, rows, columns, P, P)
            target = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 16, 48)
            if norm_pix_loss:
                target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            return SimpleNamespace(logits=target, mask=(noise > 0.5).float())

        monkeypatch.setattr(model, "forward", right)
        (one,) = reconstruct_images(model, image_processor(), [image])
        np.testing.assert_allclose(one.reconstructed, one.original, atol=1e-5)
        np.testing.assert_allclose(one.pasted, one.original, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_prediction_equals_the_model_output(name):
    """Pixel by pixel, for one masked patch of an unnormalized model."""
    model, image = image_model(name), photo()
    (one,) = reconstruct_images(model, image_processor(), [image], seed=5)
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(5))
    pixel_values = image_processor()(image.image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values, noise=noise)
    np.testing.assert_array_equal(one.mask.ravel(), outputs.mask[0].bool())
    row, column = divmod(int(outputs.mask[0].argmax()), 4)
    values = outputs.logits[0, 4 * row + column].view(4, 4, 3).numpy()
    processor = image_processor()
    expected = (values * processor.image_std + processor.image_mean).clip(0, 1)
    drawn = one.reconstructed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_mask_ratio_and_seed():
    model, image = image_model("mae"), photo()
    model.train()
    for ratio, hidden in ((0.5, 8), (0.0, 0), (0.9, 15)):
        (one,) = reconstruct_images(model, image_processor(), [image], mask_ratio=ratio)
        assert one.mask.sum() == hidden
    assert model.config.mask_ratio == 0.75 and model.training
    masks = [reconstruct_images(model, image_processor(), [image], seed=seed)[0].mask for seed in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


def test_images_of_different_shapes_share_a_plot(tmp_path):
    model = image_model("mae", norm_pix_loss=True)
    found = reconstruct_images(model, image_processor(), [photo(), photo(12, 24), photo(24, 8)])
    assert [one.mask.shape for one in found] == [(4, 4), (3, 6), (6, 2)]
    assert [one.original.shape for one in found] == [(16, 16, 3), (12, 24, 3), (24, 8, 3)]
    file = plot_reconstructions(model, found, tmp_path / "new" / "plot.png")
    assert file == tmp_path / "new" / "plot.png" and imread(file).ndim == 3


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_mask_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must be in \[0, 1\), got {ratio}"):
        reconstruct_images(image_model("mae"), image_processor(), [photo()], mask_ratio=ratio)


@pytest.mark.parametrize("model", [lambda: image_model("vit"), lambda: image_model("mae").vit])
def test_other_model_types_are_refused(model):
    with pytest.raises(ValueError, match="model must be a masked autoencoder with its decoder, got Tfm"):
        reconstruct_images(model(), image_processor(), [photo()])


def test_panels_keep_the_aspect_ratio():
    images = [np.zeros((16, 16, 3)), np.zeros((8, 16, 3)), np.zeros((16, 4, 3))]
    mosaic = Mosaic([[image, image] for image in images], ["a", "b", "c" * 80], ["one", "two"], ["a title"])
    figure = mosaic.draw()
    width, height = figure.get_size_inches()
    boxes = [ax.get_position() for ax in figure.axes]
    ratios = [box.width * width / (box.height * height) for box in boxes]
    np.testing.assert_allclose(ratios, [1, 1, 2, 2, 0.25, 0.25], rtol=1e-6)
    for above, below in ((0, 2), (2, 4)):
        assert boxes[above].y0 > boxes[below].y1
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text.get_window_extent(renderer) for text in figure.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 100 * width and box.y1 <= 100 * height for box in texts)


def test_plot_of_too_many_images_is_refused():
    images = [np.zeros((2, 2, 3))] * 60
    with pytest.raises(ValueError, match=r"a picture of 60 x 60 images has .* million pixels, the limit is 80"):
        Mosaic([images] * 60, [""] * 60, [""] * 60, ["t"])


def test_long_names_keep_their_end():
    assert shorten("folder-of-photos-0017.png", 10) == "…-0017.png"
    assert shorten("short.png", 10) == "short.png"
