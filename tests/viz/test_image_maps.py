"""Attention maps over an image are the model's own, in the order of its patches."""

import numpy as np
import pytest
import torch
from image_models import image_model, image_processor, photo
from matplotlib.image import imread
from transformers import SwinConfig, SwinModel

from hf_tfm.viz import ImageMaps, attention_rollout, image_attention_maps, plot_image_attention
from hf_tfm.viz.image_maps import overlay, scaled
from hf_tfm.viz.mosaic import Mosaic

NAMES = ["vit", "mae", "native_vit", "native_mae"]


def own_maps(name: str, model, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Maps of every layer (1, H, 1 + N, 1 + N) in patch order; a masked autoencoder's are reordered."""
    model.set_attn_implementation("eager")
    if not name.endswith("mae"):
        return list(model(pixel_values, output_attentions=True).attentions)
    model.config.mask_ratio = 0.0
    outputs = model(pixel_values, output_attentions=True)  # any permutation of the patches
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + outputs.ids_restore[0]])
    assert not torch.equal(order, order.sort().values)
    return [maps[:, :, order][:, :, :, order] for maps in outputs.attentions]


@torch.no_grad()
@pytest.mark.parametrize("query", ["class", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_maps_equal_the_model_output(name, query):
    model, image = image_model(name), photo()
    maps = image_attention_maps(model, image_processor(), image, query)
    pixel_values = image_processor()(image.image, return_tensors="pt")["pixel_values"]
    attentions = own_maps(name, model, pixel_values)
    rollout = attention_rollout(attentions)[0]
    if query == "class":
        heads, rolled = torch.cat(attentions)[:, :, 0, 1:], rollout[0, 1:]
    else:
        heads, rolled = torch.cat(attentions)[:, :, 1:, 1:].mean(dim=2), rollout[1:, 1:].mean(dim=0)
    np.testing.assert_allclose(maps.heads, heads.reshape(3, 2, 4, 4), atol=1e-5)
    np.testing.assert_allclose(maps.rollout, rolled.reshape(4, 4), atol=1e-5)
    assert maps.query == query
    np.testing.assert_allclose(maps.image, np.asarray(image.image) / 255, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_gives_the_same_maps_and_is_restored(name, backend):
    expected = image_attention_maps(image_model(name), image_processor(), photo())
    model = image_model(name)
    model.set_attn_implementation(backend)
    model.train()
    maps = image_attention_maps(model, image_processor(), photo())
    np.testing.assert_array_equal(maps.heads, expected.heads)
    assert model.training and model.config._attn_implementation == backend
    if name.endswith("mae"):
        assert model.config.mask_ratio == 0.75


@pytest.mark.parametrize("name", ["vit", "mae", "native_vit"])
def test_non_square_images(name):
    maps = image_attention_maps(image_model(name), image_processor(), photo(12, 24))
    assert maps.image.shape == (12, 24, 3)
    assert (maps.heads.shape, maps.rollout.shape) == ((3, 2, 3, 6), (3, 6))


def test_hybrid_patches_are_cells_of_its_feature_map():
    model = image_model("vit", image_size=[64, 96], backbone="resnet10t", backbone_out_index=2)  # stride 8
    maps = image_attention_maps(model, image_processor(), photo(64, 90))
    assert maps.heads.shape == (3, 2, 2, 3)
    assert overlay(maps.image, maps.rollout).shape == (64, 90, 3)


def test_query_is_the_pooled_token():
    assert image_attention_maps(image_model("vit"), image_processor(), photo()).query == "class"
    assert image_attention_maps(image_model("vit", pooling="mean"), image_processor(), photo()).query == "mean"
    with pytest.raises(ValueError, match='query must be class or mean, got "cls"'):
        image_attention_maps(image_model("vit"), image_processor(), photo(), "cls")


@torch.no_grad()
def test_prediction_is_shown_with_its_probability():
    names = {0: "cat", 1: "dog", 2: "owl"}
    model, image = image_model("vit", num_labels=3, id2label=names), photo()
    maps = image_attention_maps(model, image_processor(), image)
    logits = model(image_processor()(image.image, return_tensors="pt")["pixel_values"]).logits[0]
    best = logits.argmax().item()
    assert maps.prediction == f"{names[best]} ({logits.softmax(0)[best]:.0%})"
    assert image_attention_maps(model.vit, image_processor(), image).prediction is None


def test_windowed_attention_is_refused():
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
    with pytest.raises(ValueError, match="SwinModel has no attention between all patches of an image"):
        image_attention_maps(SwinModel(config), image_processor(), photo())


@pytest.fixture
def maps() -> ImageMaps:
    """3 layers, 2 heads, 2 x 3 patches of an image of 8 x 12."""
    random = np.random.RandomState(0)
    image = random.rand(8, 12, 3).astype(np.float32)
    heads = random.rand(3, 2, 2, 3).astype(np.float32)
    return ImageMaps("tiny", "photo", image, "class", heads, random.rand(2, 3).astype(np.float32), "cat (97%)")


@pytest.fixture
def drawn(monkeypatch) -> list[Mosaic]:
    """The plots that are drawn, in order."""
    found = []
    save = Mosaic.save
    monkeypatch.setattr(Mosaic, "save", lambda mosaic, path: found.append(mosaic) or save(mosaic, path))
    return found


def test_plots_show_each_head_and_rollout(maps, drawn, tmp_path):
    files = plot_image_attention(maps, tmp_path / "new", layers=[-1, 0], heads=[1])
    assert files == [tmp_path / "new" / "heads.png", tmp_path / "new" / "rollout.png"]
    heads, rollout = drawn
    assert (heads.rows, heads.columns) == (["layer 2", "layer 0"], ["head 1"])
    for row, layer in zip(heads.panels, (2, 0), strict=True):
        np.testing.assert_array_equal(row[0], overlay(maps.image, scaled(maps.heads[layer, 1])))
    image, _, weighted = rollout.panels[0]
    np.testing.assert_array_equal(image, maps.image)
    strongest = np.unravel_index(maps.rollout.argmax(), (2, 3))
    patch = np.s_[4 * strongest[0] : 4 * strongest[0] + 4, 4 * strongest[1] : 4 * strongest[1] + 4]
    np.testing.assert_allclose(weighted[patch], maps.image[patch], rtol=1e-6)
    assert (weighted <= maps.image + 1e-6).all() and weighted.sum() < maps.image.sum()
    for mosaic, file in zip(drawn, files, strict=True):
        assert imread(file).shape == (int(mosaic.height * 100), int(mosaic.width * 100), 4)
        assert mosaic.title[1] == "photo, predicted: cat (97%)"


def test_color_follows_the_map(maps):
    weights = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    drawing = overlay(np.full((8, 12, 3), 0.5), weights)
    assert drawing.min() >= 0 and drawing.max() <= 1
    assert np.ptp(drawing[0, 0]) < 1e-6  # zero weight: gray like the image
    assert 0.2 < np.ptp(drawing[0, 4]) < np.ptp(drawing[0, 11])
    np.testing.assert_array_equal(drawing[0, 8:], drawing[3, 8:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, r"layers must be one or more of 0 to 2, got \[3\]"),
        ({"heads": []}, r"heads must be one or more of 0 to 1, got \[\]"),
    ],
)
def test_invalid_arguments_are_refused(maps, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_image_attention(maps, tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
