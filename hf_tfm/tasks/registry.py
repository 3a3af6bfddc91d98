"""The table of tasks, and those of other packages."""

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from .base import Task
from .image_classification import ImageClassificationTask
from .language_modeling import LanguageModelingTask
from .masked_image import MaskedImageTask
from .object_detection import DetectionTask
from .panoptic_segmentation import PanopticTask
from .text_classification import TextClassificationTask
from .translation import TranslationTask

ENTRY_POINTS = "hf_tfm.tasks"

TASKS: dict[str, type[Task]] = {
    "translation": TranslationTask,
    "image_classification": ImageClassificationTask,
    "object_detection": DetectionTask,
    "panoptic_segmentation": PanopticTask,
    "masked_image": MaskedImageTask,
    "language_modeling": LanguageModelingTask,
    "text_classification": TextClassificationTask,
}


def register_task(name: str, task_class: type[Task]) -> None:
    """Add a task. Can be called repeatedly.

    Raises:
        ValueError: another task has this name.
    """
    if TASKS.setdefault(name, task_class) is not task_class:
        raise ValueError(f'task "{name}": there is a task of this name already, {TASKS[name].__name__}')


def plugins() -> Iterator[tuple[str, type[Task]]]:
    """Yield name and class of the tasks of other packages: entry points of the group "hf_tfm.tasks".

    A plug-in that cannot be imported is reported on standard error and skipped.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            task_class = point.load()
        except Exception as error:  # the other package may raise anything
            print(f"hf-tfm: the plug-in {point.name} ({point.value}) cannot be loaded: {error}", file=sys.stderr)
            continue
        yield point.name, task_class


def task_classes() -> dict[str, type[Task]]:
    """Return {name: class} of all tasks, those of other packages included."""
    for name, task_class in plugins():
        register_task(name, task_class)
    return TASKS


def evaluated_tasks() -> list[type[Task]]:
    """Return the tasks that evaluate saved models, one for each kind of models."""
    return list({task_class.kind: task_class for task_class in reversed(task_classes().values())}.values())[::-1]
