"""Image classification, from scratch, fine-tuned or as a linear probe.

uint8 images, labels -> mixed with their neighbours if asked for -> logits -> sum of cross-entropies -> accuracy
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.utils import ModelOutput

from ..arguments import ImageDataArguments, ImageModelEvaluationArguments
from ..data import images
from ..data.augment import Mixing, mix, partners
from ..data.batching import Sample, sample_ref
from ..data.images import LABEL, is_label, label_ids, label_names
from ..data.pixels import image_size_of
from ..families import IMAGE_CLASSIFIER
from ..hub.loading import load_config, read_json
from ..hub.pretrained import IMAGE_CLASSES, load_to_train
from ..metrics import Accuracy, RealAccuracy
from ..models.patches import Size
from ..writing import check_png
from .base import Batch, Loader, Scores
from .distillation import DistillationArguments
from .images import (
    IMAGE_FIELDS,
    IMAGE_SIZE,
    ImageArguments,
    ImageCollator,
    ImageTask,
)
from .labels import ClassNameArguments, class_names, is_unnamed, match_classes
from .linear_probe import fold_probe, heads_of, prepare_probe
from .model_fields import build_new, check_fields, dropout_fields, fresh_head, label_fields, new_config

CHECKED_IMAGES = 256  # images of a test split that are decoded before training
IGNORE_LABEL = -100  # label of an image without one, or that counts for nothing; torch's cross-entropy skips it
TOP = 5  # classes that are kept of each prediction


@dataclass(kw_only=True)
class LabelArguments(ClassNameArguments, ImageDataArguments):
    """How to read labelled images.

    Args:
        label_column: column of labels, a ClassLabel, integers or strings; default, the only ClassLabel or "label".
    """

    label_column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if None not in (self.image_column, self.label_column) and self.image_column == self.label_column:
            raise ValueError(f"image_column and label_column must be two columns, got {self.label_column} for both")


@dataclass(kw_only=True)
class LabelledImageArguments(LabelArguments, ImageArguments):
    """Training on labelled images.

    Args:
        label_smoothing: fraction of a label's target that is spread over all classes.
        mixing: mixup and CutMix of training images.
        model: configuration fields that differ from those of the size, or of model_name_or_path, for example
            patch_size, pooling and drop_path_rate.
    """

    accepted_models: ClassVar = IMAGE_CLASSES

    architecture: str = "vit"
    label_smoothing: float = 0.0
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.metric_for_best_model not in ("loss", "accuracy"):
            raise ValueError(f'metric_for_best_model must be "loss" or "accuracy", got "{self.metric_for_best_model}"')
        if not self.model_name_or_path:
            check_fields(self.config_class, self.model, IMAGE_FIELDS)


@dataclass(kw_only=True)
class ImageClassificationArguments(LabelledImageArguments):
    """Training an image classifier.

    Args:
        linear_probe: train a linear classifier on the frozen features of model_name_or_path, after a batch norm;
            dropout and drop path are off.
    """

    linear_probe: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.linear_probe and not self.model_name_or_path:
            raise ValueError("linear_probe needs model_name_or_path: features of random weights are not meaningful")
        if self.linear_probe and self.layer_wise_lr_decay != 1.0:
            raise ValueError(
                f"linear_probe trains a single layer: layer_wise_lr_decay must be 1, got {self.layer_wise_lr_decay}"
            )
        if not self.model_name_or_path:
            new_config(self.config_class, self, image_size=self.image_size or IMAGE_SIZE)


@dataclass(kw_only=True)
class ImageDistillationArguments(DistillationArguments, LabelledImageArguments):
    """Distillation of an image classifier. The teacher sees the mixed images; its targets are not smoothed.

    Args:
        image_size: pixels of the images that both models read; default, the teacher's.
    """

    image_size: int | tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_cache(self.cache, *["mixing"] * self.mixing.on)


@dataclass(kw_only=True)
class ImageClassificationEvaluationArguments(LabelArguments, ImageModelEvaluationArguments):
    """Scoring an image classifier.

    Args:
        match_labels: name matches labels to the model's classes of the same name, number to those of the same number.
            A model without names (LABEL_0 ...) is matched by number.
        real_labels: JSON file with the list of correct labels of each image of the split, such as real.json of
            ImageNet-ReaL; labels as the data set stores them.
        confusion: write the confusion matrix to this PNG file.
    """

    match_labels: Literal["name", "number"] = "name"
    real_labels: str | None = None
    confusion: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_png("confusion", self.confusion)


@dataclass
class ClassificationCollator(ImageCollator):
    """Adds ``labels`` (B,) int64, and for mixed images ``partner``, ``share`` and ``box``, see `mix`.

    Args:
        label_ids: from labels as stored to the model's classes; for images without a label see `data.images.is_label`.
        mixing: of training images; the sampler then needs ``unit=2``, see `Mixing`.
        label_smoothing: of training images.
    """

    label_ids: Mapping[int | str, int] = field(default_factory=dict)
    mixing: Mixing | None = None
    label_smoothing: float = 0.0

    def targets(
        self, examples: list[dict[str, Any]], samples: list[Sample], positions: list[int], epoch: int, count: int
    ) -> Batch:
        """See `ImageCollator`."""
        labels = [self.label_id(example[LABEL], sample) for example, sample in zip(examples, samples, strict=True)]
        batch: Batch = {"labels": torch.tensor(labels if count else [IGNORE_LABEL] * len(labels))}
        if self.label_smoothing:
            batch["label_smoothing"] = self.label_smoothing
        if self.mixing is not None:
            drawn = [self.mixing.draw(self.pixels.size, self.seed, epoch, sample) for sample in samples]
            batch["partner"] = torch.tensor(partners(positions))
            batch["share"] = torch.tensor([share for share, _ in drawn])
            batch["box"] = torch.tensor([box for _, box in drawn])
        return batch

    def label_id(self, label: Any, sample: Sample) -> int:
        """Return the model's class of a label.

        Raises:
            ValueError: there is no such class.
        """
        if not is_label(label):
            return IGNORE_LABEL
        if label not in self.label_ids:
            raise ValueError(f"label {label!r} of image {sample_ref(sample).index} is not a class of the model")
        return self.label_ids[label]


@dataclass
class Predictions:
    """Predictions for all images of a data set, in its order; equal on all ranks.

    Args:
        indices: (N,) int64, of the samples; unreadable images are missing.
        labels: (N,) int64, `IGNORE_LABEL` without a label.
        top: (N, k) int64, the k classes with the highest logits, best first.
        loss: mean cross-entropy of labelled images, NaN if there are none.
    """

    indices: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    loss: float

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool: the images with a label."""
        return self.labels != IGNORE_LABEL


class ImageClassificationTask(ImageTask):
    """Cross-entropy of one label per image, or of two if images are mixed."""

    Arguments = ImageClassificationArguments
    EvaluationArguments = ImageClassificationEvaluationArguments
    DistillationArguments = ImageDistillationArguments
    kind, hub_task = "image classifiers", "image-classification"
    term = "label"
    described_columns = ("image_column", "label_column")
    auto_class = AutoModelForImageClassification
    labelled = reports_cost = True

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`; also timm's models."""
        saved = "".join(config.architectures or ())
        return "ForImageClassification" in saved or config.model_type == "timm_wrapper"

    def load_splits(self) -> dict[str, Any]:
        """See `ImageTask`.

        Raises:
            ValueError: there is a single class; a label is not one of the training data's; or a sample of a test split
                has too many unreadable images, which would otherwise show after training.
        """
        self.splits = splits = super().load_splits()
        args = self.args
        if self.evaluating:
            rows, exact = len(splits[args.split]), args.max_samples is None
            self.real = read_real_labels(args.real_labels, rows, exact) if args.real_labels else None
            return splits
        names = label_names(splits[args.train_split])
        if len(names) < 2:
            raise ValueError(f'label_column has only one class, "{names[0]}": a classifier needs two or more')
        for split, rows in splits.items():
            check_labels(rows, split, names)
        images.tell_untrained(splits, args.train_split, names)
        for split in args.test_splits:
            check_readable(splits[split], split, args.max_bad_images)
        return splits

    def build_model(self) -> PreTrainedModel:
        """See `Task`; for images of the processor's size."""
        args, size = self.args, image_size_of(self.processor)
        names = label_names(self.splits[args.train_split])
        set_seed(args.seed)
        if not args.model_name_or_path:
            return build_new(new_config(args.config_class, args, image_size=size, **label_fields(names)), args.head)
        # A frozen encoder needs no regularisation.
        return load_classifier(args.model_name_or_path, names, size, args.model, without_dropout=args.linear_probe)

    def load_pretrained(self) -> None:
        """See `ImageTask`.

        Raises:
            ValueError: a label is not a class of the model, or the confusion matrix would be too large or empty.
        """
        super().load_pretrained()
        names = class_names(self.model.config)
        rows = self.splits[self.args.split]
        self.matched, self.ids = match_classes(rows, names, self.args.match_labels)
        if self.args.confusion:
            check_confusion(rows, names)

    def label_ids(self, split: str) -> Mapping[int | str, int]:
        """From labels as a split stores them to the model's classes."""
        if self.evaluating:
            return self.ids
        names = class_names(self.model.config)
        if split in self.splits:
            return label_ids(self.splits[split], names)
        numbers: dict[int | str, int] = {number: number for number in range(len(names))}
        return numbers if is_unnamed(names) else numbers | {name: number for number, name in enumerate(names)}

    @property
    def mixing(self) -> Mixing | None:
        """The mixing of training images, if it is on."""
        return self.args.mixing if self.args.mixing.on else None

    @property
    def unit(self) -> int:
        """Neighbours that are mixed stay together."""
        return 1 if self.mixing is None else 2

    def collator(self, split: str = "", training: bool = False) -> ClassificationCollator:
        """See `Task`."""
        ids = self.label_ids(split)
        if not training:
            return ClassificationCollator(self.pixels, label_ids=ids)
        args = self.args
        return ClassificationCollator(self.pixels, args.seed, self.augment(), ids, self.mixing, args.label_smoothing)

    def count(self, batch: Batch) -> dict[str, int]:
        """Labelled images."""
        return {"label": int((batch["labels"] != IGNORE_LABEL).sum())}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`: images (B, 3, H, W), mixed in training."""
        pixels = self.pixels.scale(batch["pixel_values"])
        if "partner" in batch:
            pixels = mix(pixels, batch["partner"], batch["share"], batch["box"])
        return {"pixel_values": pixels}

    def output_losses(self, output: ModelOutput, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits (B, classes), summed over labelled images."""
        smoothing = batch.get("label_smoothing", 0.0)
        logits, labels = logits.float(), batch["labels"]
        loss = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)  # (B,)
        if "partner" in batch:
            # The cross-entropy of a mixed target is the mix of the cross-entropies. Without a label, there is no mix.
            other = labels[batch["partner"]]
            share = batch["share"] * (other != IGNORE_LABEL) * (labels != IGNORE_LABEL)
            loss = torch.lerp(loss, cross_entropy(logits, other, reduction="none", label_smoothing=smoothing), share)
        return {"label": loss.sum()}

    # --- scores

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "accuracy")

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("accuracy", "top5_accuracy", "real_accuracy")

    @torch.inference_mode()
    def predict(self, model: nn.Module, loader: Loader) -> Predictions:
        """Classify every image of a data set once; each rank computes its share.

        Raises:
            ValueError: no image can be read.
        """
        training = model.training
        model.eval()
        parts: list[tuple[Tensor, ...]] = []
        for micro_batches in loader.epoch(0):
            for batch in micro_batches:
                batch = send_to_device(batch, self.accelerator.device)
                # Sharded models communicate in every forward pass, so a rank without images takes part.
                logits = model(**self.inputs(batch)).logits.float()
                if batch["images"]:
                    each = cross_entropy(logits, batch["labels"], reduction="none")
                    best = logits.topk(min(TOP, logits.shape[-1])).indices
                    parts.append((batch["indices"], batch["labels"], each, best))
        model.train(training)
        mine = [tuple(part.cpu().numpy() for part in columns) for columns in parts]
        everything = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        if not everything:
            raise ValueError("the data set has no image that can be read")
        indices, labels, loss, top = (np.concatenate(column) for column in zip(*everything, strict=True))
        order = indices.argsort()
        known = labels != IGNORE_LABEL
        mean = float(loss[known].mean(dtype=np.float64)) if known.any() else float("nan")
        return Predictions(indices[order], labels[order], top[order], mean)

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss, and accuracies in [0, 1]; none without labels."""
        loader = self.evaluation_loader(split)
        found = self.predict(model, loader)
        values = {"loss": found.loss}
        if found.labelled.any():
            values |= Accuracy().result_of(found.top.tolist(), found.labels.tolist())
        if not self.evaluating:
            return Scores(values)
        if self.real is not None:
            values["real_accuracy"] = real_accuracy(found, self.real, self.ids)
        self.found = found
        unlabelled = int((~found.labelled).sum())
        return Scores(
            values,
            samples=len(found.indices),
            details={
                "left_out": {"unreadable": len(loader.bad), "unlabelled": unlabelled},
                "match_labels": self.matched,
            },
            listing={"unreadable": loader.bad, "predictions": named(found, class_names(self.model.config))},
        )

    # --- a run and an evaluation

    def begin_training(self, loader: Loader) -> None:
        """See `Task`; prepare a linear probe."""
        if self.args.linear_probe:
            prepare_probe(self, self.model, loader)

    def end_training(self) -> None:
        """See `Task`; fold a linear probe."""
        if self.args.linear_probe:
            fold_probe(self.model)

    def end_evaluation(self, scores: Scores) -> None:
        """See `Task`; draw the confusion matrix of labelled images."""
        args = self.args
        if args.confusion:
            from ..viz.confusion import plot_confusion  # slow to import, and most evaluations draw nothing

            known = self.found.labelled
            title = f"{Path(args.model).name}: {Path(args.dataset_name).name}, {args.split}"
            names = class_names(self.model.config)
            plot_confusion(self.found.labels[known], self.found.top[known, 0], names, args.confusion, title)


def check_labels(rows: Any, split: str, names: list[str]) -> None:
    """Refuse a split with a label that is not a class of the model; a stream is not read for it.

    Raises:
        ValueError: with the label.
    """
    if not isinstance(rows, datasets.Dataset):
        return
    known = label_ids(rows, names)
    for value in rows.unique(LABEL):
        if is_label(value) and value not in known:
            raise ValueError(
                f'split "{split}": label {value!r} is not a class of the model; it has {", ".join(names[:20])}'
                f"{', ...' * (len(names) > 20)}"
            )


def check_readable(rows: Any, split: str, max_bad_images: int) -> None:
    """Refuse a split with unreadable images, judging by `CHECKED_IMAGES` evenly spaced ones.

    Raises:
        ValueError: more than ``max_bad_images`` of them are unreadable.
    """
    bad = {}
    for index in np.unique(np.linspace(0, len(rows) - 1, CHECKED_IMAGES).round().astype(int)).tolist():
        try:
            images.decode(rows[index][images.IMAGE])
        except images.BadImage as error:
            bad[index] = error
    if len(bad) > max_bad_images:
        found = "; ".join(f"image {index}: {reason}" for index, reason in list(bad.items())[:5])
        raise ValueError(
            f'test_splits "{split}": {len(bad)} images cannot be read, more than max_bad_images={max_bad_images} '
            f"allows ({found}{'; ...' * (len(bad) > 5)})"
        )


def head_of(model: PreTrainedModel, name: str) -> str:
    """Return the head of a weight, for `load_to_train`; fc_norm, after pooling, replaces a norm before it."""
    top = name.split(".")[0]
    return top if top != model.base_model_prefix else "fc_norm" if ".fc_norm." in name else ""


def load_classifier(
    source: str,
    names: list[str],
    image_size: Size,
    fields: Mapping[str, Any] | None = None,
    without_dropout: bool = False,
) -> PreTrainedModel:
    """Load a classifier to train further; if it had other classes, its linear layers are initialised at random.

    Args:
        source: folder or Hub id of a classifier, or of an encoder such as that of a masked autoencoder.
        names: of the classes.
        image_size: in pixels.
        fields: configuration fields to change; the ones that the class has a method ``set_FIELD`` for, such as
            `TfmSwinForImageClassification.set_window_size`, after loading.
        without_dropout: set all dropout rates to 0.

    Raises:
        ValueError: weights below the heads do not fit the configuration, or the patch size does not fit the images.
    """
    labels, earlier = label_fields(names), load_config(source, "model_name_or_path", trust_remote_code=None)
    kind = IMAGE_CLASSIFIER.model_class(earlier.model_type)
    check_fields(kind.config_class, dict(fields or {}), IMAGE_FIELDS)
    rates = dict.fromkeys(dropout_fields(kind.config_class), 0.0) if without_dropout else {}
    changed = {**rates, **(fields or {})}
    later = {name: changed.pop(name) for name in list(changed) if hasattr(kind, f"set_{name}")}
    model, fresh = load_to_train(kind, source, head_of, changed, resized="", **labels)
    for name, value in later.items():
        getattr(model, f"set_{name}")(value)
    if earlier.id2label != labels["id2label"]:
        for name in heads_of(model):
            if f"{name}.weight" not in fresh:
                fresh_head(model, name)  # as many classes, but others
    if hasattr(model.base_model, "set_image_size"):  # of a family whose parameters depend on the size
        model.base_model.set_image_size(image_size)
    return model


def read_real_labels(file: str, rows: int, exact: bool = True) -> list[list[int | str]]:
    """Read the lists of correct labels of all images of a split.

    Args:
        rows: number of images.
        exact: False if these are the first images of the split only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or another number of images.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"real_labels {file} does not exist")
    try:
        lists = read_json(Path(file))
    except ValueError as error:
        raise ValueError(f"real_labels: {error}") from error
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ValueError(f"real_labels {file} must hold a list of lists of labels")
    if len(lists) < rows or (exact and len(lists) != rows):
        raise ValueError(f"real_labels {file} must have a list for each of the {rows} images, got {len(lists)}")
    return lists


def real_accuracy(found: Predictions, real: list[list[int | str]], ids: Mapping[int | str, int]) -> float:
    """Return the accuracy of predictions against lists of correct labels, see `RealAccuracy`.

    Args:
        real: correct labels of each image of the split.
        ids: from those to the model's classes.

    Raises:
        ValueError: a label is not one of the data set.
    """
    chosen = [(index, real[index]) for index in found.indices.tolist()]
    if unknown := [(index, label) for index, labels in chosen for label in labels if label not in ids]:
        raise ValueError(f"real_labels: {unknown[0][1]!r} of image {unknown[0][0]} is not a label of the data set")
    correct = [[ids[label] for label in labels] for _, labels in chosen]
    return RealAccuracy().result_of(found.top.tolist(), correct)["real_accuracy"]


def named(found: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each image its index, the name of its label, and those of the predicted classes, best first."""
    columns = (found.indices.tolist(), found.labels.tolist(), found.top.tolist())
    return [
        {"index": i, "label": None if label == IGNORE_LABEL else names[label], "predicted": [names[c] for c in top]}
        for i, label, top in zip(*columns, strict=True)
    ]


def check_confusion(rows: datasets.Dataset, names: Sequence[str]) -> None:
    """Refuse a confusion matrix that cannot be drawn, before images are read.

    Raises:
        ValueError: no row has a label, or there are too many classes.
    """
    from ..viz.confusion import MAX_CLASSES  # slow to import, and most evaluations draw nothing

    if len(names) > MAX_CLASSES:
        raise ValueError(f"confusion has at most {MAX_CLASSES} classes, but the model has {len(names)}")
    if not any(map(is_label, rows[LABEL])):
        raise ValueError("confusion needs images with a label, but no row of the split has one")
