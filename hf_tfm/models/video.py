"""Parts shared by the models that forecast videos: output, checks, patches and losses.

    videos (B, T, C, H, W), pixels in [0, 1] -> model -> logits (B, F, C, H, W) -> predictions, loss

Shapes: B videos; T frames that are read, F that are predicted; C channels; H, W pixels; P patch side.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .checks import require_at_least, require_choice
from .cross_entropy import IGNORE_INDEX
from .input_checks import require_elements, require_tensor
from .losses import Items, number_loss
from .patches import patch_grid, patchify, sides, unpatchify

# Loss of a configuration -> problem of `number_loss`.
LOSSES = {"bce": "binary cross-entropy", "mse": "regression"}
LENGTHS = ("context_length", "prediction_length", "num_channels")


@dataclass
class VideoForecastOutput(ModelOutput):
    """Output of a video forecaster.

    ``loss`` scalar; ``predictions`` (B, F, C, H, W), pixels, in [0, 1] for the loss "bce"; on request the
    ``hidden_states`` and ``attentions`` of the base model.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def validate_video_fields(config: Any) -> None:
    """Validate the fields that the configurations of all video forecasters share."""
    require_at_least(config, LENGTHS)
    require_choice(config, "loss", LOSSES)
    for name in ("image_size", "patch_size"):
        size = getattr(config, name)
        if (not isinstance(size, int) and len(size) != 2) or min(sides(size)) < 1:
            raise ValueError(f"{name} must be a number or a (height, width) pair of pixels, got {size}")
    patch_grid(*sides(config.image_size), config.patch_size, "image_size")


def check_videos(config: Any, videos: Tensor, name: str = "pixel_values_videos") -> tuple[int, int]:
    """Check videos (B, T, C, H, W) and return the number of rows and columns of patches in a frame.

    Raises:
        TypeError: they are not a tensor.
        ValueError: they are empty, have other channels than the model, or frames are not divisible into patches.
    """
    require_tensor(name, videos)
    if videos.dim() != 5 or videos.shape[2] != config.num_channels:
        raise ValueError(f"{name} must have shape (B, T, {config.num_channels}, H, W), got {tuple(videos.shape)}")
    require_elements(name, videos)
    return patch_grid(*videos.shape[3:], config.patch_size, name)


def frames_to_predict(config: Any, labels: Tensor | None, prediction_length: int | None) -> int:
    """Return the number of frames to predict: as given, those of the labels, or those of the configuration.

    Raises:
        ValueError: it is below 1, or differs from that of the labels.
    """
    given = prediction_length
    if given is not None and given < 1:
        raise ValueError(f"prediction_length must be at least 1, got {given}")
    if labels is None:
        return config.prediction_length if given is None else given
    if given is not None and given != labels.shape[1]:
        raise ValueError(f"prediction_length must be {labels.shape[1]}, the frames of labels, got {given}")
    return labels.shape[1]


def fold(frames: Tensor, patch_size: Any) -> Tensor:
    """Move the pixels of each patch to channels: (n, C, H, W) -> (n, P P C, H / P, W / P)."""
    grid = patch_grid(*frames.shape[2:], patch_size)
    return patchify(frames, patch_size).transpose(1, 2).unflatten(2, grid)


def unfold(maps: Tensor, patch_size: Any) -> Tensor:
    """Invert `fold`: (n, P P C, H / P, W / P) -> (n, C, H, W)."""
    height, width = sides(patch_size)
    size = (maps.shape[2] * height, maps.shape[3] * width)
    return unpatchify(maps.flatten(2).transpose(1, 2), patch_size, size)


def to_predictions(config: Any, logits: Tensor) -> Tensor:
    """Return the pixels that logits stand for: their sigmoid for the loss "bce", else the logits themselves."""
    return logits.sigmoid() if config.loss == "bce" else logits


def count_pixels(labels: Tensor) -> Tensor:
    """Return the number of pixel values with a label."""
    return (labels != IGNORE_INDEX).sum()


def forecast_loss(config: Any, logits: Tensor, labels: Tensor, num_items_in_batch: Items | None = None) -> Tensor:
    """Return the mean over pixel values of the binary cross-entropy ("bce") or of the squared error ("mse").

    The binary cross-entropy with pixels as target probabilities is that of Shi et al. 2015 (arXiv:1506.04214, section
    4.1), which sums over the pixels and frames of a sequence.

    Args:
        logits, labels: (B, F, C, H, W); labels in [0, 1], `IGNORE_INDEX` for none.
        num_items_in_batch: number of pixel values of the whole step, see `losses`.

    Raises:
        TypeError, ValueError: labels have another shape, or, on a CPU, values out of range.
    """
    require_tensor("labels", labels, tuple(logits.shape))
    return number_loss(LOSSES[config.loss], logits, labels, num_items_in_batch)


def over_frames(function: Any, videos: Tensor) -> Tensor:
    """Apply a function of images to all frames at once: (B, T, ...) -> (B, T, ...)."""
    return function(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])


def without_ignored(labels: Tensor) -> Tensor:
    """Return labels as input pixels, 0 where there is none."""
    return torch.where(labels == IGNORE_INDEX, 0.0, labels)
