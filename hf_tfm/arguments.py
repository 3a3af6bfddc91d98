"""Arguments of runs and evaluations in groups that tasks combine, each option documented and checked once."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from .families import Head
from .limits import LARGEST_BATCH, SEEDS
from .values import check_bounds, conform_fields, shown

DEFAULT_WARMUP = 1000  # steps
# Limit of dataloader_num_workers; presets are written for machines larger than this one.
WORKERS_PER_CORE, FEWEST_WORKERS = 4, 64


class Arguments:
    """Checks that all groups share. A group's ``__post_init__`` calls ``super().__post_init__()`` first."""

    def __post_init__(self):
        conform_fields(self)

    def check_range(
        self,
        at_least_0: str = "",
        at_least_1: str = "",
        above_0: str = "",
        at_most: Mapping[str, float] | None = None,
    ) -> None:
        """Check numbers against their bounds; None is not checked.

        Args:
            at_least_0, at_least_1, above_0: option names separated by spaces.
            at_most: {option: largest value}.

        Raises:
            ValueError: a value is out of bounds.
        """
        for names, least in ((at_least_0, 0), (at_least_1, 1)):
            for name in names.split():
                check_bounds(name, getattr(self, name), least)
        for name in above_0.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, most in (at_most or {}).items():
            check_bounds(name, getattr(self, name), most=most)

    def check_distinct(self, *names: str) -> None:
        """Refuse lists with duplicates.

        Args:
            names: of options; those this class lacks are skipped.

        Raises:
            ValueError: with the option and the duplicate.
        """
        for name in names:
            values = getattr(self, name, None) or []
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"{name} must not contain duplicates, got {shown(twice[0])} twice")

    def check_exclusive(self, *names: str) -> None:
        """Refuse more than one of several options.

        Raises:
            ValueError: with the options and their values.
        """
        given = {name: getattr(self, name) for name in names}
        if sum(value is not None for value in given.values()) > 1:
            raise ValueError(
                f"give at most one of {' and '.join(names)}, got {' and '.join(map(str, given.values()))}; null "
                "removes the value of a preset"
            )

    def check_exactly_one(self, *names: str) -> None:
        """Refuse none, or more than one, of several options.

        Raises:
            ValueError: with the options and their values.
        """
        given = {name: getattr(self, name) for name in names}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                f"give exactly one of {' and '.join(names)}, got {' and '.join(map(str, given.values()))}; null "
                "removes the value of a preset"
            )


@dataclass(kw_only=True)
class DatasetArguments(Arguments):
    """The data set.

    Args:
        dataset_name: what `datasets.load_dataset` takes: a Hub id, a local folder or file, or the name of a format
            such as "parquet"; or a generated data set such as "number-words", "number-parity" or "digits".
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: {split: files}, if dataset_name is a format.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None

    @property
    def source(self) -> tuple[str, str | None, str | None, dict[str, str | list[str]] | None]:
        """The arguments of `data.source.load_splits`."""
        return self.dataset_name, self.dataset_config, self.dataset_revision, self.data_files


@dataclass(kw_only=True)
class SplitArguments(Arguments):
    """Splits of the data set: to train on, to validate on, and to score.

    Args:
        train_split: training data.
        validation_split: its scores decide which weights are best.
        holdout: number of training rows, drawn at random, held out for validation if validation_split is null.
        max_train_samples: train on this many training rows, drawn at random.
        test_splits: scored once, after training.
    """

    train_split: str = "train"
    validation_split: str | None = "validation"
    holdout: int | None = None
    max_train_samples: int | None = None
    test_splits: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="holdout max_train_samples")
        self.check_distinct("test_splits")
        self.check_validation_data()

    def check_validation_data(self) -> None:
        """Refuse none, or more than one, source of validation data."""
        self.check_exactly_one("validation_split", "holdout")

    @property
    def held_out(self) -> str:
        """Name of the validation data in `Task.splits`."""
        return self.validation_split or "holdout"


@dataclass(kw_only=True)
class ModelArguments(Arguments):
    """The model to train.

    Args:
        model_name_or_path: folder or Hub id of a pretrained model to start from, with its tokenizer or image
            processor; default, a new model with random weights.
        architecture: model family of a new model.
        size: size of a new model, see `of_size` of its configuration.
        model: configuration fields that differ from those of the size, or of model_name_or_path where the task allows
            it.
    """

    # Models that are valid for arguments, {argument: hub.pretrained.Suitable}. A subclass sets it, at least for
    # model_name_or_path, and a default architecture.
    accepted_models: ClassVar[dict[str, Any]] = {}
    # Options of a new model, which do not apply to a saved one, and fields of ``model`` that do: those of the data.
    new_model_options: ClassVar[tuple[str, ...]] = ()
    data_fields: ClassVar[tuple[str, ...]] = ()

    model_name_or_path: str | None = None
    architecture: str | None = None
    size: str = "base"
    model: dict[
        str, int | float | bool | str | tuple[int, int] | list[int] | dict[str, int | float | bool | str] | None
    ] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.accepted_models:
            _ = self.config_class

    @classmethod
    def choices(cls) -> dict[str, list[str]]:
        """Return the values of options that the table of families determines, for help and documentation."""
        if not cls.accepted_models:
            return {}
        return {"architecture": list(cls.accepted_models["model_name_or_path"].head.families())}

    @classmethod
    def without_new_model(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a configuration file without what they say about a new model.

        A file with ``model_name_or_path`` says nothing about one.
        """
        if "model_name_or_path" in values:
            return dict(values)
        kept = {name: value for name, value in values.items() if name not in cls.new_model_options}
        fields = {name: value for name, value in (values.get("model") or {}).items() if name in cls.data_fields}
        return kept | ({"model": fields} if fields else {})

    def check_saved(self, config: PreTrainedConfig) -> None:
        """Check arguments that depend on the family of ``model_name_or_path``, before any data is read.

        Args:
            config: its configuration.

        Raises:
            ValueError: its family lacks a field of ``model``, or it cannot be chosen.
        """

    def check_files(self) -> None:
        """Check files that further arguments name, before any data is read.

        Raises:
            ValueError: a file is missing or does not fit.
        """

    @property
    def head(self) -> Head:
        """Head of the models to train."""
        return self.accepted_models["model_name_or_path"].head

    @property
    def config_class(self) -> type[Any]:
        """Configuration class of a new model.

        Raises:
            ValueError: ``architecture`` is not a family with this head.
        """
        return self.head.config_class(self.architecture)


@dataclass(kw_only=True)
class ImageDataArguments(Arguments):
    """Reading images.

    Args:
        image_column: images, their bytes or paths; default, the only column of images.
        max_bad_images: number of unreadable images that are reported and left out; more end the run.
    """

    image_column: str | None = None
    max_bad_images: int = 10

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="max_bad_images")


@dataclass(kw_only=True)
class ImageScaleArguments(ModelArguments):
    """The scale of the pixels that a model reads, (x - mean) / std.

    Args:
        mean: of the channels, of pixels in [0, 1]; default, that of model_name_or_path, or of ImageNet.
        std: their standard deviation; the same default.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_bounds("mean", self.mean, 0.0, 1.0)
        for i, value in enumerate(self.std or ()):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"std[{i}] must be above 0 and at most 1, of pixels in [0, 1], got {value}")


@dataclass(kw_only=True)
class EvaluationArguments(DatasetArguments):
    """Scoring a saved model.

    Args:
        model: folder or Hub id, with its tokenizer or image processor.
        split: split to score.
        max_samples: score the first rows only.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code in the model's repository; models of this package need none.
        output: also write the result, with all predictions, to this JSON file.
        progress: show a progress bar.
    """

    model: str
    split: str = "test"
    max_samples: int | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="max_samples")

    @property
    def pretrained(self) -> dict[str, Any]:
        """Keyword arguments that load the model."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(kw_only=True)
class ImageEvaluationArguments(ImageDataArguments, EvaluationArguments):
    """Scoring an image model.

    Args:
        batch_size: images in a batch.
        dataloader_num_workers: worker processes that read images.
    """

    batch_size: int = 64
    dataloader_num_workers: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="dataloader_num_workers",
            at_least_1="batch_size",
            at_most={"batch_size": 2**16, "dataloader_num_workers": 256},
        )


@dataclass(kw_only=True)
class ImageModelEvaluationArguments(ImageEvaluationArguments):
    """Scoring an image model of any library.

    Args:
        model: folder or Hub id, with its image processor; or the name of a model of another library: timm:NAME,
            timm:local-dir:FOLDER or torchvision:NAME.
        weights: file or folder with weights of a model of timm or torchvision; default, the library downloads them.
        random_weights: draw the weights of a model of timm or torchvision at random, to try it without its weights.
    """

    weights: str | None = None
    random_weights: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.weights is not None and self.random_weights:
            raise ValueError(f'give either weights or random_weights true, got both (weights "{self.weights}")')


@dataclass(kw_only=True)
class TrainingArguments(Arguments):
    """Training.

    Args:
        output_dir: folder for the model, its card, checkpoints and logs.
        overwrite_output_dir: delete an earlier run with other arguments or data in output_dir; a run with the same
            ones is resumed.
        trust_remote_code: run the code in the repository of a model or tokenizer named by another argument; otherwise
            such a model is refused.
        seed: seed of weights, data order, augmentation, dropout and masks.
        num_train_epochs: passes over the training data; or set max_steps.
        max_steps: optimizer steps; requires num_train_epochs to be null.
        max_minutes: stop earlier, after this many minutes of training, set-up and evaluations not counted; the last
            step is evaluated and the model saved as usual. The learning-rate schedule remains that of the whole run.
        dataloader_num_workers: worker processes per training process that prepare batches.
        optimizer: adamw (decoupled weight decay), adam (L2 weight decay) or sgd.
        learning_rate: peak learning rate.
        layer_wise_lr_decay: layer-wise learning-rate decay factor (Clark et al. 2020), in (0, 1]; 1.0 disables it.
        rate_factors: {part of a parameter's name: factor of its learning rate}, for instance {backbone: 0.1}.
        lr_scheduler_type: inverse_sqrt (Vaswani et al. 2017, equation 3), cosine, linear, constant, or step (constant,
            then a tenth of it from lr_drop_ratio on), each after a linear warm-up.
        lr_drop_ratio: fraction of max_steps after which the step schedule drops.
        min_lr_rate: fraction of the learning rate at which the cosine schedule ends.
        warmup_steps: steps of linear warm-up; default, the smaller of 1,000 and a tenth of the run.
        adam_betas: decay rates of Adam's two moments.
        adam_epsilon: term added to the denominator of Adam.
        momentum: momentum of sgd.
        weight_decay: weight decay of weight matrices; biases, norms, position embeddings and single tokens are not
            decayed.
        max_grad_norm: clip the gradient to this norm; 0 disables clipping.
        mixed_precision: no (float32), or bf16 or fp16 autocast.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        torch_compile: compile the model.
        fsdp: shard weights, gradients and optimizer state over the processes (FSDP2), as a configuration of accelerate
            with fsdp_version 2 does; evaluations gather the weights.
        ema_decay: decay of an exponential moving average of the weights; 0 disables it.
        average_checkpoints: number of most recent checkpoints averaged by final_weights "average".
        final_weights: weights of the saved model: last, best, average or ema.
        eval_steps: steps between evaluations; the last step is always evaluated. Default: once per epoch.
        save_steps: steps between checkpoints; default, at every evaluation.
        logging_steps: steps between log lines.
        metric_for_best_model: validation metric that selects the best weights and drives early stopping; lower is
            better for loss, higher for all others.
        early_stopping_patience: stop after this many evaluations without improvement; 0 disables early stopping.
        save_total_limit: number of most recent checkpoints to keep, in addition to the best one.
        max_nonfinite_steps: stop after this many consecutive steps with a non-finite gradient; with fp16, 16 more are
            allowed while the loss scale is searched.
        ddp_timeout: seconds that one process waits for another before the run fails; larger than what the main process
            may need to prepare the data.
        report_to: experiment trackers: tensorboard, wandb, trackio.
        run_name: name of the run in the trackers; default, that of output_dir.
        license: licence of the trained model, for its card.
        progress: show a progress bar; otherwise print log lines.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    num_train_epochs: float | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    dataloader_num_workers: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    layer_wise_lr_decay: float = 1.0
    rate_factors: dict[str, float] = field(default_factory=dict)
    lr_scheduler_type: Literal["inverse_sqrt", "cosine", "linear", "constant", "step"] = "inverse_sqrt"
    lr_drop_ratio: float = 2 / 3
    min_lr_rate: float = 0.0
    warmup_steps: int | None = None
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-9
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    fsdp: bool = False
    ema_decay: float = 0.0
    average_checkpoints: int = 0
    final_weights: Literal["last", "best", "average", "ema"] = "best"
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 50
    metric_for_best_model: str = "loss"
    early_stopping_patience: int = 0
    save_total_limit: int = 2
    max_nonfinite_steps: int = 5
    ddp_timeout: int = 1800
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    run_name: str | None = None
    license: str | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_exactly_one("num_train_epochs", "max_steps")
        self.check_range(
            at_least_0="seed dataloader_num_workers warmup_steps weight_decay max_grad_norm average_checkpoints "
            "early_stopping_patience",
            at_least_1="max_steps eval_steps save_steps logging_steps save_total_limit max_nonfinite_steps "
            "ddp_timeout",
            above_0="num_train_epochs max_minutes learning_rate adam_epsilon layer_wise_lr_decay",
            at_most={
                "seed": SEEDS - 1,
                "max_steps": 1_000_000_000,
                "ddp_timeout": 10_000_000,
                "num_train_epochs": 1_000_000,
                "layer_wise_lr_decay": 1,
                "learning_rate": 1000,
                "adam_epsilon": 1,
            },
        )
        cores = os.cpu_count() or 1
        if self.dataloader_num_workers > (most := max(FEWEST_WORKERS, WORKERS_PER_CORE * cores)):
            raise ValueError(
                f"dataloader_num_workers must be at most {most} on a machine with {cores} CPU cores, got "
                f"{self.dataloader_num_workers}"
            )
        if self.max_steps is not None:
            self.warmup(self.max_steps)
        if self.optimizer != "adam" and self.learning_rate is not None and self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                "weight_decay times learning_rate must be below 1, or a step flips the sign of the weights; got "
                f"{self.weight_decay} times {self.learning_rate}"
            )
        for part, factor in self.rate_factors.items():
            if not 0.0 < factor <= 1000.0:
                raise ValueError(f"rate_factors must be above 0 and at most 1000, got {factor} for {part}")
        fractions = [(name, getattr(self, name)) for name in ("ema_decay", "momentum", "lr_drop_ratio", "min_lr_rate")]
        for name, value in (*fractions, *(("adam_betas", beta) for beta in self.adam_betas)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.min_lr_rate and self.lr_scheduler_type != "cosine":
            raise ValueError(f'min_lr_rate is for lr_scheduler_type "cosine", got "{self.lr_scheduler_type}"')
        if self.final_weights == "ema" and not self.ema_decay:
            raise ValueError('final_weights="ema" needs ema_decay above 0, got 0')
        if self.final_weights == "average" and self.average_checkpoints < 1:
            raise ValueError(f'final_weights="average" needs average_checkpoints, got {self.average_checkpoints}')
        self.check_distinct("report_to")
        for name in self.report_to:
            # accelerate would silently skip a tracker that is not installed.
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report_to: {name} is not installed")

    @property
    def folder_argument(self) -> str:
        """Name of the argument with the folder that the run writes."""
        return "output_dir"

    def warmup(self, max_steps: int) -> int:
        """Warm-up steps of a run of ``max_steps``.

        Raises:
            ValueError: ``warmup_steps`` exceeds ``max_steps``: the run would never reach its learning rate.
        """
        if self.warmup_steps is None:
            return min(DEFAULT_WARMUP, max_steps // 10)
        if self.warmup_steps > max_steps:
            raise ValueError(
                f"warmup_steps must be at most the {max_steps} steps of the run (max_steps), got {self.warmup_steps}"
            )
        return self.warmup_steps

    def resolve(self, steps_per_epoch: int | None, max_steps: int) -> tuple["TrainingArguments", str | None]:
        """Compute what depends on the number of steps.

        Args:
            steps_per_epoch: None for a stream.
            max_steps: of the run.

        Returns:
            Arguments with a learning rate and warm-up steps for the optimizer (this object keeps what was given, for
            the record), and a line that reports them, or None if there is nothing to report.
        """
        return self, None


@dataclass(kw_only=True)
class TokenBatchArguments(TrainingArguments):
    """Training on batches of about equally many tokens.

    Args:
        batch_tokens: padded tokens, on the longer side, of one optimizer step over all processes.
        micro_batch_tokens: padded tokens that one process computes at once; saves memory, does not change the result.
    """

    batch_tokens: int = 4096
    micro_batch_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="batch_tokens micro_batch_tokens", at_most={"batch_tokens": 1_000_000_000})


@dataclass(kw_only=True)
class ImageBatchArguments(TrainingArguments):
    """Training on batches of equally many images.

    Args:
        batch_size: images of one optimizer step over all processes, so that a run does not depend on the hardware.
        micro_batch_size: images that one process computes at once; saves memory, does not change the result.
        learning_rate: peak learning rate; or set base_learning_rate.
        base_learning_rate: peak learning rate for batch_size 256; the learning rate is base_learning_rate * batch_size
            / 256 (Goyal et al. 2017, arXiv:1706.02677).
        warmup_epochs: epochs of linear warm-up, in place of warmup_steps.
    """

    batch_size: int = 256
    micro_batch_size: int | None = None
    learning_rate: float | None = None  # type: ignore[assignment]  # or base_learning_rate
    base_learning_rate: float | None = None
    warmup_epochs: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_exactly_one("learning_rate", "base_learning_rate")
        self.check_range(
            at_least_0="warmup_epochs",
            at_least_1="batch_size micro_batch_size",
            above_0="base_learning_rate",
            at_most={"batch_size": LARGEST_BATCH, "base_learning_rate": 1000},
        )
        self.check_exclusive("warmup_steps", "warmup_epochs")
        longest = self.num_train_epochs
        if self.warmup_epochs is not None and longest is not None and self.warmup_epochs > longest:
            raise ValueError(f"warmup_epochs must be at most num_train_epochs = {longest}, got {self.warmup_epochs}")

    def resolve(self, steps_per_epoch: int | None, max_steps: int) -> tuple["ImageBatchArguments", str | None]:
        """See `TrainingArguments.resolve`."""
        rate, steps, base = self.learning_rate, self.warmup_steps, ""
        if self.base_learning_rate is not None:
            rate = self.base_learning_rate * self.batch_size / 256
            base = f" = {self.base_learning_rate:g} x {self.batch_size} images / 256"
        if self.warmup_epochs is not None:
            if steps_per_epoch is None:
                raise ValueError("warmup_epochs needs rows that can be counted: set warmup_steps for a stream")
            steps = round(self.warmup_epochs * steps_per_epoch)
        warmup = "of a tenth of the run, at most 1,000" if steps is None else steps
        line = f"learning rate {rate:g}{base}; warm-up {warmup} steps"
        line += f" of {steps_per_epoch} an epoch" if steps_per_epoch else ""
        resolved = replace(self, learning_rate=rate, base_learning_rate=None, warmup_steps=steps, warmup_epochs=None)
        return resolved, line
