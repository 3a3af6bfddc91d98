"""GLUE's tasks one after the other: a run for each, and the scores of all with their macro average.

knobs with ``tasks`` -> knobs of one task, its folder -> the recipe's own run -> results.json of all
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from ..data.glue import MissingData, find_tasks
from ..evaluation.glue import summarise, summary_lines, write_summary
from ..hub.results import RunRecord
from .run import start_accelerator
from .text_run import TextArguments

Knobs = TypeVar("Knobs", bound=TextArguments)


def run_tasks(
    args: Knobs, argv: Sequence[str], work: Callable[[Knobs, Sequence[str], Accelerator], RunRecord | None]
) -> None:
    """A run for each of ``args.tasks``, or one where there are none.

    Args:
        work: a whole run of one task, with the words that repeat it; its record, or None where there is none: it was
            asked to stop, or has written a cache.
    """
    if args.tasks is None:
        work(args, argv, start_accelerator(args))
        return
    found, missing, scored = {}, {}, not getattr(args, "write_cache", False)
    for task in find_tasks(args.tasks):
        folder = str(Path(args.output_dir) / task.name)
        own = replace(args, tasks=None, task=task.name, output_dir=folder)
        accelerator = start_accelerator(own)
        accelerator.end_training = partial(end_trackers, accelerator)  # the processes still have other tasks to do
        more = ["--tasks", "null", "--task", task.name, "--output_dir", folder]
        try:
            record = work(own, [*argv, *more], accelerator)
        except MissingData as error:
            missing[task.name] = str(error)
            continue
        if record is not None:
            found[task.name] = [row for row in record.metrics if row["split"] in task.validation]
        elif scored:  # asked to stop
            scored = False
            break
    if scored:
        summary = summarise(found, missing)
        if accelerator.is_main_process:
            write_summary(summary, args.output_dir)
        accelerator.print("\n".join(summary_lines(summary)))
    accelerator.state.destroy_process_group()


def end_trackers(accelerator: Accelerator) -> None:
    """What `Accelerator.end_training` does, but for ending what the processes share."""
    for tracker in accelerator.trackers:
        tracker.finish()
