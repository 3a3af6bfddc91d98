"""What the recipes on labelled texts share: the knobs of data and batches, the splits, and their loaders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import datasets
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..arguments import TrainingArguments
from ..data import glue
from ..data.batching import StepLoader, TokenBudgetSampler
from ..data.equal_batches import BatchSampler
from ..data.images import tell_untrained
from ..data.labelled_texts import (
    LABEL,
    LengthBatchSampler,
    ProblemType,
    as_classes,
    as_numbers,
    check_classes,
    class_ids,
    class_names,
    is_regression,
    load_texts,
    tell_unlabelled,
    text_lengths,
    text_rows,
    tokenize_texts,
)
from ..data.source import describe_source, take_split
from ..data.text import describe
from ..data.vocabulary import tell_unknown
from ..hub.pretrained import TEXT_CLASSES
from ..limits import LARGEST_BATCH, LONGEST
from ..metrics.glue import check_metrics
from ..tasks.loaders import placement
from ..tasks.splits import split_rows

TaskName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
PLACES = ("dataset_name", "dataset_config", "model_name_or_path", "teacher", "cache")
Metric = Literal["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman"]


@dataclass(kw_only=True)
class TextArguments(TrainingArguments):
    """Training on texts, or pairs of them, with labels.

    Args:
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-parity"; "{task}"
            in it stands for the task's name.
        dataset_config: configuration of the data set; default, the task's name where the data set is called "glue".
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "parquet".
        tasks: of GLUE, with commas between, or "glue" for all nine: each is a run of its own, in a folder of
            output_dir; the scores of all and the macro average are in results.json there. "{task}" in the names of
            models and of a cache stands for the task's name too.
        task: of GLUE; it knows text_columns, classes, metrics and validation splits.
        text_columns: one or two columns, or dotted paths; default, the task's, or the only column of texts.
        label_column: a ClassLabel, text, or numbers; default, the only ClassLabel or "label".
        problem_type: single_label_classification or regression; default, regression where labels are numbers and one
            of them is not whole.
        train_split: split to learn from.
        validation_split: split that decides which weights are best; default, the task's first, or "validation". MNLI's
            second one is scored too.
        holdout: so many texts of the training split, drawn at random, take the place of validation_split.
        test_splits: splits that are only scored, in the end.
        max_train_samples: learn from the first of the training texts only, after they were shuffled by the seed.
        max_length: longer texts are cut to so many tokens, of a pair the longer text first.
        batch_size: texts of one optimizer step over all processes.
        micro_batch_size: texts that one process computes at once; less memory, the same result.
        bucketing: texts of a step are of like length, which saves padding; false mixes them.
        batch_tokens: padded tokens of one optimizer step, in place of batch_size, which is then null.
        micro_batch_tokens: padded tokens that one process computes at once, in place of micro_batch_size.
        warmup_ratio: share of the steps, in place of warmup_steps, which is then null.
        metrics: of the final scores; default, the task's, otherwise accuracy, or pearson and spearman of numbers.
        metric_for_best_model: loss or one of the metrics; default, the first.
        license: licence of the model, for its card.

    The others are those of `TrainingArguments`.

    Raises:
        ValueError: a value is outside its range, or two do not fit each other.
    """

    fitting: ClassVar = TEXT_CLASSES

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    tasks: str | None = None
    task: TaskName | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    problem_type: ProblemType | None = None
    train_split: str = "train"
    validation_split: str | None = None
    holdout: int | None = None
    test_splits: list[str] = field(default_factory=list)
    max_train_samples: int | None = None
    max_length: int = 128
    batch_size: int | None = 32
    micro_batch_size: int | None = None
    bucketing: bool = True
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    warmup_ratio: float | None = None
    metrics: list[Metric] = field(default_factory=list)
    metric_for_best_model: str | None = None
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tasks is not None:
            glue.find_tasks(self.tasks)
            for name in (
                "task",
                "text_columns",
                "label_column",
                "problem_type",
                "validation_split",
                "holdout",
                "metrics",
            ):
                if getattr(self, name):
                    raise ValueError(f"tasks decides {name}: set it to null, got {getattr(self, name)}")
        if self.task and self.problem_type:
            raise ValueError(f"task decides problem_type: set it to null, got {self.problem_type}")
        for name in PLACES:
            if self.task and isinstance(place := getattr(self, name, None), str):
                setattr(self, name, place.replace("{task}", self.task))
        self.check_range(
            at_least_1="holdout max_train_samples max_length batch_size micro_batch_size batch_tokens "
            "micro_batch_tokens",
            at_most={"max_length": LONGEST, "batch_size": LARGEST_BATCH},
        )
        self.check_distinct("test_splits", "text_columns", "metrics")
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns must be one column or two, got {', '.join(self.text_columns)}")
        if self.label_column is not None and self.label_column in self.text_columns:
            raise ValueError(f"label_column must be none of text_columns, got {self.label_column}")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"give one of warmup_steps and warmup_ratio, got {self.warmup_steps} and {self.warmup_ratio}; null "
                "takes back what a preset gives"
            )
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(
                f"give exactly one of batch_size and batch_tokens, got {self.batch_size} and {self.batch_tokens}; "
                "null takes back what a preset or the default gives"
            )
        unit, other = ("tokens", "size") if self.batch_size is None else ("size", "tokens")
        if getattr(self, f"micro_batch_{other}") is not None:
            raise ValueError(f"micro_batch_{other} does not go with batch_{unit}: give micro_batch_{unit}")
        if self.batch_tokens is not None and self.max_length > min(
            self.batch_tokens, self.micro_batch_tokens or self.batch_tokens
        ):
            raise ValueError(f"max_length must be at most the tokens of a batch, got {self.max_length}")
        if self.batch_tokens is not None and not self.bucketing:
            raise ValueError("batch_tokens cuts texts sorted by length: bucketing=false needs batch_size")
        if self.holdout is not None and self.validation_split is not None:
            raise ValueError(
                f"give one of holdout and validation_split, got {self.holdout} and {self.validation_split}; null "
                "takes back what a preset gives"
            )
        if self.warmup_ratio is not None and not 0.0 <= self.warmup_ratio < 1.0:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")

    def resolve(self, steps_per_epoch: int | None, max_steps: int) -> tuple["TextArguments", None]:
        """See `TrainingArguments.resolve`."""
        if self.warmup_ratio is None:
            return self, None
        return replace(self, warmup_steps=round(self.warmup_ratio * max_steps), warmup_ratio=None), None


@dataclass
class LabelledTexts:
    """What a run learns from and is scored on.

    Args:
        rows: of `text_rows` by split.
        labels: the classes' names; None where numbers are predicted.
        validation: splits that are scored; the first decides which weights are best.
        tests: splits that are scored in the end.
    """

    rows: dict[str, datasets.Dataset]
    labels: list[str] | None
    validation: list[str]
    tests: list[str]

    @property
    def scored(self) -> list[str]:
        """All splits but that of training."""
        return list(dict.fromkeys([*self.validation, *self.tests]))

    def label_ids(self, split: str) -> dict[int | str, int] | None:
        """From labels of a split to classes; see `class_ids`."""
        return None if self.labels is None else class_ids(self.rows[split], self.labels)

    def described(self, args: TextArguments) -> dict[str, Any]:
        """What the results file and the card say of the data."""
        dataset, name = args.dataset_name, args.dataset_config
        if args.task:
            dataset, name = glue.place_of(args.task, dataset, name)
        return {
            "path": dataset,
            "name": name,
            **describe_source(dataset, args.dataset_revision),
            "text_column": " + ".join(args.text_columns) or None,
            "label_column": args.label_column,
            **describe(self.rows),
        }


def load_labelled_texts(args: TextArguments) -> tuple[TextArguments, LabelledTexts]:
    """The data of a run; and its knobs, with what the task or the data decide filled in.

    Raises:
        MissingData: the data set cannot be found, and ``args.task`` names a task.
        ValueError: there is no such data set, split, column or label.
    """
    where = (args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files)
    task = glue.find_task(args.task) if args.task else None
    splits = glue.load_task(task, *where) if task else load_texts(*where)
    columns = args.text_columns or list(task.text_columns if task else ())

    def rows_of(name: str, argument: str) -> datasets.Dataset:
        rows = text_rows(take_split(splits, name, argument), columns, args.label_column)
        return glue.hide(rows) if task and task.regression else rows

    rows, validation = split_texts(args, task, rows_of)
    regression = args.problem_type == "regression" if args.problem_type else is_regression(rows[args.train_split])
    regression = task.regression if task else regression
    if not task:
        settle = as_numbers if regression else as_classes if args.problem_type else None
        rows = {name: settle(part) for name, part in rows.items()} if settle else rows
    labels = None if regression else class_names(rows[args.train_split], task.labels if task else ())
    if not regression:
        check_classes(rows[args.train_split], labels, args.train_split, known=bool(task))
    else:
        tell_unlabelled([value is not None for value in rows[args.train_split][LABEL]], args.train_split)
    arguments = {**dict.fromkeys(args.test_splits, "test_splits"), **dict.fromkeys(validation, "validation_split")}
    for name, argument in arguments.items():
        check_labelled(rows[name], name, argument, labels, numbered=bool(task))
    if labels is not None:
        tell_untrained(rows, args.train_split, labels)
    metrics = args.metrics or list(task.metrics if task else ["pearson", "spearman"] if regression else ["accuracy"])
    check_metrics(metrics, regression)
    best = args.metric_for_best_model or metrics[0]
    if best not in ("loss", *metrics):
        raise ValueError(f'metric_for_best_model must be loss or among metrics, {", ".join(metrics)}, got "{best}"')
    args = replace(args, text_columns=columns, metrics=metrics, metric_for_best_model=best)
    return args, LabelledTexts(rows, labels, validation, args.test_splits)


def split_texts(
    args: TextArguments, task: glue.GlueTask | None, rows_of: Callable[[str, str], datasets.Dataset]
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Rows by split, see `split_rows`; and the validation splits, the one that decides first."""
    if args.holdout is not None:
        return split_rows(args, args.test_splits, rows_of), ["holdout"]
    names = [args.validation_split] if args.validation_split else list(task.validation if task else ["validation"])
    chosen = replace(args, validation_split=names[0])
    return split_rows(chosen, [*names[1:], *args.test_splits], rows_of), names


def check_labelled(
    rows: datasets.Dataset, split: str, argument: str, labels: list[str] | None, numbered: bool = False
) -> None:
    """Refuse a split that cannot be scored, before anything is trained.

    Args:
        labels: names of the model's classes; None where numbers are predicted.
        numbered: labels that are plain integers are places among ``labels``, as of GLUE's tasks.

    Raises:
        ValueError: it has no labels, as GLUE's test splits on the Hub, or one that is not a class of the training
            data.
    """
    values = rows.unique(LABEL)
    if all(value is None or value == glue.HIDDEN for value in values):
        raise ValueError(f'{argument} "{split}" has no labels, so it cannot be scored')
    if labels is None:
        return
    if is_regression(rows):
        raise ValueError(
            f'{argument} "{split}" has labels that are not whole, and those of the training split are classes: '
            'problem_type="regression" learns numbers'
        )
    try:
        whole = getattr(rows.features[LABEL], "dtype", "").startswith(("int", "uint"))
        plain = whole and not isinstance(rows.features[LABEL], datasets.ClassLabel)
        # The training data's labels are words, and numbers are not among them.
        known = {} if plain and not numbered and not label_ids_fit(labels) else class_ids(rows, labels)
    except ValueError as error:
        raise ValueError(f'{argument} "{split}": {error}') from error
    for value in values:
        if value is not None and not (isinstance(value, int) and value < 0) and value not in known:
            raise ValueError(
                f'{argument} "{split}": label {value!r} is not a class of the training data; it has '
                f"{', '.join(labels[:20])}{', ...' * (len(labels) > 20)}"
            )


def label_ids_fit(labels: Sequence[str]) -> bool:
    """Whether all names of classes are whole numbers."""
    return all(name.lstrip("-").isdecimal() for name in labels)


def text_loader(
    args: TextArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    learning: bool,
) -> StepLoader:
    """Batches of a split of `text_rows`, for training or evaluation, where their order does not matter."""
    tokens = tokenize_texts(rows, tokenizer, args.max_length)
    if not learning:
        tell_unknown(tokens, tokenizer)
    lengths = text_lengths(tokens)
    if args.batch_tokens is not None:
        sampler = TokenBudgetSampler(lengths, args.batch_tokens, args.seed, shuffle=learning)
    elif args.bucketing or not learning:
        sampler = LengthBatchSampler(lengths, args.batch_size, args.seed, shuffle=learning)
    else:
        sampler = BatchSampler(len(lengths), args.batch_size, args.seed)
    return StepLoader(
        tokens,
        sampler,
        collate,
        micro_batch_tokens=args.micro_batch_size or args.micro_batch_tokens,
        **placement(args, accelerator, workers=learning),
    )
