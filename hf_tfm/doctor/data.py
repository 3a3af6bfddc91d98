"""Check a data set of any task before training: ``hf-tfm doctor data``.

    load_splits -> the columns that the task reads -> `DataSplit`s -> checks -> findings with sample and remedy

Checks of texts, labels and images are functions that return one or more `Finding`s; add new ones to one of the lists
below. Object detection data sets are checked by `detection`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import datasets
from datasets import ClassLabel, Image, Value
from transformers import AutoTokenizer

from ..data import images, instructions, labelled_texts, language, panoptic, text, videos
from ..data.labelled_texts import load_texts
from . import image_checks, label_checks, text_checks, video_checks
from .data_case import Columns, DataCase, DataSplit
from .findings import Finding, condensed, failed, findings_of, save

Task = Literal[
    "translation",
    "language_modeling",
    "supervised_fine_tuning",
    "preference_optimization",
    "text_classification",
    "image_classification",
    "masked_image",
    "object_detection",
    "panoptic_segmentation",
    "video_forecasting",
]
TEXT_TASKS = ("translation", "language_modeling", "text_classification")
PROMPT_TASKS = {
    "supervised_fine_tuning": instructions.demonstration_rows,
    "preference_optimization": instructions.ranking_rows,
}
# check(split, case), for each split
OF_TEXTS: tuple[Callable, ...] = (
    text_checks.text_kind,
    text_checks.empty_texts,
    text_checks.damaged_characters,
    text_checks.unknown_tokens,
    text_checks.text_lengths,
    text_checks.repeated_texts,
)
OF_PAIRS: tuple[Callable, ...] = (text_checks.equal_sides, text_checks.length_ratio)
OF_PREFERENCES: tuple[Callable, ...] = (text_checks.equal_completions,)
OF_LABELS: tuple[Callable, ...] = (
    label_checks.missing_labels,
    label_checks.label_kind,
    label_checks.label_spelling,
    label_checks.class_balance,
)
OF_IMAGES: tuple[Callable, ...] = (
    image_checks.unreadable_images,
    image_checks.small_images,
    image_checks.blank_images,
)
OF_VIDEOS: tuple[Callable, ...] = (video_checks.frames_of_videos,)
# check(case), over all splits, if the task has these columns
ACROSS: dict[str, Callable] = {
    "texts": text_checks.shared_texts,
    "label": label_checks.classes_in_one_split,
    "image": image_checks.shared_images,
}


def find_task(features: Mapping[str, Any], label_column: str | None) -> Task:
    """Infer the task from the columns of a data set.

    Raises:
        ValueError: no task, or more than one, is possible; the error names the columns.
    """
    if "segments_info" in features:
        return "panoptic_segmentation"
    if "objects" in features:
        return "object_detection"
    if any(videos.holds_videos(kind) and not isinstance(kind, Image) for kind in features.values()):
        return "video_forecasting"
    labelled = label_column or any(isinstance(kind, ClassLabel) for kind in features.values()) or "label" in features
    if any(isinstance(kind, Image) for kind in features.values()):
        return "image_classification" if labelled else "masked_image"
    if "translation" in features:
        return "translation"
    if instructions.is_ranking(features):
        return "preference_optimization"
    if instructions.is_demonstration(features):
        return "supervised_fine_tuning"
    strings = strings_of(features)
    if labelled and strings:
        return "text_classification"
    if len(strings) == 1:
        return "language_modeling"
    raise ValueError(
        f"task must be one of {', '.join(get_args(Task))}: columns {', '.join(features)} fit several or none"
    )


def strings_of(features: Mapping[str, Any], label: str | None = None) -> list[str]:
    """Return the string columns, except the label column."""
    strings = [name for name, kind in features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    return [name for name in strings if name != label]


def find_columns(
    rows: datasets.Dataset,
    task: Task,
    text_columns: list[str],
    label_column: str | None,
    image_column: str | None,
    source_column: str | None,
    target_column: str | None,
) -> Columns:
    """Find the columns of a task in the same way as its recipe.

    Raises:
        ValueError: there is no such column, or the choice is ambiguous.
    """
    features = rows.features
    label = None
    if task in ("text_classification", "image_classification"):
        label = images.find_column(features, label_column, "label_column", ClassLabel, images.LABEL)
    if task in PROMPT_TASKS:
        return Columns({name: [name] for name in instructions.text_columns(features)})
    if task == "video_forecasting":
        return Columns({}, video=videos.video_column(features, image_column))
    if task not in TEXT_TASKS:
        return Columns({}, label, images.find_column(features, image_column, "image_column", Image, images.IMAGE))
    if task == "translation":
        if source_column is None or target_column is None:
            languages = list(features["translation"].languages) if "translation" in features else []
            if len(languages) != 2:
                raise ValueError(f"source_column and target_column must be given; columns are {', '.join(features)}")
            source_column, target_column = source_column or languages[0], target_column or languages[1]
        named = {"source": (source_column, "source_column"), "target": (target_column, "target_column")}
    else:
        names = text_columns or strings_of(features, label)
        if task == "language_modeling" or len(names) != 2:
            names = text_columns or [labelled_texts.only_text(features, label)]
        named = dict(zip(("text", "pair"), ((name, "text_columns") for name in names), strict=False))
    return Columns({part: text.column_path(rows[0], *given) for part, given in named.items()}, label)


def examine(task: Task, case: DataCase) -> Iterator[Finding]:
    """Run all checks that apply to a task, and yield their findings as they are made."""
    columns = case.train.columns
    lists = [OF_TEXTS if columns.texts else (), OF_PAIRS if task == "translation" else ()]
    lists += [
        OF_PREFERENCES if {"chosen", "rejected"} <= columns.texts.keys() else (),
        OF_LABELS if columns.label else (),
        OF_IMAGES if columns.image else (),
        OF_VIDEOS if columns.video else (),
    ]
    for check in (check for checks in lists for check in checks):
        for split in case.splits.values():
            yield from findings_of(check, split, case, split=split.name)
    for column, check in ACROSS.items():
        if getattr(columns, column):
            yield from findings_of(check, case)


def readable(split: DataSplit, task: Task, source: Mapping[str, Any]) -> Finding | None:
    """Return the error that a run of the task would raise when it reads a split; None without one."""
    columns = split.columns
    paths = [".".join(path) for path in columns.texts.values()]
    try:
        if task == "translation":
            text.text_pairs(split.rows, *paths)
        elif task in PROMPT_TASKS:
            instructions.check_rows(PROMPT_TASKS[task](split.rows))
        elif task == "language_modeling":
            language.text_rows(split.rows, paths[0])
        elif task == "text_classification":
            rows = labelled_texts.text_rows(split.rows, paths, columns.label)
            if not labelled_texts.is_regression(rows):
                labelled_texts.class_names(rows)
        elif task == "video_forecasting":
            videos.video_rows(split.rows, columns.video)
        elif task == "panoptic_segmentation":
            panoptic.panoptic_rows(split.rows, panoptic.panoptic_categories(**source), columns.image)
        else:
            rows = images.image_rows(split.rows, columns.image, columns.label, labelled=columns.label is not None)
            if columns.label is not None:
                images.label_names(rows)
    except (ValueError, OSError) as error:
        return failed(str(error), "see the message; a run would fail with it")
    return None


def doctor_data(
    dataset: str,
    task: Task | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    train_split: str = "train",
    tokenizer: str | None = None,
    max_length: int | None = None,
    model: str | None = None,
    json: str | None = None,
) -> int:
    """Check a data set before training: missing labels, empty texts, unreadable images, duplicates and more.

    Args:
        dataset: Hub id, local folder or file, or built-in data set, as for the recipes.
        task: task to check for; by default inferred from the columns.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, if dataset is a format such as "csv".
        text_columns: one or two text columns.
        label_column: label column.
        image_column: image column.
        source_column: column or language to translate from.
        target_column: column or language to translate to.
        train_split: training split.
        tokenizer: folder or Hub id of a tokenizer, to count unknown tokens and measure lengths in tokens.
        max_length: maximum number of tokens (words without a tokenizer) that the model reads of a text.
        model: image classifier or detector to evaluate on the data, as for `hf-tfm evaluate`: check that its classes
            are those of the data.
        json: file to write the report to.

    Returns:
        Exit status: 1 if a check failed.

    Raises:
        ValueError: the data set, a split or a column cannot be found.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    splits = load_texts(dataset, dataset_config, dataset_revision, data_files)
    if train_split not in splits:
        raise ValueError(f'train_split "{train_split}" is not a split of the data set; it has {", ".join(splits)}')
    ordered = sorted(splits, key=lambda name: name != train_split)
    if empty := [name for name in ordered if not len(splits[name])]:
        raise ValueError(f"split {empty[0]} of dataset {dataset} has no rows")
    train = splits[train_split]
    task = task or find_task(train.features, label_column)
    columns = find_columns(train, task, text_columns or [], label_column, image_column, source_column, target_column)
    reader = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False) if tokenizer else None
    if model:
        from .model_labels import ModelClasses, label_map  # slow to import

        classes = ModelClasses.of(model, task)
    case = DataCase({name: DataSplit(name, splits[name], columns) for name in ordered}, reader, max_length)
    print(f"checking {dataset} for {task.replace('_', ' ')}")

    def findings() -> Iterator[Finding]:
        source = {"dataset": dataset, "revision": dataset_revision}
        for split in case.splits.values():
            missing = {path[0] for path in columns.texts.values()} | {columns.label, columns.image, columns.video}
            if absent := sorted(missing - {None, *split.rows.column_names}):
                message = f"column {absent[0]} is missing; the split has {', '.join(split.rows.column_names)}"
                yield replace(failed(message, "give every split the same columns"), check="columns", split=split.name)
                return
        for split in case.splits.values():
            if (error := readable(split, task, source)) is not None:
                yield replace(error, check="reading", split=split.name)
            elif model:
                yield from findings_of(label_map, split, classes, split=split.name)
        if task == "object_detection":
            yield from detection_findings(dataset, dataset_config, dataset_revision, ordered)
        else:
            yield from examine(task, case)

    found: list[Finding] = []
    for finding in condensed(findings()):
        found.append(finding)
        print("\n".join(finding.lines()), flush=True)
    if json:
        save(found, json, {"dataset": dataset, "task": task})
    names = list(dict.fromkeys(finding.check for finding in found if finding.level == "failed"))
    warnings = sum(finding.level == "warning" for finding in found)
    print(f"failed: {', '.join(names) or 'nothing'}; warnings: {warnings}")
    return 1 if names else 0


def detection_findings(dataset: str, name: str | None, revision: str | None, splits: list[str]) -> Iterator[Finding]:
    """Run the checks of boxes, classes and images that need no model."""
    from . import detection

    held_out = [split for split in splits[1:] if split != splits[0]]
    options = ["--data", dataset, "--train_split", splits[0], "--test_splits", str(held_out[1:])]
    options += ["--validation_split", held_out[0]] if held_out else ["--validation_split", "null", "--holdout", "1"]
    for option, value in (("dataset_config", name), ("dataset_revision", revision)):
        options += [f"--{option}", value] if value else []
    _, args, _ = detection.parse(options)
    yield from (finding for _, finding in detection.examine_data(args))
