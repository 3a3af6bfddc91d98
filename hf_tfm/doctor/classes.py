"""Checks of categories: ids, names across splits and in a pretrained model, and frequencies."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import ClassLabel

from ..data.detection import CATEGORY_FIELDS, first_moved
from .boxes import TOLERATED
from .findings import Finding, Sample, failed, graded, ok, warning
from .splits import Case, Split

FEW = 10  # number of objects of a class below which it is reported
UNEVEN = 100  # ratio of the frequencies of two classes from which it is reported
BACKGROUND = {"background", "__background__", "_background_", "bg", "no object", "no_object", "none", "n/a"}


def category_ids(split: Split, case: Case) -> Iterator[Finding]:
    """Every object has a category; stored ids are indices into the list of names, 0 to N - 1 without gaps."""
    names, categories, count = split.names, split.categories, len(split.categories)
    field = split.found.find(CATEGORY_FIELDS)
    if (beyond := categories >= len(names)).any():
        first = int(beyond.argmax())
        message = f"{beyond.sum()} of {count} objects have category {categories[first]} or another outside the "
        message += f"{len(names)} names, which are numbered 0 to {len(names) - 1}"
        shifted = categories.max() == len(names) and not (categories == 0).any()
        remedy = "ids seem to start at 1: subtract 1" if shifted else "name every category, or correct the ids"
        yield failed(message, remedy, split.stored_sample(first))
    if (missing := categories < 0).any():
        yield graded(
            missing.sum() > TOLERATED * count,
            f"{missing.sum()} of {count} objects have no category, or a negative one, and are dropped "
            f"(limit: {TOLERATED:.0%})",
            "add the category",
            split.stored_sample(int(missing.argmax())),
        )
    declared = isinstance(split.found.kinds[field], ClassLabel)
    if not declared and pa.types.is_integer(split.found.fields[field].type) and names:
        ids = [int(name) for name in names]
        gaps = ids[-1] - ids[0] + 1 - len(ids)
        if ids != list(range(len(ids))):
            yield warning(
                f"ids {ids[0]} to {ids[-1]} with {gaps} gaps are read as classes 0 to {len(ids) - 1}, named after the "
                "ids",
                f'store "{field}" as a ClassLabel, which keeps names and order with the data',
                split.stored_sample(int((categories == 0).argmax())),
            )
    if (categories < 0).all() and count:
        yield failed("no object has a category", f'store one in the field "{field}"', split.stored_sample(0))


def class_names(case: Case) -> Iterator[Finding]:
    """Every split has the classes of the training split, with the same names in the same order."""
    ours = case.train.names
    yield ok(f"{len(ours)} classes: {shortened(ours)}")
    for split in case.held_out:
        if unknown := [name for name in split.names if name not in ours]:
            yield failed(
                f"{split.name} has {len(unknown)} classes that {case.train.name} does not have, the first is "
                f'"{unknown[0]}"; a run would fail',
                "write the same list of categories, with the same ids, for every split",
                sample_of(split, split.names.index(unknown[0])),
            )
        elif moved := first_moved(ours, split.names):
            yield failed(
                f'{split.name} has "{moved[1]}" where {case.train.name} has "{moved[0]}": the same id has different '
                "names; a run would fail",
                "write the same list of categories, with the same ids, for every split",
                sample_of(split, split.names.index(moved[1])),
            )


def model_classes(case: Case) -> Finding:
    """The classes of the pretrained model equal those of the data, or are clearly different."""
    names = case.train.names
    if case.earlier is None:
        return ok(f"a new model, with the {len(names)} classes of the data")
    theirs = [name for _, name in sorted(case.earlier.config.id2label.items())]
    if theirs == names:
        return ok(f"the model has the {len(names)} classes of the data, in the same order")
    shared = {name.lower() for name in theirs} & {name.lower() for name in names}
    numbers = f"the model has {len(theirs)} classes ({shortened(theirs)}), the data {len(names)} ({shortened(names)})"
    if len(theirs) == len(names) and shared:
        place = next(i for i, pair in enumerate(zip(theirs, names, strict=True)) if pair[0] != pair[1])
        return failed(
            f'{numbers}: class {place} is "{theirs[place]}" in the model and "{names[place]}" in the data, so a run '
            "would discard the class layer",
            "use the names and the order of the model's classes in the data",
            sample_of(case.train, place),
        )
    return warning(
        f"{numbers}: the class layer is initialised randomly",
        "expected if the classes differ; otherwise use the same names",
    )


def sample_of(split: Split, category: int) -> Sample | None:
    """Return the first object of a category; None if it has none."""
    there = split.categories == category
    return split.stored_sample(int(there.argmax())) if there.any() else None


def shortened(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_balance(case: Case) -> Iterator[Finding]:
    """No class is missing, very rare, or a hundred times rarer than another."""
    split, names = case.train, case.train.names
    counts = split.class_counts[: len(names)]
    if not counts.any():
        yield failed("the training split has no objects", "see empty_images", split.sample(0))
        return
    most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max()).argmin())
    told = f'"{names[most]}" has {counts[most]} objects, "{names[least]}" {counts[least]}'
    if counts[most] > UNEVEN * counts[least]:
        yield warning(
            f"{told} (limit: {UNEVEN} times as many)", "add examples of the rare class, or expect a low AP for it"
        )
    else:
        yield ok(told)
    if rare := [name for name, count in zip(names, counts, strict=True) if 0 < count < FEW]:
        yield warning(
            f"{len(rare)} of {len(names)} classes have fewer than {FEW} objects: {shortened(rare)}",
            "add examples, or expect a low AP for these classes",
            sample_of(split, names.index(rare[0])),
        )


def classes_in_one_split(case: Case) -> Iterator[Finding]:
    """Every class with objects has some in every split."""
    ours = {name for name, count in zip(case.train.names, case.train.class_counts, strict=False) if count}
    for split in case.held_out:
        theirs = {name for name, count in zip(split.names, split.class_counts, strict=False) if count}
        if new := [name for name in case.train.names if name in theirs - ours]:  # others: see `class_names`
            yield failed(
                f"{len(new)} classes have objects in {split.name} and none in {case.train.name}: {shortened(new)}; "
                "their AP will be 0",
                "split the images again so that every class is in both",
                sample_of(split, split.names.index(new[0])),
            )
        if unseen := [name for name in case.train.names if name in ours - theirs]:
            yield warning(
                f"{len(unseen)} classes have no objects in {split.name}: {shortened(unseen)}; AP does not cover them",
                "split the images again so that every class is in both",
                sample_of(case.train, case.train.names.index(unseen[0])),
            )
    if nowhere := [
        name for name in case.train.names if not any(name in used(split) for split in case.splits.values())
    ]:
        yield warning(
            f"{len(nowhere)} classes have no objects in any split: {shortened(nowhere)}",
            "remove them from the list of categories, unless the ids must not change",
        )


def used(split: Split) -> set[str]:
    """Return the names of the classes that have objects."""
    return {name for name, count in zip(split.names, split.class_counts, strict=False) if count}


def background_class(case: Case) -> Finding:
    """No class means "background"; the model itself predicts that there is no object."""
    found = [name for name in case.train.names if name.strip().lower() in BACKGROUND]
    if not found:
        return ok("no class means background")
    return warning(
        f'class "{found[0]}" seems to mean background', "remove it; the model itself predicts that there is no object"
    )
