"""Image classification: what one training step computes, and what a model says of every image of a data set.

uint8 images, labels -> mixed with their neighbours, if at all -> logits -> sum of cross-entropies
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BaseImageProcessor

from ..data.augment import Augmentation, Mixing, mix, partners
from ..data.images import LABEL, is_label
from ..metrics import Accuracy
from .base import Loader
from .images import Batch, ImageTask

HEADS = ("classifier", "distillation_classifier")  # linear layers of a classifier; with both, it takes their mean
IGNORE_LABEL = -100  # of an image that is not labelled, or counts for nothing; torch's cross-entropy leaves it out


def heads_of(model: nn.Module) -> list[str]:
    """Which of `HEADS` a model has."""
    return [name for name in HEADS if hasattr(model, name)]


class ClassificationTask(ImageTask):
    """Cross-entropy of one label an image, or of two where images are mixed.

    Args:
        processor: of the model.
        label_ids: from labels as the data set stores them to the model's classes, see `data.images.label_ids`; for
            images without a label see `data.images.is_label`.
        augmentation, seed: see `ImageTask`.
        mixing: of training images; the sampler then needs ``unit=2``, see `Mixing`.
        label_smoothing: share of the target that is spread over all classes, in training alone.

    Raises:
        ValueError: ``label_smoothing`` is out of range.
    """

    term = "label"

    def __init__(
        self,
        processor: BaseImageProcessor,
        label_ids: Mapping[int | str, int],
        augmentation: Augmentation | None = None,
        mixing: Mixing | None = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(processor, augmentation, seed)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_ids, self.label_smoothing = dict(label_ids), label_smoothing
        self.mixing = mixing if mixing is not None and mixing.on else None

    def targets(
        self,
        examples: list[dict[str, Any]],
        indices: list[int],
        places: list[int],
        epoch: int,
        count: int,
        training: bool,
    ) -> Batch:
        """``labels`` (B,) int64, and for `mix`, where images are mixed, ``partner``, ``share`` and ``box``."""
        labels = [self.label_id(example[LABEL], index) for example, index in zip(examples, indices, strict=True)]
        batch = {"labels": torch.tensor(labels if count else [IGNORE_LABEL] * len(labels))}
        if training and self.mixing is not None:
            drawn = [self.mixing.draw(self.pixels.size, self.seed, epoch, index) for index in indices]
            batch["partner"] = torch.tensor(partners(places))
            batch["share"] = torch.tensor([share for share, _ in drawn])
            batch["box"] = torch.tensor([box for _, box in drawn])
        return batch

    def label_id(self, label: Any, index: int) -> int:
        """The model's class of a label.

        Raises:
            ValueError: there is no such class.
        """
        if not is_label(label):
            return IGNORE_LABEL
        if label not in self.label_ids:
            raise ValueError(f"label {label!r} of image {index} is not a class of the model")
        return self.label_ids[label]

    def count(self, batch: Batch) -> dict[str, int]:
        """Labelled images."""
        return {"label": int((batch["labels"] != IGNORE_LABEL).sum())}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model is given to read: images (B, 3, H, W), mixed where they are."""
        pixels = self.pixels.scale(batch["pixel_values"])
        if "partner" in batch:
            pixels = mix(pixels, batch["partner"], batch["share"], batch["box"])
        return {"pixel_values": pixels}

    def places(self, batch: Batch) -> None:
        """None: every row of logits has a target."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, classes)."""
        return model(**self.inputs(batch)).logits

    def hard_loss(self, logits: Tensor, batch: Batch, training: bool = True) -> Tensor:
        """Cross-entropy of logits (B, classes), summed over labelled images.

        Args:
            training: labels are smoothed.
        """
        smoothing = self.label_smoothing if training else 0.0
        logits, labels = logits.float(), batch["labels"]
        loss = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)  # (B,)
        if "partner" in batch:
            # The cross-entropy of a mixed target is the mix of the cross-entropies. A partner without a label has
            # none to give.
            other = labels[batch["partner"]]
            share = batch["share"] * (other != IGNORE_LABEL) * (labels != IGNORE_LABEL)
            loss = torch.lerp(loss, cross_entropy(logits, other, reduction="none", label_smoothing=smoothing), share)
        return loss.sum()

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, summed over labelled images."""
        return {"label": self.hard_loss(self.logits(model, batch), batch, model.training)}


@dataclass
class Predictions:
    """What a model says of every image of a data set, in the order of the data set; equal on all ranks.

    Args:
        indices: (N,) int64, of the samples; those that cannot be read are missing.
        labels: (N,) int64, `IGNORE_LABEL` where there is none.
        top: (N, k) int64, the k classes of the highest logits, best first.
        loss: mean cross-entropy of labelled images, NaN where there are none.
    """

    indices: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    loss: float


def score(found: Predictions) -> list[dict[str, Any]]:
    """Scores of predictions as rows of name, value in [0, 1] and signature, which is None."""
    values = Accuracy().compute(predictions=found.top.tolist(), references=found.labels.tolist())
    return [{"name": name, "value": value, "signature": None} for name, value in values.items()]


@torch.inference_mode()
def predict(
    accelerator: Accelerator, task: ClassificationTask, model: nn.Module, loader: Loader, k: int = 5
) -> Predictions:
    """Classify every image of a data set once, each rank its share.

    Args:
        task: gives the loader's ``collate``.
        k: classes kept for each image; fewer if the model has fewer.
    """
    training = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    for micro_batches in loader.epoch(0):
        for batch in micro_batches:
            if not batch["images"]:
                # Sharded models exchange weights in every forward: a rank with nothing to do takes part.
                task.logits(model, send_to_device(batch, accelerator.device))
                continue
            batch = send_to_device(batch, accelerator.device)
            logits = task.logits(model, batch).float()
            loss = cross_entropy(logits, batch["labels"], reduction="none")
            top = logits.topk(min(k, logits.shape[-1])).indices
            parts.append((batch["indices"], batch["labels"], loss, top))
    model.train(training)
    mine = [tuple(part.cpu().numpy() for part in columns) for columns in parts]
    everything = gather_object(mine) if accelerator.num_processes > 1 else mine
    if not everything:
        raise ValueError("the data set has no image that can be read")
    indices, labels, loss, top = (np.concatenate(column) for column in zip(*everything, strict=True))
    order = indices.argsort()
    labelled = labels != IGNORE_LABEL
    mean = float(loss[labelled].mean(dtype=np.float64)) if labelled.any() else float("nan")
    return Predictions(indices[order], labels[order], top[order], mean)
