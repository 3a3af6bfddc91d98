"""Errors of predicted videos: definitions, and the structural similarity of scikit-image."""

import numpy as np
import pytest
import torch

from hf_tfm.metrics.video import FrameErrors, structural_similarity


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.RandomState(0)
    images = random.rand(3, 2, 12, 9)
    return torch.from_numpy(images), torch.from_numpy(np.clip(images + 0.2 * random.randn(3, 2, 12, 9), 0, 1))


# skimage.metrics.structural_similarity(x, y, data_range=1.0, channel_axis=...) of scikit-image 0.26.0
SSIM = [0.8327480016399913, 0.8582116338767235, 0.8530801376938928]


def test_structural_similarity_is_that_of_scikit_image():
    first, second = pair()
    np.testing.assert_allclose(structural_similarity(first, second).numpy(), SSIM, rtol=1e-9)
    assert torch.equal(structural_similarity(first, first), torch.ones(3).double())
    with pytest.raises(ValueError, match="frames must have at least 7 x 7 pixels for SSIM"):
        structural_similarity(first[..., :6], second[..., :6])


def test_installed_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    first, second = (one.numpy() for one in pair())
    found = [
        metrics.structural_similarity(x, y, data_range=1.0, channel_axis=0) for x, y in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(found, SSIM, rtol=1e-9)


def test_errors_are_sums_over_pixels_and_means_over_videos():
    """In two batches, and joined from two ranks."""
    torch.manual_seed(0)
    predictions, targets = torch.rand(5, 3, 2, 8, 9) * 1.2, torch.rand(5, 3, 2, 8, 9)
    one, other = FrameErrors(), FrameErrors()
    one.add(predictions[:2], targets[:2])
    other.add(predictions[2:], targets[2:])
    one.join(other)
    difference = (predictions - targets).double()
    squared = difference.square().sum(dim=(2, 3, 4)).mean(dim=0)
    by_frame = one.by_frame(("mse", "mae", "ssim", "gone"))
    assert one.videos == 5 and by_frame.keys() == {"mse", "mae", "ssim"}
    assert by_frame["mse"] == pytest.approx(squared.tolist())
    assert by_frame["mae"] == pytest.approx(difference.abs().sum(dim=(2, 3, 4)).mean(dim=0).tolist())
    clipped = structural_similarity(predictions.clamp(max=1).flatten(0, 1), targets.flatten(0, 1)).view(5, 3)
    assert by_frame["ssim"] == pytest.approx(clipped.mean(dim=0).tolist())
    means = one.means()
    assert means["mse"] == pytest.approx(squared.mean().item()) == pytest.approx(means["pixel_mse"] * 2 * 8 * 9)
    small = FrameErrors()
    small.add(predictions[..., :4], targets[..., :4])
    assert small.means().keys() == {"mse", "mae", "pixel_mse"}
