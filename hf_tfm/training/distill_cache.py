"""What the recipes of distillation do beside learning: the cache of a teacher's signals, and the table of costs.

lessons, training data -> a cache, or one that is of this run; student, teacher, yardstick -> what both cost and score
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..distillation.cache import CacheFormat, check_top_k, write_cache
from ..distillation.resolve import signals_of
from ..distillation.samples import TrainingSamples
from ..distillation.shards import load_cost, save_cost
from ..hub.cost import Cost, beside_teacher, measure_cost
from .distill_run import DistillationKnobs, Lessons, open_teacher

# Knobs that decide what a teacher reads, but for the data and chance; a cache is of the same ones.
READING = (
    *("max_length", "sequences", "documents", "objective", "mlm_probability", "whole_words"),
    *("image_size", "resize", "mean", "std", "augmentation", "shortest_side", "longest_side"),
)


@dataclass
class Yardstick:
    """What models are measured with, for the table of costs.

    Args:
        sample: what a model reads of one sample, (1, ...) each.
        score: model -> its score on the validation data; called on all processes.
        metric: what the score is, and of which split, in words.
        data: its fingerprint: a cache has the teacher's score, for runs with the same.
        higher_is_better: otherwise the student keeps no share of it.
    """

    sample: Mapping[str, Tensor]
    score: Callable[[PreTrainedModel], float]
    metric: str
    data: Any
    higher_is_better: bool = True

    def measure(self, accelerator: Accelerator, name: str, model: PreTrainedModel) -> Cost | None:
        """What a model costs and scores, on the main process."""
        score = self.score(model)
        if not math.isfinite(score):
            raise ValueError(f"{self.metric} of the {name} is {score}")
        if not accelerator.is_main_process:
            return None
        return Cost(**measure_cost(name, model, readable(model, self.sample), score), metric=self.metric)

    @property
    def of(self) -> str:
        """What two scores have to share to be compared."""
        return f"{self.metric} {self.data}"


def reading_knobs(args: DistillationKnobs) -> dict[str, Any]:
    """Those of `READING` that a run has, as JSON has them."""
    return json.loads(json.dumps({name: value for name, value in asdict(args).items() if name in READING}))


def wrote_cache(
    args: DistillationKnobs,
    accelerator: Accelerator,
    lessons: Lessons,
    rows: datasets.Dataset,
    data: str,
    yardstick: Yardstick | None = None,
    numbers: Callable[[int], Any] | None = None,
) -> bool:
    """Write the cache where that is the run's whole work, and say so; otherwise refuse one of another run.

    Args:
        rows, data: see `check_cache`; yardstick, numbers: see `fill_cache`.
    """
    if args.write_cache:
        fill_cache(args, accelerator, lessons, rows, data, numbers, yardstick)
        return True
    check_cache(args, lessons, rows, data)
    return False


def samples_of(args, lessons, rows, data, numbers=None) -> TrainingSamples:
    """The training data of a task of the earlier kind."""
    task = lessons.task.task
    collate = getattr(task, "collate_training", task.collate)
    return TrainingSamples(rows, collate, task.inputs, task.places, data, reading_knobs(args), numbers)


def check_cache(args: DistillationKnobs, lessons: Lessons, rows: datasets.Dataset, data: str) -> None:
    """Refuse a cache of another run.

    Args:
        rows: to learn from, as the task's ``collate`` takes them; ``data``: their fingerprint.

    Raises:
        ValueError: it says in what it differs.
    """
    if args.cached:
        source = lessons.task.teacher
        source.check(samples_of(args, lessons, rows, data), name=args.teacher)
        if args.costs:
            load_cost(Path(args.cache), "")  # a damaged file is refused before training


def fill_cache(
    args: DistillationKnobs,
    accelerator: Accelerator,
    lessons: Lessons,
    rows: datasets.Dataset,
    data: str,
    numbers: Callable[[int], Any] | None = None,
    yardstick: Yardstick | None = None,
) -> int:
    """Write the teacher's signals that the terms need, and say how large they are; the exit status.

    Args:
        rows, data: see `check_cache`.
        numbers: see `write_cache`.
        yardstick: the teacher's cost is measured with it, if the knobs want costs.

    Raises:
        ValueError: the terms need more than ``cache_top_k`` keeps; and see `write_cache`.
    """
    warm = {term.temperature for term in args.terms if term.kind == "soft_target"}
    if args.cache_top_k and len(warm) > 1:
        raise ValueError(f"cache_top_k needs one temperature of all soft_target terms, got {sorted(warm)}")
    temperature = warm.pop() if warm else 1.0
    check_top_k(lessons.model.terms, args.cache_top_k, temperature, args.cache)
    report = write_cache(
        lessons.task.teacher,
        samples_of(args, lessons, rows, data, numbers),
        args.cache,
        CacheFormat(
            signals_of(lessons.model.terms, "teacher"),
            args.cache_epochs,
            args.cache_top_k,
            args.cache_dtype,
            temperature,
        ),
        args.teacher,
        num_workers=args.dataloader_num_workers,
        accelerator=accelerator,
        progress=args.progress,
    )
    accelerator.print(
        f"{args.cache}: {report.samples:,} samples, {report.bytes / 1e6:.1f} MB, "
        f"{report.bytes_per_sample / 1e3:.2f} kB each"
    )
    if args.costs and yardstick and (cost := teacher_cost(args, accelerator, lessons, yardstick)):
        save_cost(Path(args.cache), cost, yardstick.of)
    return 0


def table_of_costs(
    args: DistillationKnobs, accelerator: Accelerator, lessons: Lessons, yardstick: Yardstick
) -> list[Cost] | None:
    """What teacher and student cost and score, for the card; None where that is not wanted.

    The student has been saved, so nothing that fails here loses it. Beside a cache whose writer did not measure the
    teacher, the student stands alone.

    Raises:
        RuntimeError: something failed; the error says how the run is ended without.
    """
    if not args.costs:
        return None
    student = lessons.model.student
    try:
        theirs = teacher_cost(args, accelerator, lessons, yardstick)
        ours = yardstick.measure(accelerator, "student", student)
    except Exception as error:
        raise RuntimeError(
            f"the costs could not be measured ({error}); the student is saved in {args.output_dir}, and the same "
            "command with --costs false scores it and ends"
        ) from error
    if not accelerator.is_main_process:
        return None
    if theirs is None:
        return [ours]
    return beside_teacher(theirs, ours) if yardstick.higher_is_better else [theirs, ours]


def teacher_cost(
    args: DistillationKnobs, accelerator: Accelerator, lessons: Lessons, yardstick: Yardstick
) -> Cost | None:
    """What the teacher costs and scores, in float32, or what its cache says of that; None where nobody knows."""
    if args.cached:
        return load_cost(Path(args.cache), yardstick.of)
    if args.teacher_device == "auto":  # spread over devices, it does not fit on one to be timed
        return None
    teacher = lessons.teacher
    if args.teacher_dtype != "fp32":
        teacher = open_teacher(args, lessons.auto_class, accelerator.device, "fp32").model
    return yardstick.measure(accelerator, "teacher", teacher)


def readable(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a sample a model takes."""
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in sample.items() if name in taken}
