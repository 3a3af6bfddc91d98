"""Score a classifier of texts on any split of any data set."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Value
from scipy.special import softmax
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data import glue
from ..data.batching import StepLoader
from ..data.images import stated_names
from ..data.labelled_texts import (
    LABEL,
    LengthBatchSampler,
    as_numbers,
    is_regression,
    load_texts,
    text_lengths,
    text_rows,
    tokenize_texts,
)
from ..data.source import take_split
from ..data.text import fingerprint
from ..hub.loading import check_vocabulary, load_model, load_tokenizer
from ..limits import LIMITS
from ..metrics.glue import check_metrics
from ..tasks.labels import class_names, match_classes
from ..tasks.text_classification import IGNORE_LABEL, Predictions, TextClassificationTask, input_names, predict, score
from ..values import checked
from .reading import Stopwatch, first, one_process
from .results import check_options, check_png, describe, write

LONGEST = 512  # tokens of a text, where neither model nor tokenizer has a limit


@checked(**LIMITS)
def evaluate_text_classification(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    task: str | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    match_labels: Literal["name", "number"] = "name",
    metrics: Sequence[str] = (),
    confusion: str | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Classify the texts of a split, or predict their numbers, and score that.

    Args:
        model: folder or Hub id of a text classifier, ours or any other, with its tokenizer.
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-parity"; "{task}"
            in it stands for the task's name.
        split: of the data set.
        dataset_config: configuration of the data set; default, the task's name where the data set is called "glue".
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        task: of GLUE; it knows text_columns and metrics.
        text_columns: one or two columns, or dotted paths; default, the task's, or the only column of texts.
        label_column: a ClassLabel, integers or strings, or numbers; default, the only ClassLabel or "label".
        match_labels: labels are the model's classes of the same name, or of the same number. A model without names,
            LABEL_0 and so on, is matched by number.
        metrics: accuracy, f1, f1_macro, matthews; of numbers pearson, spearman. Default, the task's, otherwise
            accuracy and f1, of more classes f1_macro; of numbers both.
        confusion: draw the confusion matrix into this PNG file.
        max_length: longer texts are cut to so many tokens; default, the longest the model and its tokenizer take.
        max_samples: score only the first rows.
        batch_size: texts in a batch.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result, with the predictions of all texts, to this JSON file; labels may then be
            missing, as in GLUE's test splits.
        progress: show a progress bar.

    Returns:
        ``metrics``, rows of name, value, split and signature; ``texts`` that were read and how many ``unlabelled``;
        ``throughput``, see `Stopwatch`; model, dataset_name and versions.

    Raises:
        ValueError: split, column or option is not known, labels and classes do not match, or a number is too small.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    check_options(mixed_precision, output, max_length=max_length, max_samples=max_samples, batch_size=batch_size)
    check_png("confusion", confusion)
    rows = read_texts(
        dataset_name, split, dataset_config, dataset_revision, data_files, task, text_columns, label_column
    )
    if not output and not any(is_label(value) for value in rows.unique(LABEL)):
        raise ValueError(f'split "{split}" has no labels, so it cannot be scored; output writes its predictions')
    result = evaluate_rows(
        model,
        dataset_name,
        split,
        rows,
        metrics or (glue.find_task(task).metrics if task else ()),
        confusion,
        match_labels=match_labels,
        max_length=max_length,
        max_samples=max_samples,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if output:
        write(result, output)
    return {name: value for name, value in result.items() if name != "predictions"}


def evaluate_rows(
    model: str,
    dataset_name: str,
    split: str,
    rows: datasets.Dataset,
    metrics: Sequence[str] = (),
    confusion: str | None = None,
    *,
    match_labels: str,
    max_length: int | None,
    max_samples: int | None,
    batch_size: int,
    mixed_precision: str,
    revision: str | None,
    trust_remote_code: bool,
    progress: bool,
) -> dict[str, Any]:
    """What `evaluate_text_classification` returns for rows of `read_texts`, and their ``predictions``."""
    loaded, tokenizer = load_text_classifier(model, revision, trust_remote_code)
    numbers = loaded.config.num_labels == 1
    if numbers and re.match("u?int", getattr(rows.features[LABEL], "dtype", "")) and not stated_names(rows):
        rows = as_numbers(rows)
    if numbers != is_regression(rows):
        says = "a number" if numbers else f"{loaded.config.num_labels} classes"
        raise ValueError(f'"{model}" predicts {says}, and the labels of the data set are {rows.features[LABEL]}')
    names = [] if numbers else class_names(loaded.config)
    metrics = metrics or default_metrics(names)
    check_metrics(metrics, numbers)
    matched, ids = (None, None) if numbers else match_classes(rows, names, match_labels)
    rows = first(rows, max_samples)
    found, throughput = classify(loaded, tokenizer, rows, ids, max_length, batch_size, mixed_precision, progress)
    labelled = ~np.isnan(found.labels) if numbers else found.labels != IGNORE_LABEL
    scores = [{**row, "split": split} for row in score(found, metrics)] if labelled.any() else []
    if confusion:
        draw_confusion(found.labels[labelled], found.predicted[labelled], names, Path(model).name, confusion)
    return {
        **describe(model, dataset_name, split, rows, scores, fingerprint),
        "texts": len(rows),
        "unlabelled": int((~labelled).sum()),
        "match_labels": matched,
        "mixed_precision": mixed_precision,
        "throughput": throughput,
        "predictions": named(found, labelled, names),
    }


def is_label(value: Any) -> bool:
    """Whether a label as it is stored is one."""
    return value is not None and not (isinstance(value, int) and value < 0)


def read_texts(
    dataset_name: str,
    split: str,
    dataset_config: str | None,
    dataset_revision: str | None,
    data_files: dict[str, str | list[str]] | None,
    task: str | None,
    text_columns: Sequence[str],
    label_column: str | None,
) -> datasets.Dataset:
    """A split as `text_rows`; numbers of a GLUE task's classes get their names.

    Raises:
        MissingData: the task has no such data set.
        ValueError: there is no such data set, split, column or task.
    """
    where = (dataset_name, dataset_config, dataset_revision, data_files)
    if task is None:
        return text_rows(take_split(load_texts(*where), split, "split"), text_columns, label_column)
    known = glue.find_task(task)
    rows = take_split(glue.load_task(known, *where), split, "split")
    rows = text_rows(rows, text_columns or known.text_columns, label_column)
    if known.regression:
        return glue.hide(rows)
    whole = isinstance(rows.features[LABEL], Value) and "int" in rows.features[LABEL].dtype
    return rows.cast_column(LABEL, ClassLabel(names=list(known.labels))) if whole else rows


def load_text_classifier(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer of a folder or a Hub id, on the best device there is.

    Raises:
        ValueError: some weights were not saved.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, **options)
    loaded = load_model(AutoModelForSequenceClassification, model, **options)
    check_vocabulary(model, loaded.config, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id  # by which GPT-2 finds where a text ends
    return loaded.to(one_process().device), tokenizer


def default_metrics(names: Sequence[str]) -> Sequence[str]:
    """What is scored unless asked for otherwise; without names of classes, numbers are predicted."""
    if not names:
        return ("pearson", "spearman")
    return ("accuracy", "f1") if len(names) == 2 else ("accuracy", "f1_macro")


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    ids: dict[int | str, int] | None,
    max_length: int | None,
    batch_size: int,
    mixed_precision: str,
    progress: bool,
) -> tuple[Predictions, dict[str, float]]:
    """What a model says of every text, and how many texts a second; see `evaluate_text_classification`.

    Args:
        rows: of `text_rows`.
        ids: from labels to classes; None for numbers.
    """
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or LONGEST)
    if max_length is not None and max_length > limits[1]:
        raise ValueError(
            f"max_length must be at most {limits[1]}, max_position_embeddings of the model, got {max_length}"
        )
    task = TextClassificationTask(tokenizer, ids, input_names(model))
    bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")
    with TextStopwatch(model) as watch, bf16:
        tokens = tokenize_texts(rows, tokenizer, max_length or min(limits))
        sampler = LengthBatchSampler(text_lengths(tokens), batch_size, shuffle=False)
        loader = ProgressLoader(StepLoader(tokens, sampler, task.collate), progress)
        found = predict(one_process(), task, model, loader)
    return found, watch.throughput(len(rows))


class ProgressLoader:
    """A loader with a progress bar."""

    def __init__(self, loader: StepLoader, progress: bool):
        self.loader, self.progress = loader, progress

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """See `StepLoader`."""
        return self.loader.steps_per_epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """See `StepLoader`."""
        steps = self.loader.epoch(epoch, start)
        yield from tqdm(steps, total=self.steps_per_epoch(), unit="batch", disable=not self.progress)


class TextStopwatch(Stopwatch):
    """`Stopwatch` of texts."""

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The model has ended."""
        self.passes.append((len(kwargs["input_ids"]), self.now() - self.began))


def draw_confusion(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], title: str, output: str) -> None:
    """The confusion matrix of labelled texts.

    Raises:
        ValueError: there are no classes, or no text has a label.
    """
    if not names:
        raise ValueError("confusion is for classes, and the model predicts a number")
    from ..viz.confusion import plot_confusion  # pictures take a while to import, and most evaluations draw none

    plot_confusion(labels, predicted, names, output, title)


def named(found: Predictions, labelled: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each text its index, label and prediction: numbers, or names of classes and the likelihood of the one."""
    labels = [value if known else None for value, known in zip(found.labels.tolist(), labelled, strict=True)]
    if not names:
        pairs = zip(labels, found.predicted.tolist(), strict=True)
        return [{"index": i, "label": label, "predicted": value} for i, (label, value) in enumerate(pairs)]
    likelihood = softmax(found.logits, axis=1).max(axis=1).tolist()
    return [
        {"index": i, "label": None if label is None else names[label], "predicted": names[c], "probability": p}
        for i, (label, c, p) in enumerate(zip(labels, found.predicted.tolist(), likelihood, strict=True))
    ]
