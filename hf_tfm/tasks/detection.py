"""Detection and panoptic segmentation: what one training step computes, and what a model finds in a data set.

scenes on a canvas -> predictions of all decoder layers -> matched to objects -> sums of class, box and mask terms
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from ..data.scene_augment import SceneAugmentation
from ..hub.detectors import detections, panoptic_maps
from ..metrics import CocoAP, PanopticQuality
from ..metrics.streaming import StreamingMetric
from ..models.configuration_detr import TfmDetrConfig
from ..models.set_loss import query_weight
from .base import Batch, Loader, mean
from .scenes import SceneTask

# Terms of the loss by the names that the model gives them.
TERMS = {"class": "loss_ce", "box": "loss_bbox", "giou": "loss_giou"}
MASK_TERMS = {"mask": "loss_mask", "dice": "loss_dice"}


class DetectionTask(SceneTask):
    """The loss over matched pairs; with ``masks`` also that of their masks.

    Args:
        config: of the model.
        processor, ids, augmentation, masks, seed: see `SceneTask`.
    """

    item = "images"
    term = "image"

    def __init__(
        self,
        config: TfmDetrConfig,
        processor: BaseImageProcessor,
        ids: Sequence[int],
        augmentation: SceneAugmentation | None = None,
        masks: bool = False,
        seed: int = 0,
    ):
        super().__init__(processor, ids, augmentation, masks, seed)
        self.config = config
        self.term_names = TERMS | (MASK_TERMS if masks else {})

    def make_batch(self, *args, **kwargs) -> Batch:
        """See `SceneTask.collate`; ``padded`` says whether any image is."""
        batch = super().make_batch(*args, **kwargs)
        return batch | {"padded": not bool(batch["pixel_mask"].all())}

    def count(self, batch: Batch) -> dict[str, float]:
        """Images, and what each term of the loss is divided by."""
        labels = batch["labels"] if batch["images"] else []
        counts = [len(label["class_labels"]) for label in labels]
        terms = dict.fromkeys(self.term_names, float(sum(counts)))
        terms["class"] = query_weight(counts, self.config.num_queries, self.config.eos_coefficient)
        return {"image": batch["images"], **terms}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted sums of every term, over all decoder layers."""
        return self.terms(self.predict(model, batch, learn=True))

    def terms(self, output: ModelOutput) -> dict[str, Tensor]:
        """The terms of `losses` in an output of `predict`."""
        if "loss_sums" not in output:  # sharded models exchange weights in every pass: a rank with nothing takes part
            nothing = sum(0.0 * value.float().sum() for value in output.values() if isinstance(value, Tensor))
            return dict.fromkeys(self.term_names, nothing)
        return {term: output.loss_sums[name] for term, name in self.term_names.items()}

    def predict(self, model: nn.Module, batch: Batch, learn: bool = False) -> ModelOutput:
        """The model's output for a batch; with ``learn`` and images that count, ``loss_sums`` holds sums."""
        return model(**self.inputs(batch), **(self.target_inputs(batch) if learn else {}))

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        """What a model is given to read."""
        pixels = self.pixels.scale_padded(batch["pixel_values"], batch["pixel_mask"])
        return {"pixel_values": pixels, "pixel_mask": batch["pixel_mask"] if batch["padded"] else None}

    def target_inputs(self, batch: Batch) -> dict[str, Any]:
        """What a model that learns is given beside it; of images that do not count, nothing."""
        if not batch["images"]:
            return {}
        return {"labels": batch["labels"]}

    def places(self, batch: Batch) -> None:
        """None: every query has a target, if it is that there is no object."""

    def hard_losses(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """`losses` of an output that was computed with `target_inputs`."""
        return self.terms(output)


@torch.inference_mode()
def score(
    accelerator: Accelerator, task: DetectionTask, model: nn.Module, loader: Loader, segments: bool = False
) -> dict[str, Any]:
    """Mean losses, COCO's average precision and, with ``segments``, panoptic quality over a data set.

    Each rank predicts its share, and all have the result; memory does not grow with pixels.

    Returns:
        ``loss`` and its terms, what `CocoAP` gives, and, with ``segments``, the scores of `PanopticQuality` but for
        those of each class.
    """
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    metrics: list[StreamingMetric] = [CocoAP(class_names=names)]
    if segments:
        metrics.append(PanopticQuality(class_names=names, thing_ids=task.config.thing_ids))
    totals: dict[str, Tensor] = {}
    training = model.training
    model.eval()
    for micro_batches in loader.epoch(0):
        for batch in micro_batches:
            references = batch.pop("references")
            batch = send_to_device(batch, accelerator.device)
            output = task.predict(model, batch, learn=True)
            counts = task.count(batch)
            for term, total in task.terms(output).items():
                pair = torch.stack([total.double(), total.new_tensor(counts[term], dtype=torch.float64)])
                totals[term] = totals.get(term, 0) + pair
            if not batch["images"]:
                continue
            metrics[0].add_batch(predictions=detections(task.pixels.processor, output, batch), references=references)
            if segments:
                maps = panoptic_maps(task.pixels.processor, output, batch)
                metrics[1].add_batch(predictions=maps, references=references)
    model.train(training)
    means = {term: mean(*total).item() for term, total in accelerator.reduce(totals).items()}
    found: dict[str, Any] = {"loss": sum(means.values()), **means}
    for metric in metrics:
        if accelerator.num_processes > 1:
            metric.merge(gather_object([metric.state()]))
        found = {**metric.compute(), **found}  # the classes of boxes come first
    return found
