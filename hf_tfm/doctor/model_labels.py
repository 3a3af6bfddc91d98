"""Check that the classes of a saved model are those of a data set, as ``hf-tfm evaluate`` matches them."""

from dataclasses import dataclass

from ..data.detection import class_names as category_names
from ..data.detection import scene_rows
from ..data.images import image_rows, label_names
from ..hub.detectors import classes
from ..tasks.evaluation import config_of, task_of
from ..tasks.image_classification import ImageClassificationTask
from ..tasks.labels import class_names, match_categories, match_classes
from ..tasks.object_detection import DetectionTask
from .data_case import DataSplit
from .findings import Finding, failed, ok, warning

TASKS = {"image_classification": ImageClassificationTask, "object_detection": DetectionTask}


@dataclass(frozen=True)
class ModelClasses:
    """Classes of an image classifier or a detector.

    Args:
        names: in order.
        detects: it is a detector.
    """

    names: list[str]
    detects: bool

    @classmethod
    def of(cls, model: str, task: str) -> "ModelClasses":
        """Read the classes of a model, but no weights.

        Args:
            model: as for `evaluate`.
            task: of the data.

        Raises:
            ValueError: it cannot be found, or does not read data of the task.
        """
        config = config_of(model, {})
        if (found := task_of(config, model)) is not TASKS.get(task):
            raise ValueError(f'model "{model}" is one of the {found.kind}, but the data is for {task}')
        detects = found is DetectionTask
        return cls((classes if detects else class_names)(config), detects)


def label_map(split: DataSplit, model: ModelClasses) -> Finding:
    """Every label is a class of the model, matched by name."""
    if model.detects:
        rows = scene_rows(split.rows, split.columns.image, strict=False)[0]
        own, match = category_names(rows), match_categories
    else:
        rows = image_rows(split.rows, split.columns.image, split.columns.label)
        own, match = label_names(rows), match_classes
    counts = f"{len(own)} classes of the data, {len(model.names)} of the model"
    try:
        matched, found = match(rows, model.names, "name")
    except ValueError as error:
        return failed(str(error), "rename classes of the data, or evaluate with --match_labels number")
    if matched == "number":
        return warning(
            f"{counts}, matched by number: those of the model are called {model.names[0]} and so on",
            "check that the numbers mean the same",
        )
    numbers = found if model.detects else [found[key] for key in (range(len(own)) if 0 in found else own)]
    for number, (name, theirs) in enumerate(zip(own, numbers, strict=True)):
        if number != theirs:
            return ok(
                f'{counts}, matched by name; numbers differ, first for "{name}", {number} in the data and {theirs} in '
                "the model: do not match by number"
            )
    return ok(f"{counts}, with the same names and numbers")
