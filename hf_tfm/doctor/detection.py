"""Find the causes of an AP of 0 before a run: ``hf-tfm doctor detection``.

    the run's arguments -> its data, as stored and as read -> its model -> checks -> overfit eight images -> a report

A check is a function that returns one or more `Finding`s; add new ones to one of the lists below.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..hub.loading import require_model
from ..options import PlainParser, parse_arguments
from ..recipe_files import recipes_folder
from ..tasks.object_detection import DetectionArguments
from . import arguments, boxes, classes, images, weights
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
    images.tiny_images,
)
# check(case), over all splits
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
    arguments.learning_rate,
    arguments.schedule,
    arguments.gradient_clipping,
    arguments.auxiliary_loss,
)
RECIPE = "detection_train"
DEFAULTS = {True: "finetune_small", False: "r50_300"}  # presets: with and without a model to start from


def examine(args: DetectionArguments, full: bool = False, quick: bool = False) -> Iterator[Finding]:
    """Check a detection run before it starts.

    Args:
        args: arguments of the run.
        full: overfit eight images with the run's own model, whatever its size.
        quick: skip the overfitting test.

    Yields:
        The findings of each check as they are made; a check without problems yields one finding, too.
    """
    case, broken = None, False
    for examined, finding in examine_data(args):
        case, broken = examined, broken or finding.level == "failed"
        yield finding
    if case is None:
        return
    try:
        weights.add_model(case)
    except (ValueError, OSError) as error:
        yield replace(failed(str(error), "see the message; a run would fail with it"), check="model")
        return
    for checks in (OF_A_SPLIT_AND_THE_MODEL, OF_THE_RUN):
        yield from run_checks(checks, case)
    if quick:
        return
    if broken:
        yield replace(skipped("correct the data first"), check=overfit.__name__)
    else:
        yield from findings_of(overfit, case, full)


def examine_data(args: DetectionArguments) -> Iterator[tuple[Case | None, Finding]]:
    """Run the checks that need no model; yield each finding with the case, which is None if the data cannot be
    read."""
    try:
        case = Case(args, read_splits(args))
    except (ValueError, OSError) as error:
        yield None, replace(failed(str(error), "see the message; a run would fail with it"), check="data")
        return
    for checks in (OF_A_SPLIT, OF_THE_DATA):
        for finding in run_checks(checks, case):
            yield case, finding


def run_checks(checks: tuple[Callable, ...], case: Case) -> Iterator[Finding]:
    """Run the checks of one of the lists above."""
    for check in checks:
        if checks in (OF_A_SPLIT, OF_A_SPLIT_AND_THE_MODEL):
            for split in case.splits.values():
                yield from findings_of(check, split, case, split=split.name)
        else:
            yield from findings_of(check, case)


def translate(argv: Sequence[str]) -> list[str]:
    """Translate two options to those of the recipe: --data to --dataset_name, --model FOLDER to
    --model_name_or_path."""
    words: list[str] = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        model = value if equals else next(iter(argv[i + 1 : i + 2]), "")
        if name == "--data":
            name = "--dataset_name"
        elif name == "--model" and not model.lstrip().startswith("{"):  # a mapping sets fields of a new model
            name = "--model_name_or_path"
        words.append(name + equals + value)
    return words


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, DetectionArguments, list[str]]:
    """Return the doctor's own options, the arguments of the run, and the command-line words that set the latter.

    Raises:
        SystemExit: an option is unknown, or the recipe refuses a value; the message names it.
    """
    parser = PlainParser(
        prog="hf-tfm doctor detection",
        usage="%(prog)s --data DATA [--model MODEL] [--config PRESET or FILE] [--ARGUMENT VALUE ...] [options]",
        description="Find causes of an AP of 0 before a run of detection_train starts, in a minute on two CPU cores.",
        epilog="DATA sets dataset_name; MODEL (folder or Hub id of a model to start from) sets model_name_or_path. "
        f"Other options are those of hf-tfm run {RECIPE}: give the same arguments as for the run. The default of "
        f"--config is {DEFAULTS[False]}, or {DEFAULTS[True]} with --model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="overfit eight images with the run's own model even if it is large; needs a GPU",
    )
    parser.add_argument("--quick", action="store_true", help="skip the overfitting test; takes a few seconds")
    parser.add_argument("--json", help="file to write the report to")
    own, words = parser.parse_known_args(translate(argv))
    if own.json and not Path(own.json).parent.is_dir():
        parser.error(f"--json {own.json}: there is no folder {Path(own.json).parent}")
    given = {word.partition("=")[0] for word in words}
    if "--config" not in given:
        if "--dataset_name" not in given:
            parser.error("give --data, or a --config that names a dataset")
        words = ["--config", DEFAULTS["--model_name_or_path" in given], "--validation_split", "validation", *words]
    recipe = recipes_folder() / f"{RECIPE}.py"
    return own, parse_arguments(DetectionArguments, recipe, words, "doctor detection"), words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a check failed, 2 if nothing could be examined, otherwise 0."""
    own, args, words = parse(sys.argv[1:] if argv is None else argv)
    if args.model_name_or_path:
        try:
            require_model("model_name_or_path", args.model_name_or_path)
        except ValueError as error:
            print(f"hf-tfm doctor detection: {error}", file=sys.stderr)
            return 2
    print(f"hf-tfm run {RECIPE} {' '.join(words)}")
    found: list[Finding] = []
    for finding in condensed(examine(args, own.full, own.quick)):
        found.append(finding)
        print("\n".join(finding.lines()), flush=True)
    if own.json:
        save(found, own.json, {"recipe": RECIPE, "words": words})
    names = list(dict.fromkeys(finding.check for finding in found if finding.level == "failed"))
    warnings = sum(finding.level == "warning" for finding in found)
    print(f"failed: {', '.join(names) or 'nothing'}; warnings: {warnings}")
    return 1 if names else 0
