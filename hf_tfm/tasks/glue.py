"""Training and scoring of several GLUE tasks, and their macro average (Wang et al. 2018, arXiv:1804.07461, section 3).

arguments with ``tasks`` -> arguments of each task -> a run or an evaluation each -> {task: score} -> macro average
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..arguments import EvaluationArguments, TrainingArguments
from ..data.glue import TASKS, MissingData, find_tasks
from ..hub.results import RunRecord
from ..hub.saved_files import RESULTS
from ..metrics.glue import macro_average, task_score
from ..writing import require_writable, write_json


def run_tasks(args: TrainingArguments, fit: Callable[..., RunRecord | None]) -> int:
    """Train a model for each task of ``args.tasks`` in its own folder, and write all scores; return the exit status.

    Args:
        fit: see `training.trainer.Runs`.

    Raises:
        ValueError: a folder cannot be used, or no task has data.
    """
    found, missing = {}, {}
    is_scored = args.folder_argument == "output_dir"  # otherwise the runs write a cache
    runs = {
        task: replace(args, tasks=None, task=task.name, output_dir=str(Path(args.output_dir) / task.name))
        for task in find_tasks(args.tasks)
    }
    for own in runs.values():  # before the first task is trained
        fit.check(own)
    for task, own in runs.items():
        try:
            extra = ["--tasks", "null", "--task", task.name, "--output_dir", own.output_dir]
            record = fit(own, extra, is_last=False)
        except MissingData as error:
            missing[task.name] = str(error)
            continue
        if record is not None:
            found[task.name] = [row for row in record.metrics if row["split"] in task.validation]
        elif is_scored:  # the run was stopped
            is_scored = False
            break
    state = PartialState()
    if is_scored:
        summary = summarise(found, missing)
        if state.is_main_process:
            write_json(summary, str(Path(args.output_dir) / RESULTS))
        state.print("\n".join(summary_lines(summary)))
    state.destroy_process_group()
    return 0


def evaluate_tasks(args: EvaluationArguments, evaluate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Score a classifier for each task of ``args.tasks`` on its validation splits, and average.

    Args:
        evaluate: see `tasks.evaluation.evaluate_task`.

    Returns:
        See `summarise`; also ``model``, ``dataset``, ``details``, the results of `evaluate`, and ``lines``. A task
        without data or model is ``missing``.

    Raises:
        ValueError: no task has data and a model, or see `evaluate`.
        OSError: the file ``args.output`` cannot be written.
    """
    if args.output:
        require_writable("output", args.output)
    chosen = find_tasks(args.tasks)
    found, missing, details = {}, {}, []
    for task in chosen:
        try:
            model = model_of(task.name, args.model, alone=len(chosen) == 1)
            own = replace(args, tasks=None, task=task.name, model=model, output=None)
            parts = [evaluate(replace(own, split=split), listing=True) for split in task.validation]
        except MissingData as error:
            missing[task.name] = str(error)
            continue
        found[task.name] = [row for part in parts for row in part["metrics"]]
        details += [{"task": task.name, **part} for part in parts]
    result = {"model": args.model, "dataset": args.dataset_name, **summarise(found, missing)}
    if args.output:
        write_json({**result, "details": details}, args.output)
    without = [{name: value for name, value in part.items() if name != "predictions"} for part in details]
    return {**result, "details": without, "lines": summary_lines(result)}


def summarise(found: Mapping[str, list[dict[str, Any]]], missing: Mapping[str, str]) -> dict[str, Any]:
    """Combine the scores of several tasks.

    Args:
        found: rows of name, value and split by task; both validation splits of MNLI.
        missing: reason by task without scores.

    Returns:
        ``metrics``, the official ones of each task's scored splits, with ``task``; ``scores``, their mean by task;
        ``macro_average`` of these; ``missing``.

    Raises:
        ValueError: no task has scores; the message gives the reasons.
    """
    if not found:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in missing.items())
        raise ValueError(f"no task can be scored. {reasons}")
    rows = [
        {"task": task, **row} for task, scores in found.items() for row in scores if row["name"] in TASKS[task].metrics
    ]
    scores = {task: task_score([row["value"] for row in rows if row["task"] == task]) for task in found}
    return {"metrics": rows, "scores": scores, "macro_average": macro_average(scores), "missing": dict(missing)}


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a summary for the terminal: each metric, the macro average, and tasks without a score."""
    rows = summary["metrics"]
    width = max(len(row["split"]) for row in rows)
    lines = [f"{row['task']:<5}  {row['split']:<{width}}  {row['name']:<9} {row['value']:7.4f}" for row in rows]
    lines.append(
        f"macro average of {len(summary['scores'])} of GLUE's {len(TASKS)} tasks: {summary['macro_average']:.4f}"
    )
    return lines + [f"{task}: not scored, {reason}" for task, reason in summary["missing"].items()]


def model_of(task: str, model: str, alone: bool) -> str:
    """Return the folder or Hub id of the classifier of a task.

    Args:
        model: a folder with a classifier for each task, named like it; or a name with "{task}"; or, if ``alone``, the
            classifier itself.
        alone: it is the only task.

    Raises:
        MissingData: the folder has no classifier for this task.
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
            f'"{model}" is a single classifier, but each task has its own: give a folder of them, or '
            '"{task}" in the name'
        )
    return model
