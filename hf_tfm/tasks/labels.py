"""Names of the classes of a data set, and matching them to the classes of a saved model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedConfig

from ..arguments import Arguments
from ..data.detection import category_ids
from ..data.detection import class_names as category_names
from ..data.images import label_ids, label_names, stated_names

SAME_NAMES = 0.9  # share of the names of ImageNet that a model must have to be taken for a classifier of ImageNet


@dataclass(kw_only=True)
class ClassNameArguments(Arguments):
    """Names of classes.

    Args:
        class_names: of a data set whose labels are not a ClassLabel: what the numbers 0, 1, ... stand for, or all the
            names. A stream of such labels needs them; default, the values that occur.
    """

    class_names: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.check_distinct("class_names")


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a model's classes, in order."""
    return [config.id2label[number] for number in range(config.num_labels)]


def is_unnamed(names: Sequence[str]) -> bool:
    """Return True for transformers' placeholders: LABEL_0, LABEL_1, ..."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def match_classes(rows: datasets.Dataset, names: Sequence[str], match_labels: str) -> tuple[str, dict[int | str, int]]:
    """Map stored labels, see `image_rows`, to classes of a model; also return whether by "name" or "number".

    Args:
        names: of the model's classes.
        match_labels: "name" or "number".

    Raises:
        ValueError: a label matches no class of the model, or several; the error lists labels that only one side has.
    """
    stored = label_names(rows)
    if match_labels == "number" or is_unnamed(names):
        numbers = stored if stated_names(rows) is None else range(len(stored))
        if beyond := [number for number in numbers if not str(number).isdecimal() or int(number) >= len(names)]:
            raise ValueError(
                f"labels must be numbers of the model's classes, 0 to {len(names) - 1}; the data set also has "
                f"{some(beyond)}"
            )
        numbers = range(len(names))
        return "number", {number: number for number in numbers} | {str(number): number for number in numbers}
    if not set(stored) <= set(names):
        names = spelled_as(stored, names)
    if unknown := [name for name in stored if name not in set(names)]:
        rest = some([name for name in dict.fromkeys(names) if name not in set(stored)]) or "none"
        alike = some(sorted(name for name, count in Counter(names).items() if count > 1))
        raise ValueError(
            f"labels of the data set are not classes of the model: only the data set has {some(unknown)}; only the "
            f"model has {rest}{f', and several classes called {alike}' * bool(alike)}. If their numbers mean "
            "the same, match_labels=number compares those"
        )
    if twice := sorted({name for name in stored if names.count(name) > 1}):
        raise ValueError(
            f"the model has several classes called {some(twice)}: if the numbers of labels and classes mean the same, "
            "match_labels=number compares those"
        )
    return "name", label_ids(rows, names)


def spelled_as(stored: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """Return the names of a classifier of ImageNet, those of ``stored`` spelled as there; see `imagenet_numbers`.

    Other classes are then called "". If a name of ``stored`` has no class, the names are returned as they are.
    """
    numbers = imagenet_numbers(names)
    if len({numbers[name] for name in stored if name in numbers}) < len(stored):
        return names
    spelled = [""] * len(names)
    for name in stored:
        spelled[numbers[name]] = name
    return spelled


def imagenet_numbers(names: Sequence[str]) -> dict[str, int]:
    """Map the synsets of ImageNet, their descriptions and the first words of these to the classes of a model.

    "n02391049", "zebra" and "tench, Tinca tinca" or "tench" are names of classes of ImageNet; first words that several
    classes share are left out.

    Args:
        names: of the model's classes.

    Returns:
        {name: class}; empty unless the model has ImageNet's classes in ImageNet's order.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset  # slow to import

    if (subset := infer_imagenet_subset({"num_classes": len(names)})) is None:
        return {}
    info = ImageNetInfo(subset)
    synsets, texts = info.label_names(), info.label_descriptions()
    first = [text.partition(",")[0] for text in texts]
    alike = sum(name.partition(",")[0] == word for name, word in zip(names, first, strict=True))
    if alike < SAME_NAMES * len(names) and list(names) != synsets:
        return {}
    found: dict[str, int] = {}
    for candidates in (first, [name.partition(",")[0] for name in names], texts, names, synsets):
        counts = Counter(candidates)
        found |= {name: number for number, name in enumerate(candidates) if counts[name] == 1}
    return found


def some(values: Sequence[Any], limit: int = 10) -> str:
    """Return values as text, with a count of those beyond the limit."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(str(value) for value in values[:limit]) + more


def match_categories(rows: datasets.Dataset, names: Sequence[str], match_labels: str) -> tuple[str, list[int]]:
    """Map the categories of `scene_rows` or `panoptic_rows` to classes of a model; also return whether by "name" or
    "number".

    Args:
        names: of the model's classes.
        match_labels: "name" or "number".

    Raises:
        ValueError: a category is not a class of the model.
    """
    if match_labels == "name" and list(names) != [f"LABEL_{i}" for i in range(len(names))]:
        return "name", category_ids(rows, names)
    if len(own := category_names(rows)) > len(names):
        raise ValueError(
            f"the data set has {len(own)} categories and the model {len(names)} classes: matching by number "
            "requires at least as many classes as categories"
        )
    return "number", list(range(len(own)))
