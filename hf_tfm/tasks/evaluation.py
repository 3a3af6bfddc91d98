"""Scoring a saved model with its task: the report of ``hf-tfm evaluate``.

arguments -> task -> model, processor and rows -> `Task.evaluate` -> metrics, details, versions -> JSON file
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..arguments import EvaluationArguments
from ..hub.results import collect_versions
from .base import Task


def evaluate_task(task_class: type[Task], args: EvaluationArguments) -> dict[str, Any]:
    """Score a saved model on a split.

    Returns:
        ``model``, ``dataset``, ``split``, ``fingerprint`` and number of ``rows``; ``metrics``, rows of name, value,
        signature and split; ``versions``; ``mixed_precision``; and the details of the task's `Scores`.

    Raises:
        ValueError: model, data and arguments do not fit each other.
        OSError: the file ``args.output`` cannot be written.
    """
    if args.output:
        require_writable("output", args.output)
    task = task_class(args, one_process())
    task.splits = task.load_splits()
    task.load_pretrained()
    device = task.accelerator.device.type
    with torch.autocast(device, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        scores = task.evaluate(task.model, args.split)
    rows = task.splits[args.split]
    result = {
        "model": args.model,
        "dataset": args.dataset_name,
        "split": args.split,
        "fingerprint": task.fingerprint(rows),
        "rows": len(rows),
        "metrics": scores.rows(args.split, task.reported_metrics),
        "versions": collect_versions(),
        **scores.details,
        "mixed_precision": args.mixed_precision,
    }
    if args.output:
        write(result if scores.predictions is None else {**result, "predictions": scores.predictions}, args.output)
    return result


def one_process() -> Accelerator:
    """The accelerator of an evaluation.

    Raises:
        ValueError: there are several processes.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"evaluate runs in one process, got {accelerator.num_processes}")
    return accelerator


def require_writable(argument: str, file: str | Path) -> None:
    """Refuse a file that cannot be written, before its content is computed.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
        OSError: it cannot be written; the message names the argument.
    """
    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{argument} {file}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{argument} {file} is a folder: give the name of a file")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(f"{argument} {file} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def write(result: dict[str, Any], output: str) -> None:
    """Write a result as a JSON file."""
    Path(output).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
