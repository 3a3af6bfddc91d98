"""Masked image modelling with a masked autoencoder (He et al. 2021, arXiv:2111.06377, section 3).

uint8 images + noise (B, N) -> hide all but K of N patches -> sum over hidden patches of the mean squared error
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.utils import ModelOutput

from ..arguments import ImageEvaluationArguments
from ..data.batching import Sample, rng
from ..data.pixels import image_size_of
from ..families import MASKED_AUTOENCODER
from ..hub.pretrained import IMAGE_PATCHES, load_to_train
from ..limits import SEEDS
from ..models.modeling_mae import num_visible
from ..models.patches import patch_grid
from .base import Batch, Scores
from .distillation import DistillationArguments
from .images import IMAGE_FIELDS, IMAGE_SIZE, ImageArguments, ImageCollator, ImageTask
from .model_fields import build_new, check_fields, head_of, new_config


@dataclass(kw_only=True)
class MaskedImageArguments(ImageArguments):
    """Pretraining of a masked autoencoder.

    Args:
        model: configuration fields that differ from those of the size, for example patch_size, mask_ratio,
            norm_pix_loss and the decoder's sizes.
    """

    accepted_models: ClassVar = IMAGE_PATCHES

    architecture: str = "mae"

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model != "loss":
            raise ValueError(f'metric_for_best_model must be "loss", got "{self.metric_for_best_model}"')
        if not self.model_name_or_path:
            check_fields(self.config_class, self.model, IMAGE_FIELDS)
            new_config(self.config_class, self, image_size=self.image_size or IMAGE_SIZE)


@dataclass(kw_only=True)
class MaskedImageDistillationArguments(DistillationArguments, MaskedImageArguments):
    """Distillation of a masked autoencoder; model.patch_size and model.mask_ratio must be the teacher's.

    Args:
        image_size: pixels of the images that both models read; default, the teacher's.
    """

    image_size: int | tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_cache(self.cache)
        if unfit := sorted({term.kind for term in self.terms} & {"soft_target", "hard_target", "logit", "query"}):
            raise ValueError(f"terms must not have {unfit[0]}: a masked autoencoder predicts pixels, not classes")


@dataclass(kw_only=True)
class MaskedImageEvaluationArguments(ImageEvaluationArguments):
    """Scoring a masked autoencoder.

    Args:
        seed: of the masks; the same for a sample in every evaluation.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="seed", at_most={"seed": SEEDS - 1})


@dataclass
class MaskedImageCollator(ImageCollator):
    """Adds ``noise`` (B, N) float32, which decides the hidden patches: a pure function of (seed, epoch, index).

    Args:
        patches: number N of patches.
    """

    patches: int = 0

    def targets(
        self, examples: list[dict[str, Any]], samples: list[Sample], positions: list[int], epoch: int, count: int
    ) -> Batch:
        """See `ImageCollator`."""
        noise = [rng(self.seed, epoch, sample).random(self.patches, dtype=np.float32) for sample in samples]
        return {"noise": torch.from_numpy(np.stack(noise))}


class MaskedImageTask(ImageTask):
    """Reconstruction of hidden patches. Every evaluation hides the same patches."""

    Arguments = MaskedImageArguments
    EvaluationArguments = MaskedImageEvaluationArguments
    DistillationArguments = MaskedImageDistillationArguments
    kind, hub_task = "masked autoencoders", "image-feature-extraction"
    item, term = "hidden patches", "patch"
    auto_class = AutoModelForPreTraining
    head_is_optional = True

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        return config.model_type in MASKED_AUTOENCODER.model_types() and "ForPreTraining" in "".join(
            config.architectures or ()
        )

    def build_model(self) -> PreTrainedModel:
        """See `Task`; for images of the processor's size."""
        args, size = self.args, image_size_of(self.processor)
        set_seed(args.seed)
        if not args.model_name_or_path:
            return build_new(new_config(args.config_class, args, image_size=size), args.head)
        model = load_autoencoder(args.model_name_or_path, args.model)
        if hasattr(model, "set_image_size"):  # of a family whose parameters depend on the size
            model.set_image_size(size)
        return model

    def build_student(self, teacher: PreTrainedConfig) -> PreTrainedModel:
        """See `Task`.

        Raises:
            ValueError: the teacher would see other patches.
        """
        student = self.build_model()
        for name in ("patch_size", "mask_ratio"):
            ours, theirs = getattr(student.config, name), getattr(teacher, name)
            if ours != theirs:
                raise ValueError(f"model.{name} must be the teacher's, {theirs}, got {ours}")
        return student

    def num_patches(self) -> tuple[int, int]:
        """Number of patches, and of hidden ones.

        Raises:
            ValueError: the patch size does not divide the processor's images, or no patch is hidden.
        """
        config = self.model.config
        rows, columns = patch_grid(*self.pixels.size, config.patch_size, "the processor's size")
        total = rows * columns
        hidden = total - num_visible(total, config.mask_ratio)
        if not hidden:
            raise ValueError(f"mask_ratio={config.mask_ratio} hides none of {total} patches")
        return total, hidden

    def collator(self, split: str = "", training: bool = False) -> MaskedImageCollator:
        """See `Task`."""
        patches, _ = self.num_patches()
        return MaskedImageCollator(self.pixels, self.args.seed, self.augment() if training else None, patches)

    def count(self, batch: Batch) -> dict[str, int]:
        """Hidden patches."""
        return {"patch": batch["images"] * self.num_patches()[1]}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`."""
        return {**super().inputs(batch), "noise": batch["noise"]}

    def output_losses(self, output: ModelOutput, logits: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the pixels of a patch, summed over hidden patches."""
        return {"patch": output["loss"] * self.count(batch)["patch"]}

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("reconstruction_loss",)

    def evaluate(self, model: Any, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean squared error of hidden patches, in the model's own scale, as "loss" and "reconstruction_loss"."""
        loader = self.evaluation_loader(split)
        loss = self.mean_losses(model, loader)["loss"]
        samples = len(self.splits[split]) - len(loader.bad)
        if not samples:
            raise ValueError("the data set has no image that can be read")
        details: dict[str, Any] = {"left_out": {"unreadable": len(loader.bad)}, "seed": self.args.seed}
        values = {"loss": loss, "reconstruction_loss": loss}
        return Scores(values, samples=samples, details=details, listing={"unreadable": loader.bad})


def load_autoencoder(source: str, fields: dict[str, Any]) -> Any:
    """Load a masked autoencoder to train further; a decoder that was not saved is initialised at random.

    Args:
        source: folder or Hub id.
        fields: configuration fields to change.

    Raises:
        ValueError: weights of its encoder are missing or do not fit; see `load_to_train`.
    """
    return load_to_train(MASKED_AUTOENCODER, source, head_of, fields)[0]
