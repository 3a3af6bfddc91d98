"""Why AP would be 0, told before a run: ``hf-tfm doctor detection``.

    the run's own knobs -> its data, as stored and as read -> its model -> checks -> eight images by heart -> a report

A check is a function that returns a `Finding` or several; what is new goes into one of the lists below.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..training.arguments import parse_arguments
from ..training.scene_run import SceneRunArguments
from . import boxes, classes, images, knobs, weights
from .findings import Finding, condensed, failed, findings_of, save, skipped
from .overfit import overfit
from .splits import Case, read_splits

# check(split, case)
OF_A_SPLIT: tuple[Callable, ...] = (
    boxes.box_format,
    boxes.box_axes,
    boxes.box_range,
    boxes.duplicate_boxes,
    boxes.empty_images,
    classes.category_ids,
    images.unreadable_images,
    images.image_size,
    images.image_orientation,
)
# check(case), of all splits
OF_THE_DATA: tuple[Callable, ...] = (
    classes.class_names,
    classes.class_balance,
    classes.classes_in_one_split,
    classes.background_class,
    images.shared_images,
)
# check(split, case), with a model
OF_A_SPLIT_AND_THE_MODEL: tuple[Callable, ...] = (boxes.tiny_objects, boxes.box_count)
# check(case), with a model
OF_THE_RUN: tuple[Callable, ...] = (
    classes.model_classes,
    weights.fresh_weights,
    weights.frozen_norms,
    knobs.learning_rate,
    knobs.schedule,
    knobs.gradient_clipping,
    knobs.auxiliary_loss,
)
RECIPE = "detection_train"
DEFAULTS = {True: "finetune_small", False: "r50_300"}  # presets: with a model to go on from, and without


def examine(args: SceneRunArguments, full: bool = False, quick: bool = False) -> Iterator[Finding]:
    """Check a run of detection before it starts.

    Args:
        args: its knobs.
        full: learn eight images with the run's own model, however large.
        quick: do not learn at all.

    Returns:
        what each check finds, as it is found; a check that finds nothing has one finding, too.
    """
    try:
        case = Case(args, read_splits(args))
    except (ValueError, OSError) as error:
        yield replace(failed(str(error), "see the message; a run would end with it"), check="data")
        return
    broken = False
    for checks in (OF_A_SPLIT, OF_THE_DATA):
        for finding in run_checks(checks, case):
            broken |= finding.level == "failed"
            yield finding
    try:
        weights.add_model(case)
    except (ValueError, OSError) as error:
        yield replace(failed(str(error), "see the message; a run would end with it"), check="model")
        return
    for checks in (OF_A_SPLIT_AND_THE_MODEL, OF_THE_RUN):
        yield from run_checks(checks, case)
    if quick:
        return
    if broken:
        yield replace(skipped("the data has to be mended first"), check=overfit.__name__)
    else:
        yield from findings_of(overfit, case, full)


def run_checks(checks: tuple[Callable, ...], case: Case) -> Iterator[Finding]:
    """What some of the lists above find."""
    for check in checks:
        if checks in (OF_A_SPLIT, OF_A_SPLIT_AND_THE_MODEL):
            for split in case.splits.values():
                yield from findings_of(check, split, case, split=split.name)
        else:
            yield from findings_of(check, case)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, SceneRunArguments, list[str]]:
    """The doctor's own options, the knobs of the run, and the words that gave those.

    Raises:
        SystemExit: an option or knob is unknown, or the recipe refuses a value; the message names it.
    """
    from ..cli import recipes_folder

    parser = argparse.ArgumentParser(
        prog="hf-tfm doctor detection",
        usage="%(prog)s --data DATA [--model MODEL] [--config PRESET or FILE] [--KNOB VALUE ...] [options]",
        description="Find out why AP would be 0 before a run of detection_train starts: a minute on two CPU cores.",
        epilog=f"Knobs are those of hf-tfm run {RECIPE}: give the same words, and what is examined is what would be "
        f"run. Without --config they are those of the preset {DEFAULTS[False]}, with --model of {DEFAULTS[True]}.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="the knob dataset: a folder, a data set on the Hub, or an embedded one")
    parser.add_argument("--model", help="the knob init_from: folder or Hub id; or, in braces, the knob model")
    parser.add_argument(
        "--full", action="store_true", help="learn eight images with the run's own model, if it is large"
    )
    parser.add_argument("--quick", action="store_true", help="learn nothing: a few seconds instead of a minute")
    parser.add_argument("--json", help="file to write the report to")
    own, words = parser.parse_known_args(list(argv))
    if own.json and not Path(own.json).parent.is_dir():
        parser.error(f"--json {own.json}: there is no folder {Path(own.json).parent}")
    if own.data is not None:
        words += ["--dataset", own.data]
    if own.model is not None:
        words += ["--model" if own.model.lstrip().startswith("{") else "--init_from", own.model]
    if not any(word.partition("=")[0] == "--config" for word in words):
        if not any(word.partition("=")[0] == "--dataset" for word in words):
            parser.error("give --data, or a --config that names a dataset")
        earlier = any(word.partition("=")[0] == "--init_from" for word in words)
        words = ["--config", DEFAULTS[earlier], "--validation_split", "validation", *words]
    recipe = recipes_folder() / f"{RECIPE}.py"
    kind = runpy.run_path(str(recipe))["DetectionArguments"]
    return own, parse_arguments(kind, recipe, words), words


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status, 1 where a check failed."""
    own, args, words = parse(sys.argv[1:] if argv is None else argv)
    print(f"hf-tfm run {RECIPE} {' '.join(words)}")
    found: list[Finding] = []
    for finding in condensed(examine(args, own.full, own.quick)):
        found.append(finding)
        print("\n".join(finding.lines()), flush=True)
    if own.json:
        save(found, own.json, {"recipe": RECIPE, "words": words})
    names = list(dict.fromkeys(finding.check for finding in found if finding.level == "failed"))
    warnings = sum(finding.level == "warning" for finding in found)
    print(f"{len(names)} checks failed{': ' if names else ''}{', '.join(names)}; {warnings} warnings")
    return 1 if names else 0
