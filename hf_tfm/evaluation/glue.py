"""The scores of GLUE's tasks in one table, and their macro average (Wang et al. 2018, arXiv:1804.07461, section 3).

a model for each task, the validation splits of each -> official metrics -> {task: score} -> macro average
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..data.glue import TASKS, GlueTask, MissingData, find_tasks, place_of
from ..hub.saved_files import RESULTS
from ..limits import LIMITS
from ..metrics.glue import macro_average, task_score
from ..values import checked
from .results import check_options, write
from .text_classification import evaluate_rows, read_texts


def summarise(found: Mapping[str, list[dict[str, Any]]], missing: Mapping[str, str]) -> dict[str, Any]:
    """The scores of several tasks.

    Args:
        found: rows of name, value and split by task; of MNLI both validation splits.
        missing: why a task has none.

    Returns:
        ``metrics``, the official ones of each task's scored splits, with ``task``; ``scores``, their mean by task;
        ``macro_average`` of those; ``missing``.

    Raises:
        ValueError: no task has scores; the error says why.
    """
    if not found:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in missing.items())
        raise ValueError(f"no task can be scored. {reasons}")
    rows = [
        {"task": task, **row} for task, scores in found.items() for row in scores if row["name"] in TASKS[task].metrics
    ]
    scores = {task: task_score([row["value"] for row in rows if row["task"] == task]) for task in found}
    return {"metrics": rows, "scores": scores, "macro_average": macro_average(scores), "missing": dict(missing)}


def write_summary(summary: dict[str, Any], folder: str | Path) -> None:
    """results.json of a folder with a run for each task."""
    write(summary, str(Path(folder) / RESULTS))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """A summary as people read it: a line for each metric, the macro average, and the tasks without a score."""
    rows = summary["metrics"]
    width = max(len(row["split"]) for row in rows)
    said = [f"{row['task']:<5}  {row['split']:<{width}}  {row['name']:<9} {row['value']:7.4f}" for row in rows]
    said.append(
        f"macro average of {len(summary['scores'])} of GLUE's {len(TASKS)} tasks: {summary['macro_average']:.4f}"
    )
    return said + [f"{task}: not scored, {reason}" for task, reason in summary["missing"].items()]


@checked(**LIMITS)
def evaluate_glue(
    model: str,
    dataset_name: str,
    tasks: str = "glue",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    match_labels: Literal["name", "number"] = "name",
    max_length: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a classifier for each of several GLUE tasks on its validation splits, and average.

    Args:
        model: folder with a classifier for each task, called like it; or a folder or Hub id with "{task}" in it; or,
            of one task, its classifier.
        dataset_name: "nyu-mll/glue", or local folders, "data/glue-{task}"; see `place_of`.
        tasks: of GLUE, with commas between, or "glue" for all nine.
        dataset_config: configuration of the data set; "{task}" in it stands for the task's name.
        output: also write the result, with the predictions of all texts, to this JSON file.
        dataset_revision, match_labels, max_length, max_samples, batch_size, mixed_precision, revision,
        trust_remote_code,
            progress: see `evaluate_text_classification`.

    Returns:
        See `summarise`; also model, dataset_name and ``details``, the results of `evaluate_text_classification`. A
        task without data or model is ``missing``.

    Raises:
        ValueError: a task is unknown or given twice, none has data, or what `evaluate_text_classification` raises.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    chosen = find_tasks(tasks)
    check_options(mixed_precision, output, max_length=max_length, max_samples=max_samples, batch_size=batch_size)
    options = {
        "match_labels": match_labels,
        "max_length": max_length,
        "max_samples": max_samples,
        "batch_size": batch_size,
        "mixed_precision": mixed_precision,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
    }
    found, missing, details = {}, {}, []
    for task in chosen:
        try:
            place = model_of(task.name, model, alone=len(chosen) == 1)
            where = (dataset_name, dataset_config, dataset_revision)
            parts = [evaluate_split(task, place, split, *where, **options) for split in task.validation]
        except MissingData as error:
            missing[task.name] = str(error)
            continue
        found[task.name] = [row for part in parts for row in part["metrics"]]
        details += parts
    result = {"model": model, "dataset": dataset_name, **summarise(found, missing)}
    if output:
        write({**result, "details": details}, output)
    return {**result, "details": [{k: v for k, v in part.items() if k != "predictions"} for part in details]}


def evaluate_split(
    task: GlueTask,
    model: str,
    split: str,
    dataset_name: str,
    dataset_config: str | None,
    dataset_revision: str | None,
    **options: Any,
) -> dict[str, Any]:
    """See `evaluate_rows`; with ``task``."""
    rows = read_texts(dataset_name, split, dataset_config, dataset_revision, None, task.name, (), None)
    place, _ = place_of(task.name, dataset_name, dataset_config)
    return {"task": task.name, **evaluate_rows(model, place, split, rows, task.metrics, **options)}


def model_of(task: str, model: str, alone: bool) -> str:
    """The classifier of a task; see `evaluate_glue`.

    Args:
        alone: it is the only task, so ``model`` may be its classifier.

    Raises:
        MissingData: a folder of several has none for this task.
        ValueError: one classifier is given for several tasks.
    """
    if "{task}" in model:
        model = model.replace("{task}", task)
        if Path(model).parent.is_dir() and not Path(model).is_dir():
            raise MissingData(f"there is no model {model}")
        return model
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        if not (Path(model) / task / "config.json").is_file():
            raise MissingData(f"there is no model {Path(model) / task}")
        return str(Path(model) / task)
    if not alone:
        raise ValueError(
            f'"{model}" is one classifier, and each task has its own: give a folder of them, or "{{task}}" in the name'
        )
    return model
