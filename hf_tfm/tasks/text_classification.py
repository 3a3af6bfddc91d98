"""Classification of texts or text pairs, and regression, with an encoder or a decoder.

{"text", "pair", "label"} -> {"input_ids", "label"} lists -> padded batch -> logits -> sum of losses -> GLUE metrics

Shapes: B texts or pairs; T tokens; C classes, 1 for regression; N texts of a split.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object, send_to_device
from datasets import ClassLabel, Value
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import ModelOutput

from ..arguments import (
    DatasetArguments,
    EvaluationArguments,
    ModelArguments,
    SplitArguments,
    TrainingArguments,
)
from ..data import glue
from ..data.batching import Sampler, StepLoader, TokenBudgetSampler, pad, pad_tokens
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
from ..data.source import first, take_split
from ..data.text import fingerprint
from ..data.vocabulary import require_tokens, tell_unknown
from ..distillation.model_spec import check_tokenizers
from ..families import CAUSAL_LM
from ..hub.pretrained import TEXT_CLASSES
from ..hub.results import RunRecord
from ..limits import LARGEST_BATCH, LARGEST_VOCABULARY, LONGEST
from ..metrics.glue import Glue, check_metrics
from ..models.cross_entropy import IGNORE_INDEX
from ..models.modeling_gpt import language_loss
from ..writing import check_png
from .base import Batch, Collator, Loader, Scores, Task
from .distillation import DistillationArguments
from .glue import evaluate_tasks, run_tasks
from .labels import class_names as classes_of_model
from .labels import match_classes
from .loaders import placement
from .model_fields import check_fields, new_config
from .splits import split_rows
from .text_model import (
    SEGMENTS,
    TOKEN_FIELDS,
    build_classifier,
    classifier_tokenizer,
    complete,
    input_names,
    keep_what_is_read,
    load_text_classifier,
)

IGNORE_LABEL = -100  # class of an unlabelled or dummy text; NaN for regression
DEFAULT_LENGTH = 512  # maximum number of tokens if neither model nor tokenizer has a limit
TaskName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
Metric = Literal["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman"]
# Options in which "{task}" is replaced by the name of the GLUE task.
PER_TASK = ("dataset_name", "dataset_config", "model_name_or_path", "teacher", "cache")


@dataclass(kw_only=True)
class LabelledTextArguments(DatasetArguments):
    """Texts or text pairs with labels.

    Args:
        task: GLUE task, which determines text_columns, classes, metrics and validation splits; "{task}" in
            dataset_name and dataset_config is replaced by it, and it is the default of dataset_config if the data set
            is called "glue".
        text_columns: one or two columns, or dotted paths; default, those of the task, or the only text column.
        label_column: column of classes or numbers; default, the only column of type ClassLabel, or "label".
    """

    decided_by_tasks: ClassVar[tuple[str, ...]] = ("task", "text_columns", "label_column")
    tasks: str | None = None
    task: TaskName | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tasks is not None:
            glue.find_tasks(self.tasks)
            for name in self.decided_by_tasks:
                if getattr(self, name):
                    raise ValueError(f"tasks determines {name}: set it to null, got {getattr(self, name)}")
        if self.task:
            self.dataset_name, self.dataset_config = glue.place_of(self.task, self.dataset_name, self.dataset_config)
            for name in PER_TASK:
                if isinstance(value := getattr(self, name, None), str):
                    setattr(self, name, value.replace("{task}", self.task))
        self.check_distinct("text_columns")
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns must be one column or two, got {', '.join(self.text_columns)}")
        if self.label_column is not None and self.label_column in self.text_columns:
            raise ValueError(f"label_column must not be one of text_columns, got {self.label_column}")

    @property
    def glue_task(self) -> glue.GlueTask | None:
        """The GLUE task, if there is one."""
        return glue.find_task(self.task) if self.task else None


@dataclass(kw_only=True)
class TextArguments(LabelledTextArguments, SplitArguments, ModelArguments, TrainingArguments):
    """Training of a text classifier, with or without a teacher.

    Args:
        tasks: comma-separated GLUE tasks, or "glue" for all nine; each has its own run in a subfolder of output_dir,
            and results.json of output_dir has all scores and their macro average. "{task}" in the names of models and
            of a cache is replaced by the name of the task too.
        problem_type: single_label_classification or regression; default, regression if the labels are numbers and not
            all of them are integers.
        validation_split: its scores decide which weights are best; default, the first of the task, or "validation".
            MNLI's second one is scored too.
        holdout: number of training rows, drawn at random, that replace validation_split.
        max_length: longer texts are truncated to this many tokens, the longer text of a pair first.
        batch_size: texts of one optimizer step over all processes, so that a run does not depend on the hardware.
        micro_batch_size: texts that one process computes at once; saves memory, does not change the result.
        bucketing: batches of texts of similar length, which saves padding; false mixes all lengths.
        batch_tokens: padded tokens of one optimizer step over all processes; requires batch_size to be null.
        micro_batch_tokens: padded tokens that one process computes at once, if batch_tokens is set.
        warmup_ratio: fraction of the steps for linear warm-up; requires warmup_steps to be null.
        metrics: metrics of all scores; default, those of the task, else accuracy, or pearson and spearman for
            regression.
        metric_for_best_model: loss or one of the metrics, which selects the best weights and drives early stopping;
            default, the first metric.
    """

    accepted_models: ClassVar = TEXT_CLASSES
    decided_by_tasks: ClassVar[tuple[str, ...]] = (
        *LabelledTextArguments.decided_by_tasks,
        *("problem_type", "validation_split", "holdout", "metrics"),
    )

    problem_type: ProblemType | None = None
    validation_split: str | None = None
    architecture: str = "bert"
    size: str = "small"
    max_length: int = 128
    batch_size: int | None = 32
    micro_batch_size: int | None = None
    bucketing: bool = True
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    warmup_ratio: float | None = None
    metrics: list[Metric] = field(default_factory=list)
    metric_for_best_model: str | None = None  # type: ignore[assignment]  # wider than in TrainingArguments

    def __post_init__(self):
        super().__post_init__()
        if self.task and self.problem_type:
            raise ValueError(f"task determines problem_type: set it to null, got {self.problem_type}")
        self.check_range(
            at_least_1="max_length batch_size micro_batch_size batch_tokens micro_batch_tokens",
            at_most={"max_length": LONGEST, "batch_size": LARGEST_BATCH},
        )
        self.check_distinct("metrics")
        self.check_exclusive("warmup_steps", "warmup_ratio")
        if self.warmup_ratio is not None and not 0.0 <= self.warmup_ratio < 1.0:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        self.check_exactly_one("batch_size", "batch_tokens")
        unit, other = ("tokens", "size") if self.batch_size is None else ("size", "tokens")
        if getattr(self, f"micro_batch_{other}") is not None:
            raise ValueError(f"micro_batch_{other} cannot be combined with batch_{unit}: give micro_batch_{unit}")
        if self.batch_tokens is not None:
            if self.max_length > min(self.batch_tokens, self.micro_batch_tokens or self.batch_tokens):
                raise ValueError(f"max_length must be at most the tokens of a batch, got {self.max_length}")
            if not self.bucketing:
                raise ValueError("batch_tokens needs texts sorted by length: bucketing=false needs batch_size")
        if not self.model_name_or_path:
            check_fields(self.config_class, self.model, TOKEN_FIELDS)
            limit = getattr(new_config(self.config_class, self), "max_position_embeddings", None)
            if limit and self.max_length > limit:
                raise ValueError(
                    f"max_length must be at most max_position_embeddings = {limit}, got {self.max_length}"
                )

    def check_validation_data(self) -> None:
        """See `SplitArguments`; both may be null."""
        self.check_exclusive("holdout", "validation_split")

    def resolve(self, steps_per_epoch: int | None, max_steps: int) -> tuple["TextArguments", None]:
        """See `TrainingArguments.resolve`."""
        if self.warmup_ratio is None:
            return self, None
        return replace(self, warmup_steps=round(self.warmup_ratio * max_steps), warmup_ratio=None), None


@dataclass(kw_only=True)
class TextClassificationArguments(TextArguments):
    """Arguments of text classification training.

    Args:
        tokenizer: folder or Hub id of a tokenizer; default, one is trained on the training data: WordPiece for bert,
            byte-pair encoding for gpt.
        vocab_size: vocabulary size of the trained tokenizer.
        lowercase: the trained tokenizer lower-cases all text.
        language_weight: weight of the language-modelling loss on the texts, for decoders (Radford et al. 2018, eq. 5).
    """

    tokenizer: str | None = None
    vocab_size: int = 30_522
    lowercase: bool = True
    language_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="language_weight",
            at_least_1="vocab_size",
            at_most={"language_weight": 1000, "vocab_size": LARGEST_VOCABULARY},
        )
        if self.model_name_or_path and self.tokenizer:
            raise ValueError("model_name_or_path has its own tokenizer: do not give tokenizer with it")
        decoders = CAUSAL_LM.families()
        if self.language_weight and not self.model_name_or_path and self.architecture not in decoders:
            known = " or ".join(f'"{name}"' for name in decoders)
            raise ValueError(f"language_weight is for decoders: give architecture={known} or model_name_or_path")


@dataclass(kw_only=True)
class TextDistillationArguments(DistillationArguments, TextArguments):
    """Arguments of text classification with a teacher, whose tokenizer the student shares."""

    size: str = "tinybert4"


@dataclass(kw_only=True)
class TextClassificationEvaluationArguments(LabelledTextArguments, EvaluationArguments):
    """Scoring a text classifier.

    Args:
        tasks: comma-separated GLUE tasks, or "glue" for all nine, whose validation splits are scored and averaged.
            model is then a folder with a classifier for each task, named like it, or contains "{task}".
        match_labels: match labels to the model's classes by name or by number; a model with class names LABEL_0,
            LABEL_1 ... is matched by number.
        metrics: accuracy, f1, f1_macro, matthews; for regression pearson, spearman. Default, those of the task, else
            accuracy and f1, for more than two classes f1_macro; for regression both.
        confusion: draw the confusion matrix to this PNG file.
        max_length: longer texts are truncated to this many tokens; default, the limit of model and tokenizer.
        batch_size: texts in a batch.
    """

    decided_by_tasks: ClassVar[tuple[str, ...]] = (
        *LabelledTextArguments.decided_by_tasks,
        *("data_files", "metrics", "confusion"),
    )
    language_weight: ClassVar[float] = 0.0

    match_labels: Literal["name", "number"] = "name"
    metrics: list[str] = field(default_factory=list)
    confusion: str | None = None
    max_length: int | None = None
    batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.tasks is not None and self.split != "test":
            raise ValueError(f'tasks determines split: leave it out, got "{self.split}"')
        self.check_range(at_least_1="max_length batch_size", at_most={"max_length": LONGEST, "batch_size": 2**16})
        check_png("confusion", self.confusion)


@dataclass
class TextCollator:
    """Examples of `tokenize_texts` -> ``input_ids`` (B, T), ``labels``, ``indices`` (B,), ``texts``: their number.

    If there is padding, also ``attention_mask`` (B, T); if the examples have them, ``token_type_ids`` (B, T). Labels
    are int64 classes, or float32 numbers. A dummy batch has no labels and 0 texts, so it counts for nothing.

    Args:
        tokenizer: needs a padding token.
        label_ids: stored label -> class of the model; None for regression. A text has no label if it is stored as None
            or a negative class.
        language: add ``language_labels`` (B, T), the tokens for a language-modelling loss.

    Raises:
        ValueError: the tokenizer has no padding token; or, when called, a label is not one of the model's classes.
    """

    tokenizer: InitVar[Tokenizer]
    label_ids: dict[int | str, int] | None
    language: bool = False

    def __post_init__(self, tokenizer: Tokenizer):
        require_tokens(tokenizer, "pad_token")
        self.pad = tokenizer.pad_token_id

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        batch: Batch = pad_tokens(examples, self.pad)
        if SEGMENTS in examples[0]:
            batch[SEGMENTS] = pad([example[SEGMENTS] for example in examples], 0)
        batch["labels"] = self.labels([None if is_dummy else example.get(LABEL) for example in examples], indices)
        if self.language:
            tokens = pad([example["input_ids"] for example in examples], IGNORE_INDEX)
            batch["language_labels"] = tokens.fill_(IGNORE_INDEX) if is_dummy else tokens
        return batch | {"indices": torch.tensor(indices), "texts": 0 if is_dummy else len(examples)}

    def labels(self, values: list[Any], indices: list[int]) -> Tensor:
        """Return (B,) classes, `IGNORE_LABEL` for unlabelled texts; or numbers, NaN for unlabelled texts."""
        if self.label_ids is None:
            return torch.tensor([float("nan") if value is None else float(value) for value in values])
        classes = []
        for value, index in zip(values, indices, strict=True):
            if not has_label(value):
                classes.append(IGNORE_LABEL)
            elif value in self.label_ids:
                classes.append(self.label_ids[value])
            else:
                raise ValueError(f"label {value!r} of text {index} is not a class of the model")
        return torch.tensor(classes)


class TextClassificationTask(Task):
    """Cross-entropy of the class, or squared error; with ``language_weight`` also the language-modelling loss.

    Attributes:
        labels: names of the model's classes; None for regression.
        validation: names of the splits that are scored; the first decides which weights are best.
    """

    Arguments = TextClassificationArguments
    EvaluationArguments = TextClassificationEvaluationArguments
    DistillationArguments = TextDistillationArguments
    kind, sample, hub_task = "text classifiers", "texts", "text-classification"
    item, term = "texts", "label"
    processor_class, processor_folder = AutoTokenizer, "tokenizer"
    auto_class = AutoModelForSequenceClassification
    described_columns = ("label_column",)
    cache_options = ("max_length",)

    def __init__(self, args: Any, accelerator: Accelerator):
        super().__init__(args, accelerator)
        self.labels: list[str] | None = None
        self.validation: list[str] = []
        self.matched: str | None = None  # how an evaluation matches labels to classes: "name" or "number"
        self.matched_ids: dict[int | str, int] | None = None
        self.predictions: Predictions | None = None  # of the last evaluation

    # --- data

    def load_splits(self) -> dict[str, datasets.Dataset]:
        """Rows of `text_rows` by split; also completes the arguments with values that task or data determine.

        Raises:
            MissingData: the data set does not exist, and ``args.task`` is set.
            ValueError: a split, column or label does not exist or does not fit.
        """
        args, task = self.args, self.args.glue_task
        splits = self.load_source()
        columns = args.text_columns or list(task.text_columns if task else ())

        def rows_of(name: str, argument: str) -> datasets.Dataset:
            return self.sample_rows(take_split(splits, name, argument), columns)

        if self.evaluating:
            return {args.split: self.rows_to_score(rows_of(args.split, "split"))}
        rows, self.validation = split_texts(args, rows_of)
        return self.resolve_labels(rows, columns)

    def load_source(self) -> datasets.DatasetDict:
        """The data set as stored, all its splits."""
        args, task = self.args, self.args.glue_task
        return glue.load_task(task, *args.source) if task else load_texts(*args.source)

    def sample_rows(self, rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
        """Rows of `text_rows` from those of the data set."""
        task = self.args.glue_task
        rows = text_rows(rows, columns, self.args.label_column)
        return glue.hide(rows) if task and task.regression else rows

    def tokens(self, split: str) -> datasets.Dataset:
        """Rows of `tokenize_texts` of a split."""
        return tokenize_texts(self.splits[split], self.processor, self.args.max_length)

    def rows_to_score(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Rows of an evaluation; integers of a GLUE task get the names of its classes.

        Raises:
            ValueError: there are no labels, and no file for the predictions.
        """
        args, task = self.args, self.args.glue_task
        if not args.output and not any(has_label(value) for value in rows.unique(LABEL)):
            raise ValueError(
                f'split "{args.split}" has no labels, so it cannot be scored; output writes its predictions'
            )
        if task and task.labels and has_integers(rows):
            rows = rows.cast_column(LABEL, ClassLabel(names=list(task.labels)))
        return first(rows, args.max_samples)

    def resolve_labels(self, rows: dict[str, datasets.Dataset], columns: list[str]) -> dict[str, datasets.Dataset]:
        """Convert all labels to classes or to numbers, check them, and complete columns and metrics of the arguments.

        Raises:
            ValueError: see `load_splits`.
        """
        args, task = self.args, self.args.glue_task
        train = args.train_split
        if task:
            regression = task.regression
        else:
            regression = args.problem_type == "regression" if args.problem_type else is_regression(rows[train])
            convert = as_numbers if regression else as_classes if args.problem_type else None
            rows = {name: convert(part) for name, part in rows.items()} if convert else rows
        if regression:
            tell_unlabelled([value is not None for value in rows[train][LABEL]], train)
        else:
            self.labels = class_names(rows[train], task.labels if task else ())
            check_classes(rows[train], self.labels, train, known=bool(task))
        arguments = {
            **dict.fromkeys(args.test_splits, "test_splits"),
            **dict.fromkeys(self.validation, "validation_split"),
        }
        for name, argument in arguments.items():
            check_labelled(rows[name], name, argument, self.labels, numbered=bool(task))
        if self.labels is not None:
            tell_untrained(rows, train, self.labels)
        metrics = args.metrics or list(
            task.metrics if task else ["pearson", "spearman"] if regression else ["accuracy"]
        )
        check_metrics(metrics, regression)
        best = args.metric_for_best_model or metrics[0]
        if best not in ("loss", *metrics):
            raise ValueError(
                f'metric_for_best_model must be loss or among metrics, {", ".join(metrics)}, got "{best}"'
            )
        self.args = replace(args, text_columns=columns, metrics=metrics, metric_for_best_model=best)
        return rows

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return fingerprint(rows)

    def describe_data(self) -> dict[str, Any]:
        """See `Task`."""
        return {**super().describe_data(), "text_column": " + ".join(self.args.text_columns) or None}

    def label_ids(self, split: str = "") -> dict[int | str, int] | None:
        """Map the labels of a split, as stored, to classes of the model; None for regression.

        Without such a split, labels are class numbers.
        """
        if self.evaluating:
            return self.matched_ids
        if split in self.splits:
            return None if self.labels is None else class_ids(self.splits[split], self.labels)
        count: Any = self.model.config.num_labels  # not None, which transformers' annotation allows
        return None if count == 1 else {number: number for number in range(count)}

    # --- processor and model

    def build_processor(self) -> Tokenizer:
        """See `classifier_tokenizer`."""
        return classifier_tokenizer(self.args, self.splits[self.args.train_split])

    def build_model(self) -> PreTrainedModel:
        """See `build_classifier`; the tokenizer then returns only the inputs that the model reads."""
        model = build_classifier(self.args, self.processor, self.labels)
        keep_what_is_read(self.processor, model)
        return model

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        return "ForSequenceClassification" in ", ".join(config.architectures or ())

    def load_pretrained(self) -> None:
        """See `Task`; matches the labels to the model's classes and completes the arguments.

        Raises:
            ValueError: the labels do not fit the model, or an option does not.
        """
        args = self.args
        self.model, self.processor = load_text_classifier(args.model, **args.pretrained)
        config, rows = self.model.config, self.splits[args.split]
        count: Any = config.num_labels  # not None, which transformers' annotation allows
        regression = count == 1
        if regression and args.confusion:
            raise ValueError("confusion is for classes, but the model predicts a number")
        if regression and has_integers(rows):
            rows = as_numbers(rows)
        if regression != is_regression(rows):
            predicts = "a number" if regression else f"{count} classes"
            raise ValueError(
                f'"{args.model}" predicts {predicts}, and the labels of the data set are {rows.features[LABEL]}'
            )
        limits = (self.processor.model_max_length, getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH)
        if args.max_length is not None and args.max_length > limits[1]:
            raise ValueError(
                f"max_length must be at most {limits[1]}, max_position_embeddings of the model, got {args.max_length}"
            )
        task_metrics = args.glue_task.metrics if args.task else ()
        metrics = args.metrics or list(task_metrics or default_metrics(count))
        check_metrics(metrics, regression)
        if not regression:
            self.labels = classes_of_model(config)
            self.matched, self.matched_ids = match_classes(rows, self.labels, args.match_labels)
        self.args = replace(args, metrics=metrics, max_length=args.max_length or min(limits))
        self.splits[args.split] = rows

    # --- batches and losses

    def collator(self, split: str = "", training: bool = False) -> TextCollator:
        """See `Task`."""
        return TextCollator(self.processor, self.label_ids(split), bool(self.args.language_weight))

    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> StepLoader:
        """See `Task`; the batches of an evaluation are sorted by length."""
        args = self.args
        tokens = self.tokens(split)
        if not (training or self.evaluating or collate):  # distillation makes a second loader, with its own collator
            tell_unknown(tokens, self.processor)
        lengths, collate = text_lengths(tokens), collate or self.collator(split, training)
        if self.evaluating:
            return StepLoader(tokens, LengthBatchSampler(lengths, args.batch_size, shuffle=False), collate)
        if args.batch_tokens is not None:
            sampler: Sampler = TokenBudgetSampler(lengths, args.batch_tokens, args.seed, shuffle=training)
        elif args.bucketing or not training:
            sampler = LengthBatchSampler(lengths, args.batch_size, args.seed, shuffle=training)
        else:
            sampler = BatchSampler(len(lengths), args.batch_size, args.seed)
        micro = args.micro_batch_size or args.micro_batch_tokens
        return StepLoader(tokens, sampler, collate, micro, **placement(args, self.accelerator, workers=training))

    def count(self, batch: Batch) -> dict[str, int]:
        """Labelled texts; for a language-modelling loss also tokens that follow another."""
        counts = {"label": int(is_labelled(batch["labels"]).sum())}
        if "language_labels" in batch:
            counts["language"] = int((batch["language_labels"][:, 1:] != IGNORE_INDEX).sum())
        return counts

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Task`; a model that does not read ``token_type_ids`` is given none, see `forward`."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", SEGMENTS) if name in batch}

    def forward(self, model: nn.Module, batch: Batch, **options: Any) -> Any:
        """Run a model on those of the `inputs` that it reads."""
        names = input_names(model)
        return model(**{name: value for name, value in self.inputs(batch).items() if name in names}, **options)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`."""
        output = self.forward(model, batch, output_hidden_states="language_labels" in batch)
        losses = self.output_losses(output, output.logits, batch)
        if "language_labels" in batch:
            embeddings = extract_model_from_parallel(model).get_input_embeddings()  # a decoder's output layer too
            total = language_loss(output.hidden_states[-1], None, embeddings, batch["language_labels"], 1)
            losses["language"] = self.args.language_weight * total
        return losses

    def output_losses(self, output: ModelOutput, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """See `Task`; logits are (B, C)."""
        return {"label": each_loss(logits, batch["labels"]).sum()}

    # --- scores

    @property
    def validation_split(self) -> str:
        """See `Task`."""
        return self.args.split if self.evaluating else self.validation[0]

    @property
    def scored_splits(self) -> list[str]:
        """See `Task`; MNLI has two validation splits."""
        return list(dict.fromkeys([*self.validation, *self.args.test_splits]))

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """The loss and all metrics."""
        return ("loss", *self.args.metrics)

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return tuple(self.args.metrics)

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss and all metrics; none for a split without labels."""
        args, loader = self.args, self.evaluation_loader(split)
        found = predict(self.accelerator, self, model, loader, progress=self.evaluating and args.progress)
        values = {"loss": found.loss, **score(found, args.metrics)} if found.labelled.any() else {}
        if not self.evaluating:
            return Scores(values)
        self.predictions = found
        return Scores(
            values,
            samples=len(found.labels),
            details={"unlabelled": int((~found.labelled).sum()), "match_labels": self.matched},
            listing={"predictions": found.listing(self.labels)},
        )

    def end_evaluation(self, scores: Scores) -> None:
        """Draw the confusion matrix, if asked for.

        Raises:
            ValueError: no text has a label.
        """
        found = self.predictions
        if self.args.confusion and found is not None and self.labels is not None:
            from ..viz.confusion import plot_confusion  # matplotlib takes long to import and is rarely needed

            known, title = found.labelled, Path(self.args.model).name
            plot_confusion(found.labels[known], found.predicted[known], self.labels, self.args.confusion, title)

    # --- runs

    @classmethod
    def run_all(cls, args: TextArguments, fit: Callable[..., RunRecord | None]) -> int:
        """See `Task`; with ``args.tasks`` a run for each, see `run_tasks`."""
        return super().run_all(args, fit) if args.tasks is None else run_tasks(args, fit)

    @classmethod
    def evaluates_several(cls, options: dict[str, Any]) -> bool:
        """See `Task`."""
        return options.get("tasks") is not None

    @classmethod
    def evaluate_all(
        cls, args: TextClassificationEvaluationArguments, evaluate: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """See `Task`; with ``args.tasks`` several evaluations, see `evaluate_tasks`."""
        return evaluate(args) if args.tasks is None else evaluate_tasks(args, evaluate)

    def end_training(self) -> None:
        """Make the saved tokenizer return only the inputs that the model reads."""
        keep_what_is_read(self.processor, self.model)

    # --- distillation

    def build_student_processor(self) -> Tokenizer:
        """See `Task`; the tokenizer of a pretrained student must be the teacher's.

        Raises:
            ValueError: it is not.
        """
        tokenizer = complete(super().build_student_processor())
        if source := self.args.model_name_or_path:
            check_tokenizers(complete(AutoTokenizer.from_pretrained(source, trust_remote_code=False)), tokenizer)
        return tokenizer

    def build_student(self, teacher: PreTrainedConfig) -> PreTrainedModel:
        """See `Task`; a new student has at least as many embeddings as its teacher, whose table may be padded.

        The tokenizer returns all inputs that the teacher reads.
        """
        return build_classifier(self.args, self.processor, self.labels, teacher.get_text_config().vocab_size)

    def sample_inputs(self) -> dict[str, Tensor]:
        """A text of the median length of the validation data."""
        lengths = np.sort(text_lengths(self.evaluation_loader(self.validation_split).examples))
        return {"input_ids": torch.ones(1, int(lengths[len(lengths) // 2]), dtype=torch.long)}


def split_texts(
    args: TextArguments, rows_of: Callable[[str, str], datasets.Dataset]
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Return rows by split, see `split_rows`, and the validation splits; the first decides which weights are best."""
    if args.holdout is not None:
        return split_rows(args, args.test_splits, rows_of), ["holdout"]
    by_task = ("validation",) if args.glue_task is None else args.glue_task.validation
    names = [args.validation_split] if args.validation_split else list(by_task)
    chosen = replace(args, validation_split=names[0])
    return split_rows(chosen, [*names[1:], *args.test_splits], rows_of), names


def check_labelled(
    rows: datasets.Dataset, split: str, argument: str, labels: list[str] | None, numbered: bool = False
) -> None:
    """Refuse a split that cannot be scored, before training.

    Args:
        labels: names of the model's classes; None for regression.
        numbered: plain integers are indices into ``labels``, as in GLUE.

    Raises:
        ValueError: it has no labels, such as GLUE's test splits on the Hub, or a label that is not a class of the
            training data.
    """
    values = rows.unique(LABEL)
    if all(value is None or value == glue.HIDDEN for value in values):
        raise ValueError(f'{argument} "{split}" has no labels, so it cannot be scored')
    if labels is None:
        return
    if is_regression(rows):
        raise ValueError(
            f'{argument} "{split}" has labels that are not integers, but those of the training split are classes: '
            'problem_type="regression" trains on numbers'
        )
    try:
        named_by_text = not all(name.lstrip("-").isdecimal() for name in labels)
        # If the classes of the training data are named by text, integers are none of them.
        known = {} if has_integers(rows) and not numbered and named_by_text else class_ids(rows, labels)
    except ValueError as error:
        raise ValueError(f'{argument} "{split}": {error}') from error
    for value in values:
        if has_label(value) and value not in known:
            raise ValueError(
                f'{argument} "{split}": label {value!r} is not a class of the training data; it has '
                f"{', '.join(labels[:20])}{', ...' * (len(labels) > 20)}"
            )


def has_label(value: Any) -> bool:
    """Return True if a stored label exists: neither None nor a negative class."""
    return value is not None and not (isinstance(value, int) and value < 0)


def has_integers(rows: datasets.Dataset) -> bool:
    """Return True if labels are stored as integers."""
    kind = rows.features[LABEL]
    return isinstance(kind, Value) and bool(re.match("u?int", kind.dtype))


def default_metrics(classes: int) -> Sequence[str]:
    """Return the metrics of an evaluation of a model with a number of classes; 1 for regression."""
    if classes == 1:
        return ("pearson", "spearman")
    return ("accuracy", "f1") if classes == 2 else ("accuracy", "f1_macro")


def is_labelled(labels: Tensor) -> Tensor:
    """Return which of a batch's labels, classes or numbers, exist; bool of the same shape."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_LABEL


def each_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy or squared error (B,) of logits (B, C); 0 for unlabelled texts."""
    if labels.is_floating_point():
        return (logits[:, 0].float() - labels).where(is_labelled(labels), 0.0).square()
    return cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="none")


@dataclass
class Predictions:
    """Predictions of a model for every text of a split, in its order; equal on all ranks.

    Args:
        labels: (N,) int64 classes or float32 numbers; `IGNORE_LABEL` or NaN for unlabelled texts.
        logits: (N, C) float32.
        loss: mean loss of labelled texts, NaN if there are none.
    """

    labels: np.ndarray
    logits: np.ndarray
    loss: float

    @property
    def predicted(self) -> np.ndarray:
        """(N,): the most probable classes, or the predicted numbers."""
        return self.logits[:, 0] if self.logits.shape[1] == 1 else self.logits.argmax(axis=1)

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool."""
        return is_labelled(torch.from_numpy(self.labels)).numpy()

    def listing(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return the index, label and prediction of each text; for classes their names and the probability.

        Args:
            names: of the classes; None for regression.
        """
        labels = [value if known else None for value, known in zip(self.labels.tolist(), self.labelled, strict=True)]
        rows = [
            {"index": i, "label": label, "predicted": value}
            for i, (label, value) in enumerate(zip(labels, self.predicted.tolist(), strict=True))
        ]
        if names is None:
            return rows
        probabilities = softmax(self.logits, axis=1).max(axis=1).tolist()
        return [
            {
                "index": row["index"],
                "label": None if row["label"] is None else names[row["label"]],
                "predicted": names[row["predicted"]],
                "probability": probability,
            }
            for row, probability in zip(rows, probabilities, strict=True)
        ]


def score(found: Predictions, metrics: Sequence[str]) -> dict[str, float]:
    """Return {metric: value} of predictions; see `metrics.glue.METRICS`."""
    return Glue(metrics=metrics).result_of(found.predicted, found.labels)


@torch.inference_mode()
def predict(
    accelerator: Accelerator, task: TextClassificationTask, model: nn.Module, loader: Loader, progress: bool = False
) -> Predictions:
    """Run a model on every text of a split once; each rank computes its share.

    Args:
        progress: show a progress bar.
    """
    training = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    total = loader.steps_per_epoch() if progress else None
    for micro_batches in tqdm(loader.epoch(0), total=total, unit="batch", disable=not progress):
        for batch in micro_batches:
            batch = send_to_device(batch, accelerator.device)
            logits = task.forward(model, batch).logits.float()
            # Sharded models communicate in every forward pass, so a rank without texts runs a dummy batch.
            if batch["texts"]:
                parts.append((batch["indices"], batch["labels"], each_loss(logits, batch["labels"]), logits))
    model.train(training)
    mine = [tuple(part.cpu().numpy() for part in columns) for columns in parts]
    everything = gather_object(mine) if accelerator.num_processes > 1 else mine
    indices, labels, loss, logits = (np.concatenate(column) for column in zip(*everything, strict=True))
    order = indices.argsort()
    known = is_labelled(torch.from_numpy(labels)).numpy()
    mean = float(loss[known].mean(dtype=np.float64)) if known.any() else float("nan")
    return Predictions(labels[order], logits[order], mean)
