"""What the recipes of detection and panoptic segmentation share: their knobs, rows, loaders, model and scores."""

import logging
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, BaseImageProcessor, PreTrainedModel

from ..data import detection
from ..data.batching import StepLoader
from ..data.detection import category_ids, class_names
from ..data.images import WatchedLoader
from ..data.scene_augment import SceneAugmentation
from ..data.shape_batches import ShapeSampler
from ..data.source import describe_rows, describe_source
from ..models import TfmDetrConfig
from ..tasks.detection import DetectionTask
from ..tasks.scenes import scene_processor
from .image_run import PictureArguments, check_fields, fresh_head, new_config, new_scale, placement

log = logging.getLogger(__name__)

# Weights that depend on the data: on its classes, and on how many objects an image may have.
OF_THE_DATA = ("class_labels_classifier.", "query_position_embeddings.")
# What is reported of a split, in this order; of a data set without such objects a score is NaN, and left out.
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100", "PQ", "SQ", "RQ", "PQ_th", "PQ_st")


@dataclass(kw_only=True)
class SceneRunArguments(PictureArguments):
    """Knobs of scenes: images of any size with objects in them.

    Args:
        test_splits: splits that are only scored, in the end.
        shortest_side: pixels of the shortest side in evaluation.
        longest_side: limit of the longest side there.
        augmentation: see `SceneAugmentation`.
        pretrained_backbone: take timm's weights for the backbone of a new model.

    The others are those of `PictureArguments`; ``model`` takes, among others, backbone, num_queries, encoder_layers.
    """

    test_splits: list[str] = field(default_factory=list)
    shortest_side: int = 800
    longest_side: int = 1333
    augmentation: SceneAugmentation = field(default_factory=SceneAugmentation)
    pretrained_backbone: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="shortest_side")
        if self.shortest_side > self.longest_side:
            raise ValueError(
                f"shortest_side must be at most longest_side = {self.longest_side}, got {self.shortest_side}"
            )
        check_fields(TfmDetrConfig, self.model, taken=("thing_ids",))
        if self.init_from:
            if self.pretrained_backbone:
                raise ValueError("init_from brings its own backbone: give no pretrained_backbone beside it")
            return
        config = new_config(TfmDetrConfig, self)
        if config.backbone_norm == "frozen" and not self.pretrained_backbone:
            raise ValueError(
                'model.backbone_norm "frozen" is for weights that are trained already: give pretrained_backbone, '
                'init_from, or backbone_norm "group"'
            )
        if config.backbone_norm == "group" and self.pretrained_backbone:
            raise ValueError(
                'pretrained_backbone has batch norms: model.backbone_norm must be "frozen" or "batch", got "group"'
            )


def describe(args: SceneRunArguments, rows: dict[str, datasets.Dataset]) -> dict[str, Any]:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset,
        "name": args.dataset_name,
        **describe_source(args.dataset, args.dataset_revision),
        "image_column": args.image_column,
        **describe_rows(rows, detection.fingerprint),
    }


def new_processor(args: SceneRunArguments) -> BaseImageProcessor:
    """The image processor of a new run."""
    return scene_processor(args.shortest_side, args.longest_side, *new_scale(args))


def labels_of(rows: datasets.Dataset) -> dict[str, Any]:
    """Fields of the configuration that name the classes of rows."""
    names = class_names(rows)
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def load_detr(kind: type[PreTrainedModel], args: SceneRunArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """The model of ``init_from`` as one for these classes; says which weights are new.

    Args:
        kind: of the model.
        fields: of the configuration that the data decides.

    Raises:
        ValueError: weights that do not depend on the data do not fit.
    """
    earlier = AutoConfig.from_pretrained(args.init_from).id2label
    model, report = kind.from_pretrained(
        args.init_from, ignore_mismatched_sizes=True, output_loading_info=True, **fields, **args.model
    )
    new = {name for name, *_ in report["mismatched_keys"]}
    if odd := sorted(name for name in new if not any(part in name for part in OF_THE_DATA)):
        raise ValueError(f"model: the weights of init_from {args.init_from} do not fit it: {', '.join(odd)}")
    if len(earlier) == len(fields["id2label"]) and earlier != fields["id2label"]:
        new.add(fresh_head(model, "class_labels_classifier"))
    if new := new | set(report["missing_keys"]):
        log.warning("weights that init_from does not have start anew: %s", ", ".join(sorted(new)))
    return model


def scene_loader(
    args: SceneRunArguments, accelerator: Accelerator, task: DetectionTask, rows: datasets.Dataset, learning: bool
) -> WatchedLoader:
    """Batches of a split, for training or evaluation."""
    sizes = np.stack([rows["height"], rows["width"]], axis=1)
    augmentation = args.augmentation if learning else None
    sampler = ShapeSampler(
        sizes, args.batch_size, augmentation, args.seed, drop_last=learning and len(rows) > args.batch_size
    )
    collate = task.collate_training if learning else task.collate
    return WatchedLoader(StepLoader(rows, sampler, collate, **placement(args, accelerator)), args.max_bad_images)


def scene_task(
    args: SceneRunArguments,
    model: nn.Module,
    processor: BaseImageProcessor,
    rows: datasets.Dataset,
    masks: bool = False,
) -> DetectionTask:
    """The task of a split; its categories are matched to the model's classes by name."""
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    ids = category_ids(rows, names)
    return DetectionTask(model.config, processor, ids, args.augmentation, masks, args.seed)


def score_rows(found: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The scores of a split as rows of name, value and split."""
    return [
        {"name": name, "value": found[name], "split": split}
        for name in SCORES
        if name in found and not np.isnan(found[name])
    ]
