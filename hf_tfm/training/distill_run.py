"""What the recipes of distillation share: their knobs, the teacher, and the student that learns from it.

teacher or its cache, task, student -> lessons -> a module to train and a task that says how
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoConfig, PreTrainedModel

from ..arguments import TrainingArguments
from ..distillation.cache import CachedTeacher
from ..distillation.model_spec import spec_of
from ..distillation.resolve import describe, resolve_terms
from ..distillation.student import StudentWithProjections, copy_layers, freeze_unused
from ..distillation.teacher import Teacher, check_score, load_teacher
from ..distillation.terms import read_terms
from ..finite import check_finite
from ..hub.results import Distillation
from ..tasks.base import Loader
from ..tasks.base import mean_losses as evaluate
from ..tasks.distill import DistillationTask, Teaching
from ..values import check_bounds, shown
from .run import Run
from .session import TrainingResult

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(kw_only=True)
class DistillationKnobs:
    """Knobs of what is learned from a teacher; a mixin that stands before the knobs of a task.

    Args:
        teacher: folder or Hub id of a model of any kind, with its tokenizer or image processor.
        teacher_dtype: of the teacher's weights and what it computes; default, what the student computes in.
        teacher_device: where it computes, say cuda:1, or auto, spread over all devices where it does not fit on one;
            default, where the student does.
        expected_score: the run ends at once if the teacher's metric_for_best_model on the validation data is worse
            than this.
        terms: what student and teacher are compared in, each {kind, weight, temperature, layers, ...}; see
            `distillation.terms.Term`.
        match_labels: name refuses a teacher whose classes are called otherwise than the student's, but for upper and
            lower case; number compares classes of the same number, whatever they are called.
        student_layers: a new student begins with the weights of these blocks of the teacher, counted from 0.
        truncate_width: of a wider teacher it takes the first rows and columns; they no longer compute what they did.
        cache: folder with the teacher's signals, from which the run reads them; of the teacher there need then be the
            configuration and the tokenizer or image processor alone, and with student_layers its weights.
        write_cache: write the teacher's signals into cache, and end.
        cache_epochs: epochs that are written; a run reads epoch e modulo their number.
        cache_top_k: logits of a row that are kept; default, all.
        cache_dtype: of what is written.
        costs: measure in the end what student and teacher cost, for the card; the teacher beside a cache, when that is
            written.
    """

    teacher: str
    teacher_dtype: Dtype | None = None
    teacher_device: str | None = None
    expected_score: float | None = None
    # Not list[Term]: jsonargparse would merge the items of a command line into those of a preset.
    terms: list[Any] = field(default_factory=list)
    match_labels: Literal["name", "number"] = "name"
    student_layers: list[int] = field(default_factory=list)
    truncate_width: bool = False
    cache: str | None = None
    write_cache: bool = False
    cache_epochs: int = 1
    cache_top_k: int | None = None
    cache_dtype: Dtype = "bf16"
    costs: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.terms = read_terms(self.terms)
        self.teacher_dtype = self.teacher_dtype or ("fp32" if self.mixed_precision == "no" else self.mixed_precision)
        self.check_range(at_least_1="cache_epochs cache_top_k", at_most={"cache_epochs": 100_000})
        layers = self.student_layers if isinstance(self.student_layers, dict) else {"": self.student_layers}
        for stack, numbers in layers.items():
            check_bounds(f"student_layers{f'.{stack}' if stack else ''}", numbers, 0)
        check_device("teacher_device", self.teacher_device)
        if not self.terms:
            raise ValueError("terms must have at least one: without any, there is nothing to learn from the teacher")
        if self.write_cache and not self.cache:
            raise ValueError("write_cache needs cache, the folder to write")
        if self.student_layers and self.model_name_or_path:
            raise ValueError("model_name_or_path brings its own weights: give no student_layers beside it")
        if self.cache and not self.write_cache and self.expected_score is not None:
            raise ValueError("expected_score needs the teacher, and cache takes its place: check it at write_cache")

    @property
    def cached(self) -> bool:
        """Whether the teacher's signals are read from a cache."""
        return bool(self.cache) and not self.write_cache


def check_device(name: str, device: str | None) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Args:
        name: of the option, for errors.
        device: as `torch.device` takes it, "auto", or None.
    """
    if device is None or device == "auto":
        return
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} must be auto or a device such as cpu or cuda:1, got {shown(device)}") from error
    own = torch.accelerator.current_accelerator()
    there = found.type == "cpu" or (
        own is not None and found.type == own.type and (found.index or 0) < torch.accelerator.device_count()
    )
    if not there:
        raise ValueError(f"{name} {shown(device)} is not a device of this machine")


def open_teacher(
    args: DistillationKnobs, auto_class: Any, device: torch.device | str | None = None, dtype: str | None = None
) -> Teacher:
    """The teacher, see `load_teacher`; on ``device`` unless the knobs say where, in ``dtype`` whatever they say."""
    spread = args.teacher_device == "auto"
    teacher = load_teacher(
        args.teacher,
        auto_class,
        dtype or args.teacher_dtype,
        None if spread else args.teacher_device or device,
        "auto" if spread else None,
        trust_remote_code=args.trust_remote_code,
    )
    check_finite(teacher.model, f'teacher "{args.teacher}"')
    return teacher


def teacher_words(args: DistillationKnobs) -> int:
    """Words in the teacher's vocabulary, of which its tokenizer may have fewer: some are padded to a round number."""
    config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
    return config.get_text_config().vocab_size


def begin_with_layers(args: DistillationKnobs, student: PreTrainedModel) -> None:
    """Give a new student the weights of ``student_layers``, where there are any.

    The teacher is loaded as the student's class, so that one of transformers' own has the names of our weights.

    Raises:
        ValueError: the teacher is of another kind, or its layers do not fit; see `copy_layers`.
    """
    if args.student_layers:
        teacher = load_teacher(args.teacher, type(student), trust_remote_code=args.trust_remote_code).model
        try:
            fresh = copy_layers(student, teacher, args.student_layers, args.truncate_width)
        except ValueError as error:
            raise ValueError(f"student_layers: {error}") from error
        if fresh:
            PartialState().print(f"weights the teacher has none for, drawn anew: {', '.join(fresh)}")


@dataclass
class Lessons:
    """Who learns what from whom; see `prepare`.

    Args:
        task: for the loop.
        model: for the loop; its ``student`` is what is kept.
        teacher: its model, or None where a cache takes its place.
        auto_class: that it is loaded with.
    """

    task: DistillationTask
    model: StudentWithProjections
    teacher: PreTrainedModel | None
    auto_class: Any

    def compared(self, task: Teaching) -> Teaching:
        """``task`` for data to be scored, with the terms beside it where the teacher is at hand."""
        return task if self.teacher is None else DistillationTask(task, self.task.teacher, self.task.lessons)

    def distance(self, accelerator: Accelerator, trained: StudentWithProjections, loader: Loader) -> dict[str, float]:
        """``distillation``, the loss of all terms on data to be scored; nothing where the teacher is not at hand."""
        if self.teacher is None:
            return {}
        return {"distillation": evaluate(accelerator, self.task, trained, loader)["loss"]}

    def described(self, args: DistillationKnobs) -> Distillation:
        """For the results file."""
        return {
            "teacher": args.teacher,
            "student_layers": args.student_layers or None,
            "cached": args.cached,
            "terms": describe(self.task.lessons),
        }


def prepare(
    args: DistillationKnobs, accelerator: Accelerator, task: Teaching, student: PreTrainedModel, auto_class: Any
) -> Lessons:
    """Check the terms against student and teacher, and put them together.

    Raises:
        ValueError: a term does not fit them; or the cache is not whole, or lacks a signal.
    """
    source = CachedTeacher(args.cache) if args.cached else open_teacher(args, auto_class, accelerator.device)
    lessons = resolve_terms(args.terms, spec_of(student), source.spec, args.match_labels)
    teacher = None if args.cached else source.model
    return Lessons(
        DistillationTask(task, source, lessons), StudentWithProjections(student, lessons), teacher, auto_class
    )


def check_teacher(
    args: DistillationKnobs, lessons: Lessons, scores_of: Callable[[PreTrainedModel], dict[str, float]]
) -> None:
    """Refuse a teacher that is worse than ``expected_score``, where that is given; see `check_score`."""
    if args.expected_score is not None:
        check_score(scores_of(lessons.teacher), args.metric_for_best_model, args.expected_score)


def learn(
    args: TrainingArguments,
    run: Run,
    lessons: Lessons,
    learning: Loader,
    score: Callable[[StudentWithProjections], dict[str, float]],
    settle: Callable[[int | None, int], TrainingArguments] | None = None,
    show: Callable[[StudentWithProjections, int], None] | None = None,
) -> TrainingResult:
    """Freeze what no term reaches, and train the student for as long as the knobs say.

    Args:
        learning: batches of the training data.
        score, show: see `train`.
        settle: (steps of an epoch, steps of the run) -> the knobs with what follows from these; default, as they are.
    """
    freeze_rest(run.accelerator, lessons, learning)
    per_epoch = learning.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)
    eval_steps = args.eval_steps or per_epoch or max_steps
    settled = settle(per_epoch, max_steps) if settle else args
    return run.train(lessons.task, lessons.model, learning, settled, max_steps, eval_steps, score, show)


def freeze_rest(accelerator: Accelerator, lessons: Lessons, learning: Loader) -> None:
    """Freeze what no term reaches, and say so."""
    batch = next(iter(learning.epoch(0)))[0]
    if unused := freeze_unused(accelerator, lessons.task, lessons.model, batch):
        accelerator.print(f"no term reaches {', '.join(unused[:6])}{' ...' * (len(unused) > 6)}: left as they are")
