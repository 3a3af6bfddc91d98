"""What the recipes on images share: the knobs of data and pictures, and their loaders."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from ..arguments import ImageBatchArguments
from ..data import images
from ..data.augment import Augmentation, Mixing
from ..data.batching import StepLoader
from ..data.equal_batches import BatchSampler, EqualStreamLoader, ShuffledStream
from ..data.files import data_roots
from ..data.images import WatchedLoader, label_ids
from ..data.pixels import as_read as as_read
from ..data.pixels import image_processor, image_size_of, pixel_scale
from ..data.source import describe_rows, describe_source, gather, load_splits, take_split
from ..hub.loading import load_config
from ..hub.pretrained import IMAGE_CLASSES, load_to_train
from ..limits import LARGEST_SIDE
from ..memory import check_batch_memory
from ..models.modeling_vit import TfmViTForImageClassification
from ..models.patches import Size, sides
from ..tasks.classification import HEADS, ClassificationTask, heads_of
from ..tasks.images import ImageTask
from ..tasks.loaders import placement
from ..tasks.model_fields import fresh_head, label_fields
from ..tasks.splits import split_rows
from ..values import check_bounds

IMAGE_SIZE = 224  # of a new model
CHECKED_IMAGES = 256  # of a test split, before training
IMAGE_FIELDS = ("image_size", "num_channels")  # of a configuration: knobs decide them, and images are read as RGB


@dataclass(kw_only=True)
class PictureArguments(ImageBatchArguments):
    """Knobs of data, and of the model that reads it.

    Args:
        dataset_name: what `datasets.load_dataset` takes, with a column of images, or an embedded data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "imagefolder" or "parquet".
        image_column: images, their bytes or paths; default, the only column of images.
        train_split: split to learn from.
        validation_split: split that decides which weights are best.
        holdout: so many images of the training split, drawn at random, are the validation split where that is null.
        max_train_samples: learn from the first of the training images only, after they were shuffled by the seed.
        max_bad_images: images that cannot be read are reported and left out, up to so many.
        mean: of the channels, of pixels in [0, 1]; default, that of model_name_or_path, or of ImageNet.
        std: their standard deviation; the same default.
        model_name_or_path: folder or Hub id of a model to go on from, with its image processor.
        size: of a new model, see its configuration; a model of model_name_or_path has its own.
        model: fields of the configuration that differ from the size's, or from model_name_or_path's.
        license: licence of the model, for its card.

    The others are those of `ImageBatchArguments`.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    image_column: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    holdout: int | None = None
    max_train_samples: int | None = None
    max_bad_images: int = 10
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    model_name_or_path: str | None = None
    size: str = "base"
    model: dict[str, int | float | bool | str | tuple[int, int] | None] = field(default_factory=dict)
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="max_bad_images", at_least_1="holdout max_train_samples")
        self.check_distinct("test_splits")
        check_bounds("mean", self.mean, 0.0, 1.0)
        for i, value in enumerate(self.std or ()):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"std[{i}] must be above 0 and at most 1, of pixels in [0, 1], got {value}")
        self.check_exactly_one("validation_split", "holdout")

    @property
    def held_out(self) -> str:
        """The name of the split that decides which weights are best."""
        return self.validation_split or "holdout"


@dataclass(kw_only=True)
class ImageRunArguments(PictureArguments):
    """Knobs of images of one size, and their labels.

    Args:
        streaming: read the training split as it comes; needs max_steps.
        shuffle_buffer: images of a stream that are shuffled together, see `ShuffledStream`; not decoded, 10,000 of
            ImageNet's are about 1 GB, and up to three times that while they are shuffled. A stream that is sorted by
            class needs as many as several classes have.
        label_column: a ClassLabel, integers or strings; default, the only ClassLabel or "label".
        image_size: pixels of the model's images; default, those of model_name_or_path's image processor, or 224.
        resize: evaluation resizes the shorter edge to this and cuts out the centre; default, it resizes to image_size.
        augmentation: see `Augmentation`.
        repeats: copies of a sample in a step, each changed in its own way.

    The others are those of `PictureArguments`.
    """

    streaming: bool = False
    shuffle_buffer: int = 10_000
    label_column: str | None = None
    image_size: int | tuple[int, int] | None = None
    resize: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    repeats: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="repeats shuffle_buffer resize",
            at_most={"repeats": self.batch_size, "shuffle_buffer": 10_000_000, "resize": LARGEST_SIDE},
        )
        check_bounds("image_size", self.image_size, 1, LARGEST_SIDE)
        if self.resize is not None and self.image_size is not None and self.resize < max(sides(self.image_size)):
            raise ValueError(f"resize must be at least image_size = {self.image_size}, got {self.resize}")
        check_batch_memory(self, sides(self.image_size or IMAGE_SIZE))
        if None not in (self.image_column, self.label_column) and self.image_column == self.label_column:
            raise ValueError(f"image_column and label_column must be two columns, got {self.label_column} for both")
        if self.streaming:
            if self.max_steps is None:
                raise ValueError("streaming needs max_steps: the length of a stream is not known")
            if self.holdout is not None or self.max_train_samples is not None:
                raise ValueError("streaming reads the whole training split: give no holdout and no max_train_samples")
            if self.warmup_epochs is not None:
                raise ValueError(
                    "streaming needs warmup_steps, not warmup_epochs: the length of a stream is not known"
                )


@dataclass(kw_only=True)
class LabelledImageArguments(ImageRunArguments):
    """Knobs of what learns labels of images.

    Args:
        test_splits: splits that are only scored, in the end.
        label_smoothing: share of a label's target that is spread over all classes.
        mixing: mixup and CutMix, see `Mixing`.

    The others are those of `ImageRunArguments`.
    """

    fitting: ClassVar = IMAGE_CLASSES

    test_splits: list[str] = field(default_factory=list)
    label_smoothing: float = 0.0
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.metric_for_best_model not in ("loss", "accuracy"):
            raise ValueError(f'metric_for_best_model must be "loss" or "accuracy", got "{self.metric_for_best_model}"')


def label_tasks(
    args: LabelledImageArguments, processor: BaseImageProcessor, rows: dict[str, Any], names: list[str]
) -> dict[str, ClassificationTask]:
    """The task of each split, for a model of classes called ``names``.

    Raises:
        ValueError: there is one class alone; a label is not one of the classes; or more images of a test split cannot
            be read, among a sample of them, than ``max_bad_images``. The last would otherwise show after training.
    """
    if len(names) < 2:
        raise ValueError(f'label_column has one class alone, "{names[0]}": a classifier needs two or more')
    for split, part in rows.items():
        check_labels(part, split, names)
    images.tell_untrained(rows, args.train_split, names)
    for split in args.test_splits:
        check_readable(rows[split], split, args.max_bad_images)
    options = args.augmentation, args.mixing, args.label_smoothing, args.seed
    return {split: ClassificationTask(processor, label_ids(part, names), *options) for split, part in rows.items()}


def check_labels(rows: Any, split: str, names: list[str]) -> None:
    """Refuse a split with a label that is not a class of the model; a stream is not read for it.

    Raises:
        ValueError: there is one.
    """
    if not isinstance(rows, datasets.Dataset):
        return
    known = label_ids(rows, names)
    for value in rows.unique(images.LABEL):
        if images.is_label(value) and value not in known:
            raise ValueError(
                f'split "{split}": label {value!r} is not a class of the model; it has {", ".join(names[:20])}'
                f"{', ...' * (len(names) > 20)}"
            )


def check_readable(rows: Any, split: str, max_bad_images: int) -> None:
    """Refuse a split with images that cannot be read, found by decoding `CHECKED_IMAGES` of them, evenly spread.

    Raises:
        ValueError: there are more than ``max_bad_images``.
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
    """Head of a weight, for `load_to_train`; a norm after pooling takes the place of one before it."""
    top = name.split(".")[0]
    return top if top in HEADS else "fc_norm" if name.startswith("vit.fc_norm.") else ""


def load_classifier(source: str, names: list[str], image_size: Size, **fields: Any) -> TfmViTForImageClassification:
    """A classifier that goes on from another model; if it had other classes, its linear layers are new.

    Args:
        source: folder or Hub id of a classifier, or of an encoder such as a masked autoencoder's.
        names: of the classes.
        image_size: in pixels.
        fields: of the configuration that change.

    Raises:
        ValueError: its weights, beside those of `HEADS`, do not fit the configuration; or the patch the image.
    """
    labels, earlier = label_fields(names), load_config(source, "model_name_or_path", trust_remote_code=None)
    model, fresh = load_to_train(TfmViTForImageClassification, source, head_of, fields, resized="classifier", **labels)
    if earlier.id2label != labels["id2label"]:
        for name in heads_of(model):
            if f"{name}.weight" not in fresh:
                fresh_head(model, name)  # as many classes, but others
    model.vit.set_image_size(image_size)
    return model


def load_rows(args: ImageRunArguments, test_splits: list[str], labelled: bool) -> dict[str, Any]:
    """Rows of `image_rows` by the name of their split; see `split_rows`."""
    splits = load_splits(
        args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files, args.streaming
    )
    roots = data_roots(args.dataset_name, args.data_files)

    def rows_of(name: str, argument: str):
        rows = take_split(splits, name, argument)
        return images.image_rows(rows, args.image_column, args.label_column, labelled, roots)

    rows = split_rows(args, test_splits, rows_of)
    if args.streaming:
        rows = {name: part if name == args.train_split else gather(part) for name, part in rows.items()}
    for name, part in rows.items():
        images.require_readable(part, args.max_bad_images, name)
    return rows


def describe(args: ImageRunArguments, rows: dict[str, Any]) -> dict[str, Any]:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset_name,
        "name": args.dataset_config,
        **describe_source(args.dataset_name, args.dataset_revision),
        "image_column": args.image_column,
        "label_column": args.label_column,
        **describe_rows(rows, images.fingerprint),
    }


def new_processor(args: ImageRunArguments) -> BaseImageProcessor:
    """The image processor of a new run: its size is the model's.

    Raises:
        ValueError: ``model_name_or_path`` has none that tells size or scale, and the knobs do not.
    """
    size = args.image_size or IMAGE_SIZE
    if args.image_size is None and args.model_name_or_path:
        try:
            size = image_size_of(as_read(args.model_name_or_path, args.trust_remote_code))
        except ValueError as error:
            raise ValueError(f"model_name_or_path: {error}, or give image_size, mean and std") from error
    return image_processor(size, args.resize, *new_scale(args))


def new_scale(args: PictureArguments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a new run's pixels."""
    return pixel_scale(args.model_name_or_path, args.mean, args.std, args.trust_remote_code)


def image_loader(
    args: ImageRunArguments, accelerator: Accelerator, task: ImageTask, rows: Any, learning: bool, unit: int = 1
) -> WatchedLoader:
    """Batches of a split, for training or evaluation.

    Args:
        unit: neighbours that must stay together, see `BatchSampler`.
    """
    collate = task.collate_training if learning else task.collate
    place = {"micro_batch_tokens": args.micro_batch_size, **placement(args, accelerator)}
    if learning and args.streaming:
        rows = ShuffledStream(rows, args.seed, args.shuffle_buffer)
        loader = EqualStreamLoader(rows, args.batch_size, collate, args.seed, repeats=args.repeats, unit=unit, **place)
    else:
        options = {"shuffle": False}
        if learning:
            options = {"drop_last": len(rows) > args.batch_size, "repeats": args.repeats, "unit": unit}
        sampler = BatchSampler(len(rows), args.batch_size, args.seed, **options)
        loader = StepLoader(rows, sampler, collate, **place)
    return WatchedLoader(loader, args.max_bad_images)
