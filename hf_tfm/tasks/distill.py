"""Distillation of any task: what one step computes when a student also learns from a teacher.

    batch -> student's signals, teacher's signals -> {term: weighted sum over its items}

The loop sees a task like any other. Shapes: B samples; T tokens; n rows with a target.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distillation.losses import query_loss
from ..distillation.resolve import ResolvedTerm, signals_of
from ..distillation.samples import token_mask
from ..distillation.signals import LOGITS, MAP, PLACES, REST, SET_BOXES, SET_LOGITS, TOP, Signals, parts
from ..distillation.terms import OBJECTS, ROWS, on_logits

Batch = dict[str, Any]
OWN = "distillation"  # the key of a batch under which this task keeps its own
STRIDES = (4, 8, 14, 16, 32, 64)  # pixels a cell of a map may stand for


class Teaching(Protocol):
    """What a task has that can be distilled, beside what the loop asks for.

    ``inputs(batch)`` -> what both models read; ``places(batch)`` -> which rows of logits have a target, or None where
    all have; ``hard_loss(logits, batch)`` -> sum of the true labels' loss from those rows. A task whose model computes
    that loss itself has ``hard_losses(output, batch)`` instead, and ``target_inputs(batch)`` if its model needs more.
    """

    item: str
    term: str

    def collate(self, examples: list, indices: list[int], epoch: int, hidden: bool = False) -> Batch: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def inputs(self, batch: Batch) -> dict[str, Any]: ...

    def places(self, batch: Batch) -> Tensor | None: ...


class EveryToken:
    """A task on texts whose models give logits of every token, not of those with a target alone.

    Args:
        task: whose labels are still those of its targets.
    """

    def __init__(self, task: Teaching):
        self.task = task

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # not there yet, in a process that unpickles this
            raise AttributeError(name)
        return getattr(self.task, name)

    def collate(self, examples: list, indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """The task's batch, with the places of its tokens and which of them are targets.

        Raises:
            ValueError: the task has no targets among the tokens.
        """
        batch = self.task.collate(examples, indices, epoch, hidden)
        if (targets := self.targets(batch)) is None:
            raise ValueError('tokens "all" of a term on logits: the task has no tokens with a target')
        places = token_mask(batch).flatten().nonzero()[:, 0]
        return {**batch, "token_places": places, "target_rows": torch.searchsorted(places, targets)}

    def targets(self, batch: Batch) -> Tensor | None:
        """(n,) places among the B T of the tokens that have a target."""
        return self.task.places(batch)

    def places(self, batch: Batch) -> Tensor:
        """Places of all tokens that are no padding."""
        return batch["token_places"]

    def hard_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the targets, from the logits at `places`."""
        return self.task.hard_loss(logits[batch["target_rows"]], batch)


class Source(Protocol):
    """Where a teacher's signals come from: `Teacher`, which computes them, or `CachedTeacher`, which reads them.

    ``require(lessons)`` refuses lessons it cannot give; ``epoch(epoch)`` is the one whose samples it knows;
    ``attach(...)`` gives what is added to a batch where it is made, and ``signals(...)`` what is compared.
    """

    def require(self, lessons: Sequence[ResolvedTerm]) -> None: ...

    def epoch(self, epoch: int) -> int: ...

    def attach(
        self, batch: Batch, names: Sequence[str], indices: list[int], epoch: int, places: Tensor | None
    ) -> dict[str, Any]: ...

    def signals(
        self, batch: Batch, inputs: dict[str, Any], names: Sequence[str], places: Tensor | None
    ) -> Signals: ...


class DistillationTask:
    """A task whose student learns from a teacher, and with a term "label" from the true labels too.

    Its model is a `StudentWithProjections`. Of a task with ``hard_loss``, the labels are those of its main
    term; others, as next sentences, are not learned from.

    Args:
        task: what is learned.
        teacher: gives the signals that the lessons compare.
        lessons: see `distillation.resolve.resolve_terms`.
    """

    def __init__(self, task: Teaching, teacher: Source, lessons: Sequence[ResolvedTerm]):
        every = any(on_logits(lesson.term) and lesson.term.tokens == "all" for lesson in lessons)
        self.task, self.teacher, self.lessons = EveryToken(task) if every else task, teacher, tuple(lessons)
        self.item, self.term = task.item, task.term
        self.names = signals_of(lessons, "teacher")
        teacher.require(self.lessons)

    def collate(self, examples: list, indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """The task's batch, with the signals of a cached teacher, and of an epoch that it knows."""
        epoch = self.teacher.epoch(epoch)
        return self.prepare(self.task.collate(examples, indices, epoch, hidden), indices, epoch, hidden)

    def collate_training(self, examples: list, indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """The same, of samples as the task changes them in training, if it does."""
        epoch = self.teacher.epoch(epoch)
        return self.prepare(
            getattr(self.task, "collate_training", self.task.collate)(examples, indices, epoch, hidden),
            indices,
            epoch,
            hidden,
        )

    def prepare(self, batch: Batch, indices: list[int], epoch: int, hidden: bool) -> Batch:
        """A batch with ``samples``, how many of it count."""
        batch[OWN] = {"samples": batch.get("images", 0 if hidden else len(indices))}
        if batch[OWN]["samples"]:
            batch[OWN] |= self.teacher.attach(batch, self.names, indices, epoch, self.task.places(batch))
        return batch

    def count(self, batch: Batch) -> dict[str, float]:
        """Items of every term, and of the task's own."""
        own = self.task.count(batch)
        counts = {self.term: own[self.term]}
        for lesson in self.lessons:
            if lesson.kind.loss is None:
                counts |= own
            else:
                counts[lesson.name] = self.items(lesson, batch) if batch[OWN]["samples"] else 0
        return counts

    def items(self, lesson: ResolvedTerm, batch: Batch) -> int:
        """What a lesson's sum is divided by: targets, or samples where each has one; objects; tokens, or images."""
        if lesson.kind.items == ROWS or lesson.term.tokens == "targets":
            places = self.task.places(batch) if on_logits(lesson.term) else self.targets(batch)
            return batch[OWN]["samples"] if places is None else len(places)
        if lesson.kind.items == OBJECTS:
            return sum(len(label["class_labels"]) for label in batch["labels"])
        if not is_text(batch) or lesson.term.tokens == "first":
            return batch[OWN]["samples"]
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def targets(self, batch: Batch) -> Tensor | None:
        """Places of the tokens that have a target, None where all samples have one."""
        return self.task.targets(batch) if isinstance(self.task, EveryToken) else self.task.places(batch)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted sums of every term.

        Args:
            model: a `StudentWithProjections`, or what the accelerator made of it.
        """
        inputs, places = self.task.inputs(batch), self.task.places(batch)
        more = self.task.target_inputs(batch) if hasattr(self.task, "target_inputs") else {}
        student, output = model({**inputs, **more}, places)
        # A batch that counts for nothing takes part, since sharded models exchange weights in every pass.
        live = batch[OWN]["samples"] > 0
        teacher = self.teacher.signals(batch[OWN], inputs, self.names, places) if live else None
        sums: dict[str, Tensor] = {}
        for lesson in self.lessons:
            if lesson.kind.loss is None:
                own = self.hard_losses(student[lesson.pairs[0][0]], output, batch)
                sums |= {name: lesson.term.weight * value for name, value in own.items()}
            elif live:
                sums[lesson.name] = lesson.term.weight * self.compare(lesson, student, teacher, batch)
            else:
                reached = (student[lesson.projected(name)] for name, _ in lesson.pairs)
                sums[lesson.name] = sum(0.0 * value.float().nan_to_num(neginf=0.0).sum() for value in reached)
        return sums

    def hard_losses(self, logits: Tensor, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums of the true labels' losses."""
        if hasattr(self.task, "hard_losses"):
            return self.task.hard_losses(output, batch)
        return {self.term: self.task.hard_loss(logits, batch)}

    def compare(self, lesson: ResolvedTerm, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """The sum of a lesson over its items and pairs."""
        term, loss = lesson.term, lesson.kind.loss
        warm = {"temperature": term.temperature} if lesson.kind.temperature else {}
        if lesson.kind.items == OBJECTS:
            found, given = (student[SET_LOGITS], student[SET_BOXES]), tuple(teacher[name] for _, name in lesson.pairs)
            return query_loss(found, given, batch["labels"], self.task.config, **warm)
        if lesson.kind.items == ROWS:
            logits = student[term.output]
            if LOGITS in teacher:
                return loss(logits, teacher[LOGITS], **warm)
            return lesson.kind.top(logits, teacher[TOP], teacher[PLACES], teacher[REST], **warm)
        total = []
        for ours, theirs in lesson.pairs:
            states = student[lesson.projected(ours)]
            weights = token_weights(batch, ours, states)
            if term.tokens == "first":
                weights = chosen_tokens(weights, None)
            elif term.tokens == "targets":
                if (places := self.targets(batch)) is None:
                    raise ValueError(f'tokens "targets" of {lesson.name}: the task has no tokens with a target')
                weights = chosen_tokens(weights, places)
            total.append(loss(states, teacher[theirs], weights))
        return sum(total)


def is_text(batch: Batch) -> bool:
    """Whether a batch is one of texts, whose item is the token; of images it is the image."""
    return "input_ids" in batch


def token_weights(batch: Batch, name: str, states: Tensor) -> Tensor:
    """How much every token of a signal counts, (B, T): 1 in texts, 0 for padding; of an image all together 1.

    Args:
        name: of the signal.
        states: (B, T, D), (B, H, T, T) or (B, D, h, w).

    Raises:
        ValueError: the mask of the texts is not (B, T).
    """
    stack, kind, _ = parts(name)
    B, T = states.shape[0], states.shape[2:].numel() if kind == MAP else states.shape[-2]
    if is_text(batch):
        shape = tuple(batch["input_ids"].shape)
        if shape != (B, T):
            raise ValueError(f'signal "{name}" must be of the tokens of input_ids {shape}, got {(B, T)}')
        return batch["attention_mask"].float() if "attention_mask" in batch else states.new_ones(shape).float()
    if "pixel_mask" not in batch or stack in ("decoder", "cross"):
        return states.new_full((B, T), 1.0 / T, dtype=torch.float32)
    mask = batch["pixel_mask"]
    grid = tuple(states.shape[2:]) if kind == MAP else grid_of(tuple(mask.shape[1:]), T)
    cells = nn.functional.interpolate(mask[None].float(), size=grid)[0].flatten(1)  # as DETR shrinks its mask
    return cells / cells.sum(1, keepdim=True).clamp_min(1.0)


def chosen_tokens(weights: Tensor, places: Tensor | None) -> Tensor:
    """Weights (B, T) of 1 at some of the B T places, or of the first token of each sample, and 0 elsewhere."""
    chosen = torch.zeros_like(weights)
    if places is None:
        chosen[:, 0] = 1.0
    else:
        chosen.flatten()[places] = 1.0
    return chosen


def grid_of(size: tuple[int, int], cells: int) -> tuple[int, int]:
    """Rows and columns of the cells that stand for an image of a size in pixels.

    Raises:
        ValueError: no usual stride gives so many.
    """
    for stride in STRIDES:
        grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        if grid[0] * grid[1] == cells:
            return grid
    raise ValueError(f"{cells} cells of an image of {size[0]} x {size[1]} pixels are no grid of stride {STRIDES}")
