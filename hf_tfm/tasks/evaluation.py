"""Scoring a saved model with its task: the report of ``hf-tfm evaluate``.

arguments -> task -> model, processor and rows -> `Task.evaluate` -> metrics, details -> JSON file
"""

from typing import Any

import torch
from accelerate import Accelerator

from ..arguments import EvaluationArguments
from ..hub.results import collect_versions
from ..writing import require_writable, write_json
from .base import Task
from .stopwatch import Stopwatch


def evaluate_task(task_class: type[Task], args: EvaluationArguments, listing: bool = False) -> dict[str, Any]:
    """Score a saved model on a split.

    Args:
        listing: return the listing of the task's `Scores` too.

    Returns:
        ``model``, ``dataset``, ``split``, ``fingerprint`` and number of ``rows``; ``metrics``, rows of name, value,
        signature and split; ``versions``; ``mixed_precision``; the details of the task's `Scores`; and, if the task
        counts its samples, their number and the ``throughput``, see `Stopwatch`.

    Raises:
        ValueError: model, data and arguments do not fit each other.
        OSError: the file ``args.output`` cannot be written.
    """
    if args.output:
        require_writable("output", args.output)
    task = task_class(args, one_process())
    task.splits = task.load_splits()
    task.load_pretrained()
    task.model = task.model.to(task.accelerator.device)
    with (
        Stopwatch(task.model) as watch,
        torch.autocast(task.accelerator.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"),
    ):
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
        **({} if scores.samples is None else {task.sample: scores.samples}),
        **scores.details,
        "mixed_precision": args.mixed_precision,
        **({} if scores.samples is None else {"throughput": watch.throughput(scores.samples)}),
    }
    if args.output:
        write_json({**result, **scores.listing}, args.output)
    task.end_evaluation(scores)
    return {**result, **scores.listing} if listing else result


def one_process() -> Accelerator:
    """Return the accelerator of an evaluation.

    Raises:
        ValueError: there are several processes.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"evaluate runs in one process, got {accelerator.num_processes}")
    return accelerator
