"""Videos of images that move over a canvas and bounce off its walls: Moving MNIST (Srivastava et al. 2015,
arXiv:1502.04681), with images of any data set.

    images of a split -> one per row, and others at random -> start and angle -> bounce -> join by maximum -> frames

The first image of a video is that of its row, so that a data set has as many videos as images, and the videos of two
splits share no image. Training videos are new in every epoch.

Shapes: K images of a split; n images of a video; T frames; C channels; H, W pixels of a frame; h, w of an image.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize, rgb_to_grayscale

from .images import IMAGE, BadImage, decode, describe

READ_AT_ONCE = 1000  # images
# Name of a data set -> data set of the images that move.
MOVING = {"moving-digits": "digits", "moving-mnist": "ylecun/mnist"}


@dataclass(frozen=True)
class MovingImages:
    """Generator of videos.

    Args:
        images: (K, C, h, w) uint8.
        size: (H, W), at least (h, w).
        number: n, images of a video.
        speed: distance that an image moves in a frame, as a fraction of its free range, H - h and W - w.
    """

    images: np.ndarray
    size: tuple[int, int]
    number: int
    speed: float

    def video(self, row: int, frames: int, random: np.random.Generator) -> "Motion":
        """Return the video of a row: the first image is that of the row; start and angle are uniform.

        Args:
            random: source of the other images, starts and angles.
        """
        others = random.integers(len(self.images), size=self.number - 1)
        places = random.random((self.number, 2))
        angles = random.random(self.number) * 2 * np.pi
        velocities = self.speed * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        found = np.empty((2, frames, self.number, 2))
        for frame in range(frames):
            found[:, frame] = places, velocities
            places = places + velocities
            hit = (places < 0) | (places > 1)
            places, velocities = places.clip(0, 1), np.where(hit, -velocities, velocities)
        return Motion(self.images[[row, *others]], self.size, *found)


@dataclass(frozen=True)
class Motion:
    """Images in motion.

    Args:
        images: (n, C, h, w) uint8.
        size: (H, W).
        places: (T, n, 2), vertical and horizontal, in [0, 1] of the free range.
        velocities: (T, n, 2), from a frame to the next.
    """

    images: np.ndarray
    size: tuple[int, int]
    places: np.ndarray
    velocities: np.ndarray

    def frames(self) -> np.ndarray:
        """Draw the frames, uint8 (T, C, H, W)."""
        return self.draw(self.places)

    def linear(self, frame: int, count: int) -> np.ndarray:
        """Draw ``count`` frames after a frame as if there were no walls: uint8 (count, C, H, W).

        Images, places and velocities in the frame are the true ones. Images leave the canvas.
        """
        places, found = self.places[frame], []
        for _ in range(count):
            places = places + self.velocities[frame]
            found.append(places)
        return self.draw(np.stack(found))

    def draw(self, places: np.ndarray) -> np.ndarray:
        """Draw images at places (T, n, 2), joined by their maximum: uint8 (T, C, H, W)."""
        side = self.images.shape[2:]
        corners = np.floor(places * np.subtract(self.size, side)).astype(int)
        canvas = np.zeros((len(places), self.images.shape[1], *self.size), np.uint8)
        for frame, row in zip(canvas, corners.tolist(), strict=True):
            for image, (top, left) in zip(self.images, row, strict=True):
                window = frame[:, max(top, 0) : max(top + side[0], 0), max(left, 0) : max(left + side[1], 0)]
                part = image[:, max(-top, 0) :, max(-left, 0) :][:, : window.shape[1], : window.shape[2]]
                np.maximum(window, part, out=window)
        return canvas


def read_images(rows: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read the images of rows of `image_rows`, resized: uint8 (K, channels, *size).

    Raises:
        ValueError: an image cannot be read.
    """
    found = np.empty((len(rows), channels, *size), np.uint8)
    for start in range(0, len(rows), READ_AT_ONCE):
        decoded = []
        for index, value in enumerate(rows[start : start + READ_AT_ONCE][IMAGE], start):
            try:
                decoded.append(decode(value))
            except BadImage as error:
                raise ValueError(f"image {index} cannot be read: {describe(value, error)}") from error
        groups = [decoded] if len({image.shape for image in decoded}) == 1 else [[image] for image in decoded]
        parts = [fitted(torch.stack(group), size, channels) for group in groups]
        found[start : start + READ_AT_ONCE] = torch.cat(parts).numpy()
    return found


def fitted(frames: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """Convert RGB frames to grey if there is one channel, and resize them: uint8 (T, 3, h, w) -> (T, channels, H,
    W)."""
    frames = rgb_to_grayscale(frames) if channels == 1 else frames
    if tuple(frames.shape[2:]) == tuple(size):
        return frames
    return resize(frames, list(size), InterpolationMode.BICUBIC, antialias=True)
