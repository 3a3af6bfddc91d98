"""Entry point of every recipe: one training run of a task, from its arguments to its scores and model card.

command line -> arguments -> splits -> processor -> model -> training -> saved model -> scores -> results.json, card
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..arguments import TrainingArguments
from ..hub.results import RunRecord
from ..options import parse_arguments
from ..tasks.base import Task
from .optim import check_layers
from .ranks import main_first
from .run import Run, begin_run, check_folder, finish


class Trainer:
    """One training run of a task.

    Args:
        task: a task with its arguments; nothing is loaded yet.
        run: folder and accelerator of the run.
    """

    def __init__(self, task: Task, run: Run):
        self.task, self.run = task, run

    def fit(self) -> RunRecord | None:
        """Train, save and score. Return the run's record, or None if it was stopped or had nothing to train.

        Raises:
            ValueError: arguments, data and model are incompatible; raised before training.
            FloatingPointError: training diverged or nothing was learned.
            OSError: a file cannot be written.
        """
        task, run = self.task, self.run
        # Rows and tokens are prepared by one process; the others read its cache.
        task.splits = main_first(run.accelerator, task.load_splits)
        run.open(task.args, task.hub_task, task.describe_data(), task.validation_split)
        task.processor = run.load_or_create(
            task.processor_folder, task.build_processor, task.processor_class.from_pretrained
        )
        task.model = task.build_model()
        check_layers(task.args, task.model)
        if not task.prepare():
            return None
        loader = main_first(run.accelerator, lambda: task.dataloader(task.args.train_split, training=True))
        task.begin_training(loader)
        per_epoch = loader.steps_per_epoch()
        max_steps = task.args.max_steps or math.ceil(task.args.num_train_epochs * per_epoch)
        resolved, line = task.args.resolve(per_epoch, max_steps)
        if line:
            run.accelerator.print(line)
        eval_steps = task.args.eval_steps or per_epoch or max_steps
        hooks = {"show": task.show, "callback": task.callback(max_steps)}
        result = run.train(
            task, task.trained_module(), loader, resolved, max_steps, eval_steps, self.validate, **hooks
        )
        if result.stopped:
            run.stopped(result)
            return None
        task.end_training()
        run.save(task.model.eval(), task.processor)
        metrics = []
        for split in task.scored_splits:
            metrics += task.evaluate(task.model, split).rows(split, task.reported_metrics)
        return finish(run, task.model, task, result, metrics, **task.report())

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Return {name: value} on the validation split, for `training.train`."""
        names = self.task.validation_metrics
        values = self.task.validate(module, names)
        return {name: values[name] for name in names if name in values}


@dataclass(frozen=True)
class Recipe:
    """The ``main`` of a recipe: arguments (by default those of this process) -> exit status; see `recipe`."""

    task_class: type[Task]
    path: Path

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        argv = list(sys.argv[1:] if argv is None else argv)
        args = parse_arguments(self.task_class.Arguments, self.path, argv)
        return self.task_class.run_all(args, Runs(self.task_class, self.path.stem, argv))


def recipe(task_class: type[Task], file: str) -> Recipe:
    """Create the ``main`` of a recipe.

    Args:
        task_class: task that the recipe trains.
        file: ``__file__`` of the recipe; its presets are in ``presets/<recipe>/`` next to it.
    """
    return Recipe(task_class, Path(file))


@dataclass
class Runs:
    """Executes the runs that a command line asks for, one after the other.

    Args:
        task_class: task that they train.
        recipe_name, argv: name of the recipe and its command-line arguments.
    """

    task_class: type[Task]
    recipe_name: str
    argv: Sequence[str]

    def check(self, args: TrainingArguments) -> None:
        """Refuse an output folder that a later run cannot own; see `check_folder`."""
        check_folder(args, self.argv)

    def __call__(self, args: TrainingArguments, extra: Sequence[str] = (), is_last: bool = True) -> RunRecord | None:
        """Execute one run in its folder; see `Trainer.fit`.

        Args:
            extra: arguments that a command line of this run alone has in addition.
            is_last: False keeps the process group for another run.
        """
        with begin_run(args, self.recipe_name, [*self.argv, *extra]) as run:
            if not is_last:
                run.accelerator.end_training = lambda: [one.finish() for one in run.accelerator.trackers]
            return Trainer(self.task_class(args, run.accelerator), run).fit()
