"""What the recipes of detection and panoptic segmentation share: their knobs, rows, loaders, model and scores."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel, set_seed

from ..arguments import DatasetArguments, ImageBatchArguments, ImageDataArguments, ImageScaleArguments, SplitArguments
from ..data import detection
from ..data.batching import StepLoader
from ..data.detection import category_ids, check_order, class_names
from ..data.images import WatchedLoader
from ..data.pixels import pixel_scale
from ..data.scene_augment import SceneAugmentation
from ..data.scenes import require_scenes
from ..data.shape_batches import ShapeSampler
from ..data.source import describe_rows, describe_source
from ..hub.loading import load_config
from ..hub.pretrained import OBJECTS, load_to_train
from ..limits import LARGEST_SIDE
from ..memory import new_model
from ..models.backbones import TimmFeatures
from ..models.configuration_detr import TfmDetrConfig
from ..tasks.detection import DetectionTask, score
from ..tasks.loaders import placement
from ..tasks.model_fields import check_fields, fresh_head, label_fields, new_config
from ..tasks.scenes import scene_processor
from .run import Run, finish
from .scene_pictures import PredictionPictures

log = logging.getLogger(__name__)

CLASSIFIER, QUERIES = "class_labels_classifier", "query_position_embeddings"  # modules whose size the data decides
HEADS = (CLASSIFIER, "bbox_predictor", "mask_head", "bbox_attention", "num_batches_tracked")
COLUMNS = ("image_column", "objects_column", "panoptic_column")  # recipes have different ones
# What is reported of a split, in this order; of a data set without such objects a score is NaN, and left out.
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100", "PQ", "SQ", "RQ", "PQ_th", "PQ_st")


@dataclass(kw_only=True)
class SceneRunArguments(
    DatasetArguments, SplitArguments, ImageDataArguments, ImageScaleArguments, ImageBatchArguments
):
    """Knobs of scenes: images of any size with objects in them.

    Args:
        test_splits: splits that are only scored, in the end.
        shortest_side: pixels of the shortest side in evaluation.
        longest_side: limit of the longest side there.
        augmentation: see `SceneAugmentation`.
        pretrained_backbone: take timm's weights for the backbone of a new model.
        num_pictures: validation images drawn with their predictions at every evaluation, see `PredictionPictures`.

    The others are those of `PixelArguments`; ``model`` takes, among others, backbone, num_queries, encoder_layers.
    """

    fitting: ClassVar = OBJECTS

    test_splits: list[str] = field(default_factory=list)
    shortest_side: int = 800
    longest_side: int = 1333
    augmentation: SceneAugmentation = field(default_factory=SceneAugmentation)
    pretrained_backbone: bool = False
    num_pictures: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="num_pictures",
            at_least_1="shortest_side longest_side",
            at_most={"num_pictures": 100, "longest_side": LARGEST_SIDE},
        )
        if self.shortest_side > self.longest_side:
            raise ValueError(
                f"shortest_side must be at most longest_side = {self.longest_side}, got {self.shortest_side}"
            )
        check_fields(TfmDetrConfig, self.model, taken=("thing_ids", "num_channels"))
        if self.model_name_or_path:
            if self.pretrained_backbone:
                raise ValueError("model_name_or_path brings its own backbone: give no pretrained_backbone beside it")
            return
        config = new_config(TfmDetrConfig, self)
        if config.backbone_norm == "frozen" and not self.pretrained_backbone:
            raise ValueError(
                'model.backbone_norm "frozen" is for weights that are trained already: give pretrained_backbone, '
                'model_name_or_path, or backbone_norm "batch" or "group"'
            )
        if config.backbone_norm == "group" and self.pretrained_backbone:
            raise ValueError(
                'pretrained_backbone has batch norms: model.backbone_norm must be "frozen" or "batch", got "group"'
            )


def describe(args: SceneRunArguments, rows: dict[str, datasets.Dataset]) -> dict[str, Any]:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset_name,
        "name": args.dataset_config,
        **describe_source(args.dataset_name, args.dataset_revision),
        **{name: getattr(args, name) for name in COLUMNS if hasattr(args, name)},
        **describe_rows(rows, detection.fingerprint),
    }


def new_processor(args: SceneRunArguments) -> BaseImageProcessor:
    """The image processor of a new run."""
    return scene_processor(
        args.shortest_side, args.longest_side, *pixel_scale(args.model_name_or_path, args.mean, args.std)
    )


def labels_of(rows: datasets.Dataset) -> dict[str, Any]:
    """Fields of the configuration that name the classes of rows."""
    return label_fields(class_names(rows))


def build_detr(kind: type[PreTrainedModel], args: SceneRunArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """The model to train, with weights drawn at random or taken from ``model_name_or_path``.

    Args:
        kind: of the model.
        fields: of the configuration that the data decides.
    """
    if args.model_name_or_path:
        return load_detr(kind, args, fields)
    model = new_model(kind, new_config(TfmDetrConfig, args, **fields))
    if args.pretrained_backbone:
        next(module for module in model.modules() if isinstance(module, TimmFeatures)).load_pretrained()
    return model


def head_of(model: PreTrainedModel, name: str) -> str:
    """Head of a weight, for `load_to_train`; frozen norms count no batches, so those counts may be missing."""
    return next((head for head in HEADS if head in name.split(".")), "")


def load_detr(kind: type[PreTrainedModel], args: SceneRunArguments, fields: dict[str, Any]) -> PreTrainedModel:
    """The model of ``model_name_or_path`` as one for these classes; says which weights are new.

    One of transformers' own class learns from all decoder layers, as in the paper, unless the knobs say otherwise: its
    configuration has auxiliary losses turned off by default.

    Args:
        kind, fields: see `build_detr`.

    Raises:
        ValueError: weights that do not depend on the data do not fit.
    """
    saved = load_config(args.model_name_or_path, "model_name_or_path", trust_remote_code=None)
    earlier, auxiliary = saved.id2label, {"auxiliary_loss": True} if saved.model_type == "detr" else {}
    chosen = dict(args.model)
    queries = chosen.pop("num_queries", saved.num_queries)
    model, new = load_to_train(
        kind, args.model_name_or_path, head_of, chosen, resized=CLASSIFIER, **{**auxiliary, **fields}
    )
    if len(earlier) == len(fields["id2label"]) and earlier != fields["id2label"]:
        new.add(fresh_head(model, name_of(model, CLASSIFIER)))
    if queries != saved.num_queries:
        new |= resize_queries(model, queries)
    if new:
        log.warning("weights that model_name_or_path does not have start anew: %s", ", ".join(sorted(new)))
    return model


def name_of(model: PreTrainedModel, module: str) -> str:
    """The whole name of the one module that is called ``module``."""
    return next(name for name, _ in model.named_modules() if name.split(".")[-1] == module)


def resize_queries(model: PreTrainedModel, number: int) -> set[str]:
    """Let a model have ``number`` queries: the first of those it has, and new ones where they are not enough.

    Returns:
        The weights that have new rows.
    """
    name = name_of(model, QUERIES)
    old = model.get_submodule(name)
    new = nn.Embedding(number, old.embedding_dim)
    model._init_weights(new)
    kept = min(number, old.num_embeddings)
    with torch.no_grad():
        new.weight[:kept] = old.weight[:kept]
    setattr(model.get_submodule(name.rpartition(".")[0]), QUERIES, new)
    model.config.num_queries = number
    return {f"{name}.weight"} if number > kept else set()


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
    loader = StepLoader(rows, sampler, collate, args.micro_batch_size, **placement(args, accelerator))
    return WatchedLoader(loader, args.max_bad_images)


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


def warn_of_batch_norm(args: SceneRunArguments, accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Say that a step depends on how it is cut, where the backbone normalises by the images it sees at once."""
    cut = accelerator.num_processes > 1 or (args.micro_batch_size or args.batch_size) < args.batch_size
    if cut and model.config.backbone_norm == "batch":
        log.warning(
            'backbone_norm is "batch": its statistics are of one micro-batch on one process, so a step is not quite '
            'that of the whole batch; "group" and "frozen" norms make it so'
        )


def train_scenes(
    args: SceneRunArguments,
    run: Run,
    rows: dict[str, datasets.Dataset],
    build: Callable[[dict[str, Any]], PreTrainedModel],
    masks: bool = False,
) -> int:
    """Train, score and save; the exit status.

    Args:
        rows: of each split, by its name.
        build: fields of the configuration that the data decides -> the model to train.
        masks: whether it learns masks too.
    """
    accelerator, kind = run.accelerator, "image-segmentation" if masks else "object-detection"
    check_order(rows, args.train_split)
    require_scenes(rows, args.max_bad_images)
    run.open(args, kind, describe(args, rows), args.held_out)
    processor = run.load_or_create("processor", lambda: new_processor(args), AutoImageProcessor.from_pretrained)
    set_seed(args.seed)
    model = build(labels_of(rows[args.train_split]))
    warn_of_batch_norm(args, accelerator, model)
    tasks = {split: scene_task(args, model, processor, part, masks) for split, part in rows.items()}
    learning = scene_loader(args, accelerator, tasks[args.train_split], rows[args.train_split], learning=True)
    held_out = {
        split: scene_loader(args, accelerator, tasks[split], rows[split], learning=False)
        for split in (args.held_out, *args.test_splits)
    }
    per_epoch = learning.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)
    settled, line = args.resolve(per_epoch, max_steps)
    accelerator.print(line)

    def score_split(trained: nn.Module, split: str) -> dict[str, Any]:
        return score(accelerator, tasks[split], trained, held_out[split], segments=masks)

    def score_validation(trained: nn.Module) -> dict[str, float]:
        found = score_split(trained, args.held_out)
        names = ("loss", *tasks[args.held_out].term_names, "AP", "AP50", *(("PQ",) if masks else ()))
        return {name: found[name] for name in names}

    task, eval_steps = tasks[args.train_split], args.eval_steps or per_epoch
    show = PredictionPictures(
        accelerator, tasks[args.held_out], rows[args.held_out], args.output_dir, args.num_pictures
    )
    result = run.train(task, model, learning, settled, max_steps, eval_steps, score_validation, show)
    if result.stopped:
        return run.stopped(result)
    run.save(model.eval(), processor)
    metrics = [row for split in held_out for row in score_rows(score_split(model, split), split)]
    finish(run, model, task, result, metrics)
    return 0
