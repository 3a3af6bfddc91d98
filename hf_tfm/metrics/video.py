"""Errors of predicted videos: MSE and MAE of a frame, and its structural similarity, by frame of the forecast.

Shapes: B videos; F predicted frames; C channels; H, W pixels, with values in [0, 1].
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

WINDOW = 7  # side of the window of the structural similarity
K1, K2 = 0.01, 0.03  # its constants


def structural_similarity(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the structural similarity of images (Wang et al. 2004, doi:10.1109/TIP.2003.819861): (n, C, H, W) ->
    (n,).

    With uniform windows of 7 x 7 pixels, sample covariances and a range of 1, averaged over all windows inside of the
    image and over channels: scikit-image's defaults for ``data_range=1``.

    Raises:
        ValueError: images are smaller than the window.
    """
    if min(targets.shape[-2:]) < WINDOW:
        raise ValueError(f"frames must have at least {WINDOW} x {WINDOW} pixels for SSIM, got {tuple(targets.shape)}")
    x, y = predictions.double(), targets.double()
    planes = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)
    mean_x, mean_y, xx, yy, xy = avg_pool2d(planes, WINDOW, stride=1).unflatten(0, (5, -1))
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y, both = (sample * (xx - mean_x**2), sample * (yy - mean_y**2), sample * (xy - mean_x * mean_y))
    found = (2 * mean_x * mean_y + K1**2) * (2 * both + K2**2)
    found = found / ((mean_x**2 + mean_y**2 + K1**2) * (var_x + var_y + K2**2))
    return found.mean(dim=(1, 2, 3))


class FrameErrors:
    """Sums of errors by frame of the forecast, over videos.

    ``mse`` and ``mae`` of a frame are sums over its pixels and channels, as published for Moving MNIST; ``pixel_mse``
    is their mean; ``ssim`` is computed of predictions clipped to [0, 1] and is missing for frames smaller than its
    window.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.videos = 0

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Add videos (B, F, C, H, W)."""
        predictions, targets = predictions.double(), targets.double()
        difference = predictions - targets
        found = {
            "mse": difference.square().sum(dim=(2, 3, 4)),
            "mae": difference.abs().sum(dim=(2, 3, 4)),
            "pixel_mse": difference.square().mean(dim=(2, 3, 4)),
        }
        if min(targets.shape[-2:]) >= WINDOW:
            similar = structural_similarity(predictions.clamp(0, 1).flatten(0, 1), targets.flatten(0, 1))
            found["ssim"] = similar.unflatten(0, targets.shape[:2])
        for name, values in found.items():  # (B, F)
            self.sums[name] = self.sums.get(name, 0.0) + values.sum(dim=0).cpu()
        self.videos += len(targets)

    def join(self, other: "FrameErrors") -> None:
        """Add the sums of other videos."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.videos += other.videos

    def by_frame(self, names: Collection[str]) -> dict[str, list[float]]:
        """Return the mean over videos of some errors, for each frame."""
        return {name: (self.sums[name] / self.videos).tolist() for name in names if name in self.sums}

    def means(self) -> dict[str, float]:
        """Return the mean over videos and frames of each error."""
        return {name: (total.mean() / self.videos).item() for name, total in self.sums.items()}
