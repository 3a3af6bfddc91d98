"""What the recipes on images share: the knobs of data and pictures, and their loaders."""

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import images
from ..data.augment import Augmentation
from ..data.batching import StepLoader
from ..data.equal_batches import BatchSampler, EqualStreamLoader
from ..data.images import WatchedLoader
from ..data.source import describe_rows, describe_source, gather, load_splits, take_split
from ..models.configuration_vit import ImageEncoderConfig
from ..tasks.images import ImageTask, image_processor
from .arguments import ImageArguments


@dataclass(kw_only=True)
class ImageRunArguments(ImageArguments):
    """Knobs of data and pictures.

    Args:
        dataset: what `datasets.load_dataset` takes, with a column of images, or "digits".
        dataset_name: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "imagefolder" or "parquet".
        streaming: read the training split as it comes; needs num_steps.
        image_column: images, their bytes or paths; default, the only column of images.
        label_column: a ClassLabel, integers or strings; default, the only ClassLabel or "label".
        train_split: split to learn from.
        validation_split: split that decides which weights are best.
        holdout: so many images of the training split, drawn at random, are the validation split where that is null.
        max_train_samples: learn from the first of the training images only, after they were shuffled by the seed.
        max_bad_images: images that cannot be read are reported and left out, up to so many.
        image_size: pixels of the model's images.
        resize: evaluation resizes the shorter edge to this and cuts out the centre; default, it resizes to image_size.
        mean: of the channels, of pixels in [0, 1]; default, that of init_from, or of ImageNet.
        std: their standard deviation; the same default.
        augmentation: see `Augmentation`.
        repeats: copies of a sample in a step, each changed in its own way.
        init_from: folder or Hub id of a model to go on from, with its image processor.
        size: of a new model, see its configuration; a model of init_from has its own.
        model: fields of the configuration that differ from the size's, or from init_from's.
        license: licence of the model, for its card.

    The others are those of `ImageArguments`.
    """

    dataset: str
    dataset_name: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    holdout: int | None = None
    max_train_samples: int | None = None
    max_bad_images: int = 10
    image_size: int | tuple[int, int] = 224
    resize: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    repeats: int = 1
    init_from: str | None = None
    size: str = "base"
    model: dict[str, int | float | bool | str | tuple[int, int] | None] = field(default_factory=dict)
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="max_bad_images", at_least_1="holdout max_train_samples repeats")
        if (self.validation_split is None) == (self.holdout is None):
            raise ValueError(
                f"give exactly one of validation_split and holdout, got {self.validation_split} and {self.holdout}; "
                "null takes back what a preset gives"
            )
        if self.streaming:
            if self.num_steps is None:
                raise ValueError("streaming needs num_steps: the length of a stream is not known")
            if self.holdout is not None or self.max_train_samples is not None:
                raise ValueError("streaming reads the whole training split: give no holdout and no max_train_samples")
            if self.warmup_epochs is not None:
                raise ValueError(
                    "streaming needs warmup_steps, not warmup_epochs: the length of a stream is not known"
                )


def check_fields(kind: type[ImageEncoderConfig], fields: dict[str, Any]) -> None:
    """Refuse fields of a configuration that it does not have, or that are not the user's choice.

    Raises:
        ValueError: there is one; transformers would take it without a word.
    """
    inherited = PreTrainedConfig.__dataclass_fields__.keys()
    taken = {*inherited, "image_size", "num_channels"}  # the size is a knob of its own; images are read as RGB
    for name in fields:
        if name not in kind.__dataclass_fields__ or name in taken or name.startswith("_"):
            raise ValueError(f"model.{name} is not a field of {kind.__name__} that can be chosen")


def new_config(kind: type[ImageEncoderConfig], args: ImageRunArguments, **fields: Any) -> ImageEncoderConfig:
    """The configuration of a new model, of class ``kind``; ``fields`` are those that the data decides.

    Raises:
        ValueError: a field of ``args.model`` is unknown, or a value is out of range.
    """
    try:
        return kind.of_size(args.size, image_size=args.image_size, **args.model, **fields)
    except StrictDataclassError as error:
        raise ValueError(f"model: {error}") from error


def load_rows(args: ImageRunArguments, test_splits: list[str], labelled: bool) -> dict[str, Any]:
    """{"train", "validation" and each test split: rows of `image_rows`}; the stated names of splits are the keys."""
    splits = load_splits(args.dataset, args.dataset_name, args.dataset_revision, args.data_files, args.streaming)

    def rows_of(name: str, argument: str):
        return images.image_rows(take_split(splits, name, argument), args.image_column, args.label_column, labelled)

    train = rows_of(args.train_split, "train_split")
    rows = {}
    if args.holdout is not None:
        if args.holdout >= len(train):
            raise ValueError(
                f"holdout must be below the {len(train)} images of {args.train_split}, got {args.holdout}"
            )
        parts = train.train_test_split(args.holdout, seed=args.seed)
        train, rows["holdout"] = parts["train"], parts["test"]
    if args.max_train_samples is not None:
        train = train.shuffle(args.seed).select(range(min(args.max_train_samples, len(train))))
    for name, argument in {
        **dict.fromkeys(test_splits, "test_splits"),
        args.validation_split: "validation_split",
    }.items():
        if name is not None:
            found = rows_of(name, argument)
            rows[name] = gather(found) if args.streaming else found
    return {**rows, args.train_split: train}


def describe(args: ImageRunArguments, rows: dict[str, Any]) -> dict[str, Any]:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset,
        "name": args.dataset_name,
        **describe_source(args.dataset, args.dataset_revision),
        "image_column": args.image_column,
        "label_column": args.label_column,
        **describe_rows(rows, images.fingerprint),
    }


def new_processor(args: ImageRunArguments) -> BaseImageProcessor:
    """The image processor of a new run; its scale is what `init_from` was trained on unless the knobs say otherwise.

    Raises:
        ValueError: ``init_from`` has no image processor, and mean and std are not given.
    """
    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    if args.init_from and not (args.mean and args.std):
        try:
            earlier = AutoImageProcessor.from_pretrained(args.init_from)
        except OSError as error:
            raise ValueError(f"init_from {args.init_from} has no image processor: give mean and std") from error
        mean, std = tuple(earlier.image_mean), tuple(earlier.image_std)
    return image_processor(args.image_size, args.resize, args.mean or mean, args.std or std)


def image_loader(
    args: ImageRunArguments, accelerator: Accelerator, task: ImageTask, rows: Any, learning: bool, unit: int = 1
) -> WatchedLoader:
    """Batches of a split, for training or evaluation.

    Args:
        unit: neighbours that must stay together, see `BatchSampler`.
    """
    placement = {
        "micro_batch_tokens": args.micro_batch_size,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_workers": args.num_workers,
        "pin_memory": accelerator.device.type == "cuda",
    }
    collate = task.collate_training if learning else task.collate
    if learning and args.streaming:
        loader = EqualStreamLoader(
            rows, args.batch_size, collate, args.seed, repeats=args.repeats, unit=unit, **placement
        )
    else:
        options = {"shuffle": False}
        if learning:
            options = {"drop_last": len(rows) > args.batch_size, "repeats": args.repeats, "unit": unit}
        sampler = BatchSampler(len(rows), args.batch_size, args.seed, **options)
        loader = StepLoader(rows, sampler, collate, **placement)
    return WatchedLoader(loader, args.max_bad_images)
