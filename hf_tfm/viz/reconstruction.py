"""Reconstructions of images by a masked autoencoder (He et al. 2021, arXiv:2111.06377, figure 2).

PIL image -> pixel values -> mask patches -> prediction -> undo the processor's scaling -> (H, W, 3) -> PNG
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.modeling_mae import TfmMAEForPreTraining
from .images import NamedImage, enlarge, is_masked_autoencoder, mask_ratio_of, name_of, pixels, size_option, visible
from .mosaic import Mosaic

GREY = 0.5  # value of masked patches
COLUMNS = ("original", "masked", "reconstructed", "reconstructed + visible")


@dataclass(frozen=True)
class Reconstruction:
    """An image as the model reads it, and its reconstruction. Images are (H, W, 3) float32 in [0, 1].

    Args:
        name: name of the image.
        original: the image.
        masked: the image with masked patches in grey.
        reconstructed: the prediction for every patch.
        pasted: the prediction at masked patches, the image elsewhere.
        mask: (rows, columns) bool, True = masked.
    """

    name: str
    original: np.ndarray
    masked: np.ndarray
    reconstructed: np.ndarray
    pasted: np.ndarray
    mask: np.ndarray


@torch.no_grad()
def reconstruct_images(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[NamedImage],
    mask_ratio: float | None = None,
    seed: int = 0,
) -> list[Reconstruction]:
    """Mask patches of images and reconstruct them with a model.

    With ``norm_pix_loss`` the model predicts normalised patches; they are rescaled with the mean and standard
    deviation of the true patch, as in the paper's figures. Otherwise the prediction would look like noise.

    Args:
        model: a `TfmMAEForPreTraining` or transformers' `ViTMAEForPreTraining`. Its state is restored.
        processor: processor of the model.
        images: results of `read_image`.
        mask_ratio: fraction of patches to mask, in [0, 1); by default the model's.
        seed: random seed of the masks.

    Raises:
        ValueError: the model is not a masked autoencoder, ``mask_ratio`` is out of range, or the patch size does not
            divide an image.
    """
    if not is_masked_autoencoder(model.config) or not hasattr(model, "decoder"):
        raise ValueError(f"model must be a masked autoencoder with its decoder, got {type(model).__name__}")
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        with mask_ratio_of(model, mask_ratio):
            return [reconstruct(model, processor, image, generator) for image in images]
    finally:
        model.train(training)


def reconstruct(
    model: PreTrainedModel, processor: Any, image: NamedImage, generator: torch.Generator
) -> Reconstruction:
    """Reconstruct one image of `reconstruct_images`."""
    pixel_values, (rows, columns) = pixels(model, processor, image.image)
    noise = torch.rand(1, rows * columns, generator=generator).to(model.device)
    outputs = model(pixel_values, noise=noise, **size_option(model, pixel_values))
    # Our method reads only the model's configuration, so it works for transformers' class too.
    fill = getattr(type(model), "reconstruct", TfmMAEForPreTraining.reconstruct)
    predicted, pasted = (
        fill(model, pixel_values, outputs.logits, mask) for mask in (torch.ones_like(outputs.mask), outputs.mask)
    )
    original = visible(processor, pixel_values)
    mask = outputs.mask.bool().view(rows, columns).cpu().numpy()
    return Reconstruction(
        name=image.name,
        original=original,
        masked=np.where(enlarge(mask, original)[..., None], np.float32(GREY), original),
        reconstructed=visible(processor, predicted),
        pasted=visible(processor, pasted),
        mask=mask,
    )


def plot_reconstructions(
    model: PreTrainedModel, reconstructions: Sequence[Reconstruction], output: str | Path
) -> Path:
    """Plot original, masked, reconstructed, and reconstructed with visible patches, one row per image.

    Args:
        model: model to name in the title.
        reconstructions: result of `reconstruct_images`.
        output: a ".png" file.
    """
    share = np.mean([one.mask.mean() for one in reconstructions])
    title = [f"{name_of(model)}: {share:.0%} of patches hidden; the prediction of visible ones is not trained"]
    if model.config.norm_pix_loss:
        title.append("normalised predictions, shown with mean and deviation of the true patch")
    panels = [[one.original, one.masked, one.reconstructed, one.pasted] for one in reconstructions]
    names = [one.name for one in reconstructions]
    return Mosaic(panels, rows=names, columns=list(COLUMNS), title=title).save(output)
