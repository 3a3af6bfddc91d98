"""The table of tasks, and those of other packages."""

from ..plugins import TASKS as PLUGINS
from ..plugins import load_plugins
from .base import Task
from .image_classification import ImageClassificationTask
from .language_modeling import LanguageModelingTask
from .long_range_arena import LongRangeArenaTask
from .masked_image import MaskedImageTask
from .object_detection import DetectionTask
from .panoptic_segmentation import PanopticTask
from .preference_optimization import PreferenceTask
from .reward_modeling import RewardTask
from .rlhf import RLHFTask
from .supervised_fine_tuning import FineTuningTask
from .text_classification import TextClassificationTask
from .translation import TranslationTask
from .video_forecasting import VideoForecastingTask

TASKS: dict[str, type[Task]] = {
    "translation": TranslationTask,
    "image_classification": ImageClassificationTask,
    "object_detection": DetectionTask,
    "panoptic_segmentation": PanopticTask,
    "masked_image": MaskedImageTask,
    "language_modeling": LanguageModelingTask,
    "text_classification": TextClassificationTask,
    "long_range_arena": LongRangeArenaTask,
    "video_forecasting": VideoForecastingTask,
    "supervised_fine_tuning": FineTuningTask,
    "reward_modeling": RewardTask,
    "preference_optimization": PreferenceTask,
    "rlhf": RLHFTask,
}


def register_task(name: str, task_class: type[Task]) -> None:
    """Add a task. Can be called repeatedly.

    Raises:
        ValueError: another task has this name.
    """
    if TASKS.setdefault(name, task_class) is not task_class:
        raise ValueError(f'task "{name}": there is a task of this name already, {TASKS[name].__name__}')


def task_classes() -> dict[str, type[Task]]:
    """Return {name: class} of all tasks, those of other packages included."""
    for name, task_class in load_plugins(PLUGINS):
        register_task(name, task_class)
    return TASKS


def evaluated_tasks() -> list[type[Task]]:
    """Return the tasks that evaluate saved models, one for each kind of models."""
    return list({task_class.kind: task_class for task_class in reversed(task_classes().values())}.values())[::-1]
