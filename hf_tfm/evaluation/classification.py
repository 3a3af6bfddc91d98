"""Score an image classifier on any split of any data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoModelForImageClassification

from ..data.images import LABEL, is_label
from ..hub.loading import read_json
from ..limits import LIMITS
from ..metrics import RealAccuracy
from ..tasks.classification import IGNORE_LABEL, ClassificationTask, Predictions, predict, score
from ..tasks.labels import class_names, match_classes
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
