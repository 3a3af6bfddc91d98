"""Masked image modelling: what one training step of a masked autoencoder computes (He et al. 2021, section 3).

uint8 images + noise (B, N) -> hide all but K of N patches -> sum over hidden patches of the mean squared error
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.augment import Augmentation
from ..data.batching import rng
from ..hub.pretrained import load_to_train
from ..models.configuration_mae import TfmMAEConfig
from ..models.modeling_mae import TfmMAEForPreTraining, num_visible
from ..models.patches import patch_grid
from .images import Batch, ImageTask


def load_autoencoder(source: str, fields: dict[str, Any]) -> TfmMAEForPreTraining:
    """A masked autoencoder to train further, of ``model_name_or_path``; a decoder that was not saved is drawn anew.

    Args:
        source: folder or Hub id.
        fields: of its configuration that change.

    Raises:
        ValueError: weights of its encoder are missing or do not fit; see `load_to_train`.
    """

    def head_of(model: PreTrainedModel, name: str) -> str:
        return "decoder" if name.startswith("decoder.") else ""

    return load_to_train(TfmMAEForPreTraining, source, head_of, fields)[0]


class MaskedImageTask(ImageTask):
    """Reconstruction of hidden patches.

    Which patches of a sample are hidden follows from (seed, epoch, index) alone; in evaluation the epoch is always 0,
    so every evaluation hides the same.

    Args:
        config: of the model.
        processor: of the model; it gives the size of images, which need not be the configuration's.
        augmentation, seed: see `ImageTask`.

    Raises:
        ValueError: the patch does not divide the processor's images, or nothing is hidden.
    """

    item = "hidden patches"
    term = "patch"

    def __init__(
        self,
        config: TfmMAEConfig,
        processor: BaseImageProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        super().__init__(processor, augmentation, seed)
        rows, columns = patch_grid(*self.pixels.size, config.patch_size, "the processor's size")
        self.patches = rows * columns
        self.hidden = self.patches - num_visible(self.patches, config.mask_ratio)
        if not self.hidden:
            raise ValueError(f"mask_ratio={config.mask_ratio} hides none of {self.patches} patches")

    def targets(
        self,
        examples: list[dict[str, Any]],
        indices: list[int],
        places: list[int],
        epoch: int,
        count: int,
        training: bool,
    ) -> Batch:
        """``noise`` (B, N) float32, which decides what is hidden."""
        noise = [rng(self.seed, epoch, index).random(self.patches, dtype=np.float32) for index in indices]
        return {"noise": torch.from_numpy(np.stack(noise))}

    def count(self, batch: Batch) -> dict[str, int]:
        """Hidden patches."""
        return {"patch": batch["images"] * self.hidden}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model is given to read."""
        return {"pixel_values": self.pixels.scale(batch["pixel_values"]), "noise": batch["noise"]}

    def places(self, batch: Batch) -> None:
        """None: there are no logits."""

    def hard_losses(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """`losses` of an output."""
        return {"patch": output.loss * self.count(batch)["patch"]}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The mean squared error of a patch's pixels, summed over hidden patches."""
        return self.hard_losses(model(**self.inputs(batch)), batch)
