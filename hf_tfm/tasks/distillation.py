"""Distillation of any task: a student learns from a teacher, and from the labels if there is a term "label".

    batch -> activations of student and teacher -> {term: weighted sum over its items}

To the training loop, the distillation of a task is a task like any other. Shapes: B samples; T tokens; n rows with a
target.
"""

import inspect
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..arguments import Arguments
from ..data.batching import Sample
from ..distillation.cache import CachedTeacher, CacheFormat, check_top_k, write_cache
from ..distillation.losses import query_loss
from ..distillation.model_spec import spec_of
from ..distillation.resolve import ResolvedTerm, describe, resolve_terms, signals_of
from ..distillation.samples import TrainingSamples, token_mask
from ..distillation.shards import load_cost, save_cost
from ..distillation.signals import LOGITS, MAP, PLACES, REST, SET_BOXES, SET_LOGITS, TOP, Signals, parts
from ..distillation.student import StudentWithProjections, copy_layers, freeze_unused
from ..distillation.teacher import Teacher, check_score, load_teacher
from ..distillation.terms import OBJECTS, ROWS, on_logits, read_terms
from ..finite import check_finite
from ..hub.cost import Cost, beside_teacher, measure_cost
from ..values import check_bounds, shown
from .base import Batch, Collator, Loader, Scores, Task, mean_losses

Dtype = Literal["fp32", "bf16", "fp16"]
StudentLayers = list[int] | dict[Literal["encoder", "decoder"], list[int]] | None
OWN = "distillation"  # key of a batch under which this task stores its own values
STRIDES = (4, 8, 14, 16, 32, 64)  # possible strides of the cells of a map, in pixels
MOST_LEVELS = 5  # maximum number of maps with doubling strides that are read together
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(kw_only=True)
class DistillationArguments(Arguments):
    """Learning from a teacher.

    Args:
        teacher: folder or Hub id of a model of any kind, with its tokenizer or image processor.
        teacher_dtype: of the teacher's weights and computation; default, that of the student's computation.
        teacher_device: device of the teacher, for example cuda:1, or auto to spread it over all devices; default, that
            of the student.
        expected_score: end the run before training if the teacher's metric_for_best_model on the validation data is
            worse than this.
        terms: what to compare between student and teacher, each {kind, weight, temperature, layers, ...}; see
            `distillation.terms.Term`.
        match_labels: name refuses a teacher whose class names differ from the student's, ignoring case; number
            compares classes of the same number, whatever their names.
        student_layers: blocks of the teacher, counted from 0, whose weights initialise a new student.
        truncate_width: take the first rows and columns of a wider teacher's weights; they then compute something else.
        cache: folder with the teacher's signals, which the run reads instead of running the teacher. Of the teacher
            only the configuration and the tokenizer or image processor are needed then, and with student_layers the
            weights.
        write_cache: write the teacher's signals to cache, and end.
        cache_epochs: number of epochs to write; training reads epoch e modulo this number.
        cache_top_k: number of largest logits to store per row; default, all.
        cache_dtype: dtype of the stored signals.
        costs: measure the costs of student and teacher after training, for the card; with a cache, those of the
            teacher are measured when it is written.
    """

    linear_probe: ClassVar[bool] = False
    language_weight: ClassVar[float] = 0.0

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
        run: Any = self  # arguments of a run have those of ModelArguments and TrainingArguments, too
        self.terms = read_terms(self.terms)
        self.teacher_dtype = self.teacher_dtype or ("fp32" if run.mixed_precision == "no" else run.mixed_precision)
        self.check_range(at_least_1="cache_epochs cache_top_k", at_most={"cache_epochs": 100_000})
        layers = self.student_layers if isinstance(self.student_layers, dict) else {"": self.student_layers or []}
        for stack, numbers in layers.items():
            check_bounds(f"student_layers{f'.{stack}' if stack else ''}", numbers, 0)
        check_device("teacher_device", self.teacher_device)
        if not self.terms:
            raise ValueError("terms must not be empty: without terms, the student does not learn from the teacher")
        if self.write_cache and not self.cache:
            raise ValueError("write_cache needs cache, the folder to write")
        if self.student_layers and run.model_name_or_path:
            raise ValueError("model_name_or_path has its own weights: do not give student_layers with it")
        if self.cached and self.expected_score is not None:
            raise ValueError("expected_score needs the teacher, which cache replaces: give it with write_cache")

    @property
    def cached(self) -> bool:
        """True if the teacher's signals are read from a cache."""
        return bool(self.cache) and not self.write_cache

    @property
    def folder_argument(self) -> str:
        """See `TrainingArguments.folder_argument`."""
        return "cache" if self.write_cache else "output_dir"


@dataclass(kw_only=True)
class EncoderDecoderArguments(DistillationArguments):
    """Distillation of a model with an encoder and a decoder.

    Args:
        student_layers: blocks of the teacher, counted from 0, whose weights initialise a new student: those of the
            decoder, or {encoder: [...], decoder: [...]}; a stack that is not named takes the teacher's first blocks.
    """

    student_layers: StudentLayers = None  # type: ignore[assignment]  # wider than in DistillationArguments

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.student_layers, list):
            self.student_layers = {"decoder": self.student_layers}


def check_texts(args: Any) -> None:
    """Refuse arguments of a task on texts that do not suit distillation.

    Args:
        args: with ``tokenizer`` and ``streaming``.

    Raises:
        ValueError: with the argument.
    """
    if args.tokenizer:
        raise ValueError(f'the student has the teacher\'s tokenizer: give no tokenizer, got "{args.tokenizer}"')
    check_stream_cache(args)


def check_stream_cache(args: Any) -> None:
    """Refuse a cache of the teacher's signals for a stream.

    Args:
        args: with ``streaming`` and ``cache``.
    """
    if args.streaming and args.cache:
        raise ValueError("cache needs the number of samples, which is not known with streaming")


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
    exists = found.type == "cpu" or (
        own is not None and found.type == own.type and (found.index or 0) < torch.accelerator.device_count()
    )
    if not exists:
        raise ValueError(f"{name} {shown(device)} is not a device of this machine")


class Attachments(Protocol):
    """The part of a `Source` that a collator needs.

    ``epoch(epoch)`` maps a training epoch to one that the source knows; ``attach(...)`` returns what is added to a
    batch.
    """

    def epoch(self, epoch: int) -> int: ...

    def attach(
        self, batch: Batch, names: Sequence[str], samples: list[Sample], epoch: int, positions: Tensor | None
    ) -> dict[str, Any]: ...


class Source(Attachments, Protocol):
    """Source of a teacher's signals: `Teacher`, which computes them, or `CachedTeacher`, which reads them.

    ``require(terms)`` refuses terms whose signals it cannot provide; ``signals(...)`` returns the signals of a batch.
    """

    def require(self, terms: Sequence[ResolvedTerm]) -> None: ...

    def signals(
        self, batch: Batch, inputs: dict[str, Any], names: Sequence[str], positions: Tensor | None
    ) -> Signals: ...


@dataclass
class DistillationCollator:
    """Batches of a task with the signals of a cached teacher, and with the number of ``samples`` that count.

    Args:
        collate: collator of the task.
        source: of the teacher's signals.
        names: of the signals.
        target_positions: see `Task.target_positions`.
        all_tokens: compare the logits of all tokens, not only of those with a target.

    Raises:
        ValueError: with ``all_tokens``, if the task has no tokens with a target.
    """

    collate: Collator
    source: Attachments
    names: Sequence[str]
    target_positions: Any
    all_tokens: bool = False

    def __call__(self, examples: list, samples: list[Sample], epoch: int, is_dummy: bool = False) -> Batch:
        epoch = self.source.epoch(epoch)
        batch = self.collate(examples, samples, epoch, is_dummy)
        own: dict[str, Any] = {"samples": batch.get("images", 0 if is_dummy else len(samples))}
        positions = self.target_positions(batch)
        if self.all_tokens:
            mask = token_mask(batch)
            if positions is None or mask is None:
                raise ValueError('tokens "all" of a term on logits: the task has no tokens with a target')
            tokens = mask.flatten().nonzero()[:, 0]
            own |= {"positions": tokens, "target_rows": torch.searchsorted(tokens, positions)}
            positions = tokens
        if own["samples"]:
            own |= self.source.attach(batch, self.names, samples, epoch, positions)
        return {**batch, OWN: own}


class DistillationTask(Task):
    """A task whose student learns from a teacher. `distill` makes the class for a task.

    It trains a `StudentWithProjections`. The scores are the task's own; validation adds "distillation", the loss of
    all terms, if the teacher is at hand.

    Attributes:
        task: the distilled task.
        source: of the teacher's signals.
        terms: resolved against student and teacher.
    """

    task_class: ClassVar[type[Task]]

    def __init__(self, args: Any, accelerator: Accelerator | None):
        super().__init__(args, accelerator)
        self.task = self.task_class(args, accelerator)

    @classmethod
    def around(cls, task: Task, source: Source, terms: Sequence[ResolvedTerm]) -> "DistillationTask":
        """Distillation of an existing task, for a custom loop.

        Raises:
            ValueError: the source lacks a signal.
        """
        kind = distill(type(task))
        made = kind.__new__(kind)
        Task.__init__(made, task.args, task.accelerator)
        made.task, made._model, made.processor = task, task._model, task.processor
        made.connect(source, terms)
        return made

    def connect(self, source: Source, terms: Sequence[ResolvedTerm]) -> None:
        """Set where signals come from, and what is compared.

        Raises:
            ValueError: the source lacks a signal.
        """
        source.require(terms)
        self.source, self.terms = source, tuple(terms)
        self.names = signals_of(terms, "teacher")
        self.all_tokens = any(on_logits(one.term) and one.term.tokens == "all" for one in terms)

    # --- data, processor and model: those of the task

    @property
    def hub_task(self) -> str:
        """See `Task`."""
        return self.task.hub_task

    @property
    def item(self) -> str:
        """See `Task`."""
        return self.task.item

    @property
    def auto_class(self) -> Any:
        """See `Task`."""
        return self.task.auto_class

    @property
    def validation_split(self) -> str:
        """See `Task`."""
        return self.task.validation_split

    @property
    def scored_splits(self) -> list[str]:
        """See `Task`."""
        return self.task.scored_splits

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.task.reported_metrics

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Those of the task; with the teacher at hand also "distillation", the loss of all terms."""
        if not self.task.head_is_optional:
            return (*self.task.validation_metrics, OWN)
        return ("loss", *dict.fromkeys(name for one in self.terms for name in self.term_names(one)), "reconstruction")

    def load_splits(self) -> dict[str, Any]:
        """See `Task`."""
        self.task.splits = self.task.load_splits()
        self.args = self.task.args
        return self.task.splits

    def fingerprint(self, rows: Any) -> str:
        """See `Task`."""
        return self.task.fingerprint(rows)

    def describe_data(self) -> dict[str, Any]:
        """See `Task`."""
        return self.task.describe_data()

    def build_processor(self) -> Any:
        """The processor of the student, whose output the teacher reads too."""
        return self.task.build_student_processor()

    def build_model(self) -> PreTrainedModel:
        """The student; a new one starts with the weights of ``student_layers``, if given.

        Raises:
            ValueError: the teacher does not fit the student, or ``student_layers`` do not fit; see `copy_layers`.
        """
        args, task = self.args, self.task
        task.processor = self.processor
        teacher = AutoConfig.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
        task.model = student = task.build_student(teacher)
        if args.student_layers:
            # Loaded as the student's class, so that a transformers model has the names of our weights.
            given = load_teacher(args.teacher, type(student), trust_remote_code=args.trust_remote_code).model
            try:
                fresh = copy_layers(student, given, args.student_layers, args.truncate_width)
            except ValueError as error:
                raise ValueError(f"student_layers: {error}") from error
            if fresh:
                self.accelerator.print(
                    f"weights that the teacher does not have are initialised at random: {', '.join(fresh)}"
                )
        return student

    def load_pretrained(self) -> None:
        """See `Task`."""
        raise NotImplementedError("evaluate a distilled model with its own task")

    def collator(self, split: str = "", training: bool = False) -> DistillationCollator:
        """See `Task`."""
        return DistillationCollator(
            self.task.collator(split, training),
            self.source,
            tuple(self.names),
            type(self.task).target_positions,
            self.all_tokens,
        )

    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> Loader:
        """See `Task`."""
        loader = self.task.dataloader(split, training, collate or self.collator(split, training))
        depends = training and self.task.sample_refs(loader) is not None
        return KnownEpochs(loader, self.source) if depends else loader

    # --- one step

    def positions(self, batch: Batch) -> Tensor | None:
        """(n,) flat positions of the rows of logits that are computed; None for all."""
        return batch[OWN]["positions"] if self.all_tokens else self.task.target_positions(batch)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """See `Task`."""
        return self.task.inputs(batch)

    def count(self, batch: Batch) -> dict[str, float]:
        """Items of every term, and of the task's own."""
        own = self.task.count(batch)
        counts: dict[str, float] = {self.term: own[self.term]}
        for one in self.terms:
            if one.kind.loss is None:
                counts |= own
            else:
                counts[one.name] = self.items(one, batch) if batch[OWN]["samples"] else 0
        return counts

    def items(self, one: ResolvedTerm, batch: Batch) -> int:
        """Number by which the sum of a term is divided: rows of logits, or samples; objects; tokens, or images."""
        if one.kind.items == ROWS or one.term.tokens == "targets":
            positions = self.positions(batch) if on_logits(one.term) else self.task.target_positions(batch)
            return batch[OWN]["samples"] if positions is None else len(positions)
        if one.kind.items == OBJECTS:
            return sum(len(label["class_labels"]) for label in batch["labels"])
        mask = token_mask(batch, one.term.stack)
        return batch[OWN]["samples"] if mask is None or one.term.tokens == "first" else int(mask.sum())

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted sums of every term.

        Args:
            model: a `StudentWithProjections`, possibly prepared by the accelerator.
        """
        inputs, positions = self.task.inputs(batch), self.positions(batch)
        student, output = model({**inputs, **self.task.targets(batch)}, positions)
        # A batch that counts for nothing takes part, since sharded models communicate in every forward pass.
        counts = batch[OWN]["samples"] > 0
        teacher = self.source.signals(batch[OWN], inputs, self.names, positions) if counts else None
        sums: dict[str, Tensor] = {}
        for one in self.terms:
            if one.kind.loss is None:
                logits = student[one.pairs[0][0]]
                logits = logits[batch[OWN]["target_rows"]] if self.all_tokens else logits
                own = self.task.output_losses(output, logits, batch)
                sums |= {name: one.term.weight * value for name, value in own.items()}
            elif teacher is not None:
                sums[one.name] = one.term.weight * self.compare(one, student, teacher, batch)
            else:
                reached = (student[one.projected(name)] for name, _ in one.pairs)
                sums[one.name] = total(0.0 * value.float().nan_to_num(neginf=0.0).sum() for value in reached)
        return sums

    def term_names(self, one: ResolvedTerm) -> tuple[str, ...]:
        """Names of the losses of a term."""
        return (self.term,) if one.kind.loss is None else (one.name,)

    def compare(self, one: ResolvedTerm, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum of a term over its items and pairs.

        Raises:
            ValueError: it is not a term between student and teacher, or tokens with a target are missing.
        """
        term, loss = one.term, one.kind.loss
        if loss is None:
            raise ValueError(f"{one.name} compares the student with the labels")
        warm = {"temperature": term.temperature} if one.kind.temperature else {}
        if one.kind.items == OBJECTS:
            found = student[SET_LOGITS], student[SET_BOXES]
            (_, logits_name), (_, boxes_name) = one.pairs
            given = teacher[logits_name], teacher[boxes_name]
            return query_loss(found, given, batch["labels"], self.task.model.config, **warm)
        if one.kind.items == ROWS:
            logits = student[term.output]
            if LOGITS in teacher:
                return loss(logits, teacher[LOGITS], **warm)
            if one.kind.top is None:
                raise ValueError(f"{one.name} needs all logits of the teacher")
            return one.kind.top(logits, teacher[TOP], teacher[PLACES], teacher[REST], **warm)
        losses = []
        for ours, theirs in one.pairs:
            states = student[one.projected(ours)]
            weights = token_weights(batch, ours, states)
            if term.tokens == "first":
                weights = chosen_tokens(weights, None)
            elif term.tokens == "targets":
                positions = self.task.target_positions(batch)
                if positions is None or (term.stack == "encoder" and "decoder_input_ids" in batch):
                    raise ValueError(f'tokens "targets" of {one.name}: the task has no such tokens with a target')
                weights = chosen_tokens(weights, positions)
            losses.append(loss(states, teacher[theirs], weights))
        return total(losses)

    # --- scores

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Scores of the task."""
        return self.task.evaluate(model, split, metrics)

    def validate(self, module: nn.Module, metrics: Collection[str]) -> dict[str, float]:
        """Scores of the student, and the loss of all terms if the teacher is at hand; a cache holds training data
        only."""
        student = module.get_submodule("student")
        values = self.task.evaluate(student, self.validation_split, self.task.validation_metrics).values
        if self.args.cached:
            return values
        terms = mean_losses(self.accelerator, self, module, self.evaluation_loader(self.validation_split))
        if self.task.head_is_optional:
            return {**terms, "reconstruction": values["loss"]}
        return {**values, OWN: terms["loss"]}

    # --- a run

    def prepare(self) -> bool:
        """Connect student and teacher; write the cache, which ends the run, or check it.

        Raises:
            ValueError: a term does not fit the models; the cache is incomplete, lacks a signal or belongs to another
                run; or the teacher's score is worse than expected.
        """
        args = self.args
        source = CachedTeacher(args.cache) if args.cached else self.open_teacher()
        terms = resolve_terms(args.terms, spec_of(self.model), source.spec, args.match_labels)
        self.connect(source, terms)
        self.module = StudentWithProjections(self.model, terms)
        if isinstance(source, CachedTeacher):
            source.check(self.training_samples(), name=args.teacher)
            if args.costs:
                load_cost(Path(args.cache), "")  # refuses a damaged file before training
            return True
        if args.write_cache:
            self.fill_cache(source)
            return False
        if args.expected_score is not None:
            scores = self.task.evaluate(source.model, self.validation_split, self.task.validation_metrics)
            check_score(scores.values, args.metric_for_best_model, args.expected_score)
        return True

    def open_teacher(self, dtype: str | None = None) -> Teacher:
        """The teacher, see `load_teacher`.

        Args:
            dtype: instead of ``args.teacher_dtype``.

        Raises:
            ValueError: a weight is not finite.
        """
        args = self.args
        spread = args.teacher_device == "auto"
        teacher = load_teacher(
            args.teacher,
            self.task.auto_class,
            dtype or args.teacher_dtype,
            None if spread else args.teacher_device or self.accelerator.device,
            "auto" if spread else None,
            trust_remote_code=args.trust_remote_code,
        )
        check_finite(teacher.model, f'teacher "{args.teacher}"')
        return teacher

    def training_samples(self) -> TrainingSamples:
        """The training data, as the teacher reads it."""
        split, options = self.args.train_split, asdict(self.args)
        loader: Any = self.task.dataloader(split, training=True)
        names = [name for name in self.task.cache_options if name in options]
        return TrainingSamples(
            loader.examples,
            DistillationCollator(
                self.task.collator(split, training=True),
                AllEpochs(),
                (),
                type(self.task).target_positions,
                self.all_tokens,
            ),
            self.task.inputs,
            self.positions,
            self.task.training_fingerprint(),
            json.loads(json.dumps({name: options[name] for name in names})),
            self.task.sample_refs(loader),
        )

    def fill_cache(self, teacher: Teacher) -> None:
        """Write the signals that the terms need, report their size, and measure the teacher's costs.

        Raises:
            ValueError: the terms need more than ``cache_top_k`` logits; see also `write_cache`.
        """
        args = self.args
        temperatures = {term.temperature for term in args.terms if term.kind == "soft_target"}
        if args.cache_top_k and len(temperatures) > 1:
            raise ValueError(f"cache_top_k needs one temperature of all soft_target terms, got {sorted(temperatures)}")
        temperature = temperatures.pop() if temperatures else 1.0
        check_top_k(self.terms, args.cache_top_k, temperature, args.cache)
        report = write_cache(
            teacher,
            self.training_samples(),
            args.cache,
            CacheFormat(self.names, args.cache_epochs, args.cache_top_k, args.cache_dtype, temperature),
            args.teacher,
            num_workers=args.dataloader_num_workers,
            accelerator=self.accelerator,
            progress=args.progress,
        )
        self.accelerator.print(
            f"{args.cache}: {report.samples:,} samples, {report.bytes / 1e6:.1f} MB, "
            f"{report.bytes_per_sample / 1e3:.2f} kB each"
        )
        if args.costs and (cost := self.teacher_cost()):
            save_cost(Path(args.cache), cost, self.scored_on)

    def begin_training(self, loader: Loader) -> None:
        """Freeze the parameters that no term reaches."""
        self.task.begin_training(loader)
        batch = next(iter(loader.epoch(0)))[0]
        if unused := freeze_unused(self.accelerator, self, self.module, batch):
            more = " ..." * (len(unused) > 6)
            self.accelerator.print(f"not trained, because no term reaches them: {', '.join(unused[:6])}{more}")

    def trained_module(self) -> nn.Module:
        """The student with its projections."""
        return self.module

    def show(self, module: nn.Module, step: int) -> None:
        """See `Task`."""
        self.task.show(module.get_submodule("student"), step)

    def end_training(self) -> None:
        """See `Task`."""
        self.task.end_training()

    def report(self) -> dict[str, Any]:
        """Costs, and the description of the distillation."""
        args = self.args
        distillation = {
            "teacher": args.teacher,
            "student_layers": args.student_layers or None,
            "cached": args.cached,
            "terms": describe(self.terms),
        }
        return {**self.task.report(), "costs": self.costs(), "distillation": distillation}

    @classmethod
    def run_all(cls, args: Any, fit: Any) -> int:
        """See `Task`."""
        return cls.task_class.run_all(args, fit)

    # --- costs

    @property
    def metric(self) -> str:
        """The compared score, and its split, as text."""
        return f"{self.task.main_metric.replace('_', ' ')}, {self.validation_split}"

    @property
    def scored_on(self) -> str:
        """Identifier of score and data: scores are compared only if it is the same."""
        return f"{self.metric} {self.fingerprint(self.task.splits[self.validation_split])}"

    def costs(self) -> list[Cost] | None:
        """Costs and scores of teacher and student, on the main process; None if they are not wanted.

        With a cache whose writer did not measure the teacher, those of the student alone.

        Raises:
            RuntimeError: the measurement failed; the student is saved by then, and the error says how to end the run.
        """
        args = self.args
        if not args.costs:
            return None
        try:
            teacher = self.teacher_cost()
            student = self.measure("student", self.model)
        except Exception as error:
            raise RuntimeError(
                f"the costs could not be measured ({error}); the student is saved in {args.output_dir}: run the "
                "same command with --costs false to score it"
            ) from error
        if student is None:  # not the main process
            return None
        if teacher is None:
            return [student]
        return [teacher, student] if self.lower_is_better else beside_teacher(teacher, student)

    @property
    def lower_is_better(self) -> bool:
        """True if a lower score is better; then the student's share of the teacher's score is meaningless."""
        return any(name in self.task.main_metric for name in LOWER_IS_BETTER)

    def teacher_cost(self) -> Cost | None:
        """Cost and score of the teacher, in float32, or those stored with the cache; None if unknown."""
        args = self.args
        if args.cached:
            return load_cost(Path(args.cache), self.scored_on)
        if args.teacher_device == "auto":  # it does not fit on one device, so it cannot be timed
            return None
        if args.teacher_dtype == "fp32" and isinstance(self.source, Teacher):
            return self.measure("teacher", self.source.model)
        return self.measure("teacher", self.open_teacher("fp32").model)

    def measure(self, name: str, model: PreTrainedModel) -> Cost | None:
        """Cost and score of a model, on the main process."""
        metric = self.task.main_metric
        score = self.task.evaluate(model, self.validation_split, (metric,)).values[metric]
        if not math.isfinite(score):
            raise ValueError(f"{self.metric} of the {name} is {score}")
        if not self.accelerator.is_main_process:
            return None
        accepted = inspect.signature(model.forward).parameters
        sample = {key: value for key, value in self.task.sample_inputs().items() if key in accepted}
        return Cost(**measure_cost(name, model, sample, score), metric=self.metric)


@cache
def distill(task_class: type[Task]) -> type[DistillationTask]:
    """Return the task that distils a task.

    Its arguments are ``task_class.DistillationArguments``, or `DistillationArguments` added to the task's own.
    """
    name = task_class.__name__.removesuffix("Task")
    arguments = task_class.DistillationArguments or make_dataclass(
        f"{name}DistillationArguments",
        [],
        bases=(DistillationArguments, task_class.Arguments),
        kw_only=True,
        namespace={"__doc__": f"{name} with a teacher."},
    )
    inherited = ("kind", "sample", "term", "processor_class", "processor_folder")
    fields = {one: getattr(task_class, one) for one in inherited if hasattr(task_class, one)}
    return type(
        f"{name}DistillationTask",
        (DistillationTask,),
        {"__doc__": f"Distillation of `{task_class.__name__}`.", **fields, "task_class": task_class}
        | {"Arguments": arguments, "__module__": task_class.__module__},
    )


class AllEpochs:
    """A source without signals that knows every epoch; for batches that a teacher will read."""

    def require(self, terms: Sequence[ResolvedTerm]) -> None:
        """Accept all terms."""

    def epoch(self, epoch: int) -> int:
        """Return the epoch unchanged."""
        return epoch

    def attach(self, *_: Any) -> dict[str, Any]:
        """Add nothing to a batch."""
        return {}


@dataclass
class KnownEpochs:
    """A loader of the epochs that a source of signals knows: a cache starts again after its last epoch."""

    loader: Loader
    source: Source

    def steps_per_epoch(self, epoch: int = 0) -> int | None:
        """See `Loader`."""
        return self.loader.steps_per_epoch(self.source.epoch(epoch))

    def epoch(self, epoch: int, start: Any = 0) -> Iterator[list[Any]]:
        """See `Loader`."""
        return self.loader.epoch(self.source.epoch(epoch), start)


def total(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor."""
    first, *others = values
    return sum(others, start=first)


def token_weights(batch: Batch, name: str, states: Tensor) -> Tensor:
    """Return the weight of every token of a signal, (B, T): 1 in texts, 0 for padding; 1 in total for an image.

    Args:
        name: of the signal.
        states: (B, T, D), (B, H, T, T) or (B, D, h, w).

    Raises:
        ValueError: the mask of the texts is not (B, T).
    """
    stack, kind, _ = parts(name)
    B, T = states.shape[0], states.shape[2:].numel() if kind == MAP else states.shape[-2]
    if (tokens := token_mask(batch, stack)) is not None:
        if tuple(tokens.shape) != (B, T):
            raise ValueError(f'signal "{name}" must be of the tokens of the text {tuple(tokens.shape)}, got {(B, T)}')
        return tokens.float()
    if "pixel_mask" not in batch or stack in ("decoder", "cross"):
        return states.new_full((B, T), 1.0 / T, dtype=torch.float32)
    mask = batch["pixel_mask"]
    grids = [tuple(states.shape[2:])] if kind == MAP else grids_of(tuple(mask.shape[1:]), T)
    parts_of = [nn.functional.interpolate(mask[None].float(), size=grid)[0].flatten(1) for grid in grids]
    cells = torch.cat(parts_of, dim=1)  # as detectors resize their masks
    return cells / cells.sum(1, keepdim=True).clamp_min(1.0)


def chosen_tokens(weights: Tensor, positions: Tensor | None) -> Tensor:
    """Return weights (B, T) of 1 at some of the B T positions, or at the first token of each sample, and 0
    elsewhere."""
    chosen = torch.zeros_like(weights)
    if positions is None:
        chosen[:, 0] = 1.0
    else:
        chosen.flatten()[positions] = 1.0
    return chosen


def grids_of(size: tuple[int, int], cells: int) -> list[tuple[int, int]]:
    """Return the rows and columns of the grids of cells over an image: one, or several whose strides double.

    Args:
        size: height and width of the image in pixels.
        cells: number of cells of all grids.

    Raises:
        ValueError: no usual strides give this number of cells.
    """
    for levels in range(1, MOST_LEVELS + 1):
        for first in STRIDES:
            strides = [first * 2**level for level in range(levels)]
            grids = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in strides]
            if sum(rows * columns for rows, columns in grids) == cells:
                return grids
    raise ValueError(
        f"{cells} cells of an image of {size[0]} x {size[1]} pixels do not form a grid of stride {STRIDES}, nor up to "
        f"{MOST_LEVELS} grids from one of these strides on"
    )
