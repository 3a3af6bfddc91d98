"""Score an image classifier on any split of any data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig

from ..data.images import LABEL, is_label, label_ids, label_names, stated_names
from ..hub.loading import read_json
from ..limits import LIMITS
from ..metrics import RealAccuracy
from ..tasks.classification import IGNORE_LABEL, ClassificationTask, Predictions, predict, score
from ..values import checked
from .reading import EvaluationLoader, Stopwatch, first, load_image_model, one_process, read_split
from .results import check_options, check_png, describe, metric, write


@checked(**LIMITS)
def evaluate_classification(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    match_labels: Literal["name", "number"] = "name",
    real_labels: str | None = None,
    confusion: str | None = None,
    max_samples: int | None = None,
    max_bad_images: int = 10,
    batch_size: int = 64,
    dataloader_num_workers: int = 0,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Classify the images of a split and score the classes.

    Args:
        model: folder or Hub id of an image classifier, ours or any other, with its image processor.
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, "number-words" or "digits".
        split: of the data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        image_column: images, their bytes or paths; default, the only column of images.
        label_column: a ClassLabel, integers or strings; default, the only ClassLabel or "label".
        match_labels: labels are the model's classes of the same name, or of the same number. A model without names,
            LABEL_0 and so on, is matched by number.
        real_labels: JSON file, the list of right labels of each image of the split, as ImageNet-ReaL's real.json has
            them; labels as the data set stores them.
        confusion: draw the confusion matrix into this PNG file.
        max_samples: score only the first rows.
        max_bad_images: images that cannot be read are reported and left out, up to so many.
        batch_size: images in a batch.
        dataloader_num_workers: processes that read images.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result, with the predictions of all images, to this JSON file.
        progress: show a progress bar.

    Returns:
        ``metrics``, rows of name, value, split and signature: accuracy, top5_accuracy where there are five classes,
        real_accuracy; no row for a split without labels. ``images`` that were classified, ``left_out`` how many could
        not be read and how many have no label; ``throughput``, see `Stopwatch`; model, dataset_name and versions.

    Raises:
        ValueError: split, column or option is not known, labels and classes do not match, a number is too small, or
            the confusion matrix would have no image with a label, or too many classes.
        FileNotFoundError: a file or the folder of ``output`` does not exist.
    """
    counts = {"max_samples": max_samples, "batch_size": batch_size, "dataloader_num_workers": dataloader_num_workers}
    check_options(mixed_precision, output, max_bad_images=max_bad_images, **counts)
    check_png("confusion", confusion)
    where = (dataset_name, split, dataset_config, dataset_revision, data_files)
    rows = read_split(*where, image_column, label_column)
    real = read_real_labels(real_labels, len(rows)) if real_labels else None
    accelerator = one_process()
    loaded, processor = load_image_model(AutoModelForImageClassification, model, revision, trust_remote_code)
    names = class_names(loaded.config)
    matched, ids = match_classes(rows, names, match_labels)
    rows, loaded = first(rows, max_samples), loaded.to(accelerator.device)
    if confusion:
        check_confusion(rows, names)
    task = ClassificationTask(processor, ids)
    on_gpu = accelerator.device.type == "cuda"
    loader = EvaluationLoader(rows, task, batch_size, dataloader_num_workers, max_bad_images, on_gpu, progress)
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")
    with Stopwatch(loaded) as watch, bf16:
        found = predict(accelerator, task, loaded, loader)
    unlabelled = int((found.labels == IGNORE_LABEL).sum())
    result = {
        **describe(model, dataset_name, split, rows, score_classes(found, real, ids, split)),
        "images": len(found.indices),
        "left_out": {"unreadable": len(loader.bad), "unlabelled": unlabelled},
        "match_labels": matched,
        "mixed_precision": mixed_precision,
        "throughput": watch.throughput(len(found.indices)),
    }
    if output:  # first: what was computed is not lost if the picture cannot be drawn
        write({**result, "unreadable": loader.bad, "predictions": named(found, names)}, output)
    if confusion:
        draw_confusion(found, names, f"{Path(model).name}: {Path(dataset_name).name}, {split}", confusion)
    return result


def class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's classes, in order."""
    return [config.id2label[number] for number in range(config.num_labels)]


def match_classes(rows: datasets.Dataset, names: Sequence[str], match_labels: str) -> tuple[str, dict[int | str, int]]:
    """From labels as `image_rows` stores them to classes of a model; and whether by name or number.

    Args:
        names: of the model's classes.
        match_labels: "name" or "number".

    Raises:
        ValueError: a label is no class of the model, or several; the error tells what only one of them has.
    """
    stored = label_names(rows)
    if match_labels == "number" or list(names) == [f"LABEL_{i}" for i in range(len(names))]:
        numbers = stored if stated_names(rows) is None else range(len(stored))
        if beyond := [number for number in numbers if not str(number).isdecimal() or int(number) >= len(names)]:
            raise ValueError(
                f"labels must be numbers of the model's classes, 0 to {len(names) - 1}; the data set also has "
                f"{some(beyond)}"
            )
        numbers = range(len(names))
        return "number", {number: number for number in numbers} | {str(number): number for number in numbers}
    if unknown := [name for name in stored if name not in set(names)]:
        rest = some([name for name in dict.fromkeys(names) if name not in set(stored)]) or "none"
        alike = some(sorted(name for name, count in Counter(names).items() if count > 1))
        raise ValueError(
            f"labels of the data set are not classes of the model: the data set alone has {some(unknown)}; the model "
            f"alone has {rest}{f', and several classes called {alike}' * bool(alike)}. If their numbers mean the "
            "same, match_labels=number compares those"
        )
    if twice := sorted({name for name in stored if names.count(name) > 1}):
        raise ValueError(
            f"the model has several classes called {some(twice)}: if the numbers of labels and classes mean the same, "
            "match_labels=number compares those"
        )
    return "name", label_ids(rows, names)


def some(values: Sequence[Any], limit: int = 10) -> str:
    """Values in words, the first ones of many."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(str(value) for value in values[:limit]) + more


def read_real_labels(file: str, rows: int) -> list[list[int | str]]:
    """The lists of right labels of all images of a split.

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
    if len(lists) != rows:
        raise ValueError(f"real_labels {file} must have a list for each of the {rows} images, got {len(lists)}")
    return lists


def score_classes(
    found: Predictions, real: list[list[int | str]] | None, ids: Mapping[int | str, int], split: str
) -> list[dict[str, Any]]:
    """All scores of predictions; none without labels.

    Args:
        real: right labels of each image of the split.
        ids: from those to the model's classes.

    Raises:
        ValueError: a real label is not one of the data set.
    """
    rows = []
    if (found.labels != IGNORE_LABEL).any():
        rows = [{**row, "split": split} for row in score(found)]
    if real is not None:
        chosen = [(index, real[index]) for index in found.indices.tolist()]
        if unknown := [(index, label) for index, labels in chosen for label in labels if label not in ids]:
            raise ValueError(f"real_labels: {unknown[0][1]!r} of image {unknown[0][0]} is not a label of the data set")
        right = [[ids[label] for label in labels] for _, labels in chosen]
        value = RealAccuracy().compute(predictions=found.top.tolist(), references=right)["real_accuracy"]
        rows.append(metric("real_accuracy", value, split))
    return rows


def named(found: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each image its index, the name of its label, and those of the classes predicted, best first."""
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
    from ..viz.confusion import MAX_CLASSES  # pictures take a while to import, and most evaluations draw none

    if len(names) > MAX_CLASSES:
        raise ValueError(f"confusion has at most {MAX_CLASSES} classes, but the model has {len(names)}")
    if not any(map(is_label, rows[LABEL])):
        raise ValueError("confusion needs images with a label, but no row of the split has one")


def draw_confusion(found: Predictions, names: Sequence[str], title: str, output: str) -> None:
    """The confusion matrix of labelled images.

    Raises:
        ValueError: none of them could be read.
    """
    from ..viz.confusion import plot_confusion

    labelled = found.labels != IGNORE_LABEL
    plot_confusion(found.labels[labelled], found.top[labelled, 0], names, output, title)
