"""GLUE's tasks one after the other: a run for each, and the scores of all with their macro average.

knobs with ``tasks`` -> knobs of one task, its folder -> the recipe's own run -> results.json of all
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from ..data.glue import MissingData, find_tasks
from ..hub.results import RunRecord
from ..hub.saved_files import RESULTS
from ..options import parse_arguments
from ..tasks.glue import summarise, summary_lines
from ..writing import write_json
from .run import Run, begin_run, check_folder
from .text_run import TextArguments

Knobs = TypeVar("Knobs", bound=TextArguments)


def run_tasks(
    kind: type[Knobs], recipe: Path, argv: Sequence[str] | None, work: Callable[[Knobs, Run], RunRecord | None]
) -> int:
    """A run for each of the argument ``tasks``, or one where there are none; the exit status.

    Args:
        kind, recipe, argv: see `recipe_main`.
        work: a whole run of one task; its record, or None where there is none: it was asked to stop, or has written a
            cache.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(kind, recipe, argv)
    if args.tasks is None:
        with begin_run(args, recipe.stem, argv) as run:
            work(args, run)
        return 0
    found, missing, scored = {}, {}, not getattr(args, "write_cache", False)
    runs = {task: of_task(args, task.name) for task in find_tasks(args.tasks)}
    for own in runs.values():  # before the first task is trained
        check_folder(own, argv)
    for task, own in runs.items():
        more = ["--tasks", "null", "--task", task.name, "--output_dir", own.output_dir]
        try:
            with begin_run(own, recipe.stem, [*argv, *more]) as run:
                accelerator = run.accelerator
                accelerator.end_training = partial(end_trackers, accelerator)  # other tasks need the processes
                record = work(own, run)
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
            write_json(summary, str(Path(args.output_dir) / RESULTS))
        accelerator.print("\n".join(summary_lines(summary)))
    accelerator.state.destroy_process_group()
    return 0


def of_task(args: Knobs, name: str) -> Knobs:
    """The arguments of one task's run, in a folder of its own."""
    return replace(args, tasks=None, task=name, output_dir=str(Path(args.output_dir) / name))


def end_trackers(accelerator: Accelerator) -> None:
    """What `Accelerator.end_training` does, but for ending what the processes share."""
    for tracker in accelerator.trackers:
        tracker.finish()
