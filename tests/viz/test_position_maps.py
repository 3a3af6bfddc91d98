"""Similarity of position embeddings."""

import numpy as np
import pytest
import torch
from image_models import image_model
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from hf_tfm.models.positions import sincos_2d
from hf_tfm.viz import plot_positions, position_similarity
from hf_tfm.viz.positions import draw


def cosines(table: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """One pair of patches at a time."""
    table = table.double().numpy()
    result = np.empty((rows, columns, rows, columns))
    for i, a in enumerate(table):
        for j, b in enumerate(table):
            result[i // columns, i % columns, j // columns, j % columns] = a @ b / np.sqrt((a @ a) * (b @ b))
    return result


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "native_vit"])
def test_learned_positions(name):
    model = image_model(name, image_size=[8, 12])
    table = model.vit.embeddings.position_embeddings[0, 1:]  # the [class] token's position comes first
    similarity = position_similarity(model)
    assert similarity.shape == (2, 3, 2, 3) and similarity.dtype == np.float32
    np.testing.assert_allclose(similarity, cosines(table, 2, 3), atol=1e-6)
    np.testing.assert_array_equal(similarity, position_similarity(model.vit))


@torch.no_grad()
def test_positions_by_row_and_column():
    model = image_model("vit", image_size=[8, 12], position_embedding_type="learned_2d")
    embeddings = model.vit.embeddings
    vectors = [
        torch.cat([embeddings.column_embeddings[c], embeddings.row_embeddings[r]]) for r in (0, 1) for c in (0, 1, 2)
    ]
    np.testing.assert_allclose(position_similarity(model), cosines(torch.stack(vectors), 2, 3), atol=1e-6)


@pytest.mark.parametrize(("name", "fields"), [("mae", {}), ("vit", {"position_embedding_type": "sincos_2d"})])
def test_fixed_positions(name, fields):
    model = image_model(name, image_size=[8, 12], **fields)
    similarity = position_similarity(model)
    np.testing.assert_allclose(similarity, cosines(sincos_2d(2, 3, 16), 2, 3), atol=1e-6)
    for row in range(2):
        for column in range(3):
            map_ = similarity[row, column]
            assert np.unravel_index(map_.argmax(), map_.shape) == (row, column)


def test_fixed_positions_of_the_native_class():
    native, ours = image_model("native_mae"), image_model("mae")
    native.vit.embeddings.position_embeddings.data.copy_(ours.vit.embeddings.position_embeddings)
    np.testing.assert_allclose(position_similarity(native), position_similarity(ours), atol=1e-6)
    native.vit.embeddings.position_embeddings.data.zero_()
    assert not position_similarity(native).any()


def test_maps_are_placed_at_their_patches():
    similarity = np.random.RandomState(0).uniform(-1, 1, (2, 3, 2, 3)).astype(np.float32)
    figure = draw(similarity, ["tiny: similarity", "learned positions"])
    ax, bar = figure.axes
    plane = ax.images[0].get_array()
    height, width = plane.shape
    down, across = (height + 4) // 2, (width + 4) // 3
    cell = (down - 4) // 2
    for row in range(2):
        for column in range(3):
            map_ = plane[row * down : (row + 1) * down - 4, column * across : (column + 1) * across - 4]
            np.testing.assert_array_equal(map_[cell // 2 :: cell, cell // 2 :: cell], similarity[row, column])
    assert plane.mask[down - 2].all() and plane.mask[:, across - 2].all()
    assert bar.get_ylim() == pytest.approx((similarity.min(), 1))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    # One value of the array is one pixel of the plot.
    box = ax.get_window_extent()
    assert (round(box.height), round(box.width)) == (height, width)


@pytest.mark.parametrize("side", [1, 20])
def test_any_grid_size(side, tmp_path):
    model = image_model("vit", image_size=4 * side)
    file = plot_positions(model, tmp_path / "new" / "positions.png")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    labels = draw(position_similarity(model), [""]).axes[0].get_xticklabels()
    assert 1 <= len(labels) <= 16


def test_models_without_patch_positions_are_refused():
    swin = SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    with pytest.raises(ValueError, match="SwinModel adds no table of position embeddings to its patches"):
        position_similarity(swin)
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(
        ValueError, match='"BertModel" is a bert model: pictures of images are for models of image patch'
    ):
        position_similarity(bert)
