"""Patchification and its inverse, the patch embedding, and position grids."""

import math

import pytest
import torch
from tiny_models import largest_difference

from hf_tfm.models.patches import PatchEmbedding, patch_grid, patchify, resize_grid, sides, unpatchify
from hf_tfm.models.positions import sincos_2d

SIZES = pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 4), ((4, 12), 4), ((12, 4), (2, 4)), ((6, 6), 1), ((9, 6), 3)], ids=str
)


@SIZES
@pytest.mark.parametrize("channels", [1, 3])
def test_patch_order(size, patch, channels):
    """Patches row by row; in a patch, pixels row by row, with the channels of a pixel adjacent."""
    images = torch.randn(2, channels, *size)
    height, width = sides(patch)
    expected = [
        torch.stack([images[:, :, y + i, x + j] for i in range(height) for j in range(width)], dim=1).flatten(1)
        for y in range(0, size[0], height)
        for x in range(0, size[1], width)
    ]
    patches = patchify(images, patch)
    assert torch.equal(patches, torch.stack(expected, dim=1))
    assert torch.equal(unpatchify(patches, patch, size), images)
    assert torch.equal(patchify(images.to(memory_format=torch.channels_last), patch), patches)


@SIZES
def test_embedding_equals_a_convolution(size, patch):
    embedding, images = PatchEmbedding(3, patch, 16), torch.randn(2, 3, *size)
    expected = embedding.projection(images).flatten(2).transpose(1, 2)
    assert embedding.check(images) == patch_grid(*size, patch)
    assert largest_difference(embedding(images), expected) < 1e-5
    keep = torch.tensor([[1, 0], [0, 1]])
    some = torch.stack([own[places] for own, places in zip(expected, keep, strict=True)])
    assert largest_difference(embedding(images, keep), some) < 1e-5
    called = []
    embedding.projection.register_forward_hook(lambda *_: called.append(1))
    assert largest_difference(embedding(images), expected) < 1e-5
    assert largest_difference(embedding(images, keep), some) < 1e-5
    assert len(called) == 2


def test_resizing_keeps_constants_and_slopes():
    rows, columns = 4, 6
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    table = torch.stack([torch.full_like(y, 7.0), y / rows, x / columns], dim=-1).view(1, rows * columns, 3)
    assert resize_grid(table, (rows, columns), (rows, columns)) is table
    larger = resize_grid(table, (rows, columns), (12, 24)).view(12, 24, 3)
    assert largest_difference(larger[..., 0], torch.full((12, 24), 7.0)) < 1e-5
    inner = larger[4:-4, 8:-8]  # border weights are truncated
    expected_y = ((torch.arange(12) + 0.5) / 12)[4:-4, None].expand(inner.shape[:2])
    expected_x = ((torch.arange(24) + 0.5) / 24)[None, 8:-8].expand(inner.shape[:2])
    assert (
        largest_difference(inner[..., 1], expected_y) < 1e-2 and largest_difference(inner[..., 2], expected_x) < 1e-2
    )
    assert resize_grid(table.bfloat16(), (rows, columns), (2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5)])
def test_2d_sine_cosine_positions(rows, columns):
    """The column in the first half of the features, the row in the second, each as sines followed by cosines."""
    dim = 16
    table = sincos_2d(rows, columns, dim).view(rows, columns, dim)
    for y in range(rows):
        for x in range(columns):
            angles = {coordinate: [coordinate / 10000 ** (i / 4) for i in range(4)] for coordinate in (x, y)}
            expected = [
                f(angle) for coordinate in (x, y) for f in (math.sin, math.cos) for angle in angles[coordinate]
            ]
            assert table[y, x].tolist() == pytest.approx(expected, abs=1e-6)


def test_errors_name_value_limit_and_argument():
    with pytest.raises(ValueError, match=r"pixel_values must be a multiple of the patch .* got 10 x 8 .* 4 x 4"):
        patchify(torch.zeros(1, 3, 10, 8), 4)
    with pytest.raises(ValueError, match="2 x 3 patches has 6 of them, got 5"):
        unpatchify(torch.zeros(1, 5, 48), 4, (8, 12))
    with pytest.raises(ValueError, match=r"image_size must be a multiple of the patch .* got 9 x 8"):
        unpatchify(torch.zeros(1, 4, 48), 4, (9, 8))
    with pytest.raises(ValueError, match=r"multiple of 16 features \(patch_size\), got 50"):
        unpatchify(torch.zeros(1, 4, 50), 4, 8)
    embedding = PatchEmbedding(3, 4, 16)
    for shape in ((1, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, H, W\), got"):
            embedding.check(torch.zeros(shape))
    with pytest.raises(ValueError, match="multiple of 4 for 2-D sine-cosine positions, got 6"):
        sincos_2d(2, 2, 6)
