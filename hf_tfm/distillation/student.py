"""Students: made of some of a teacher's layers, and wrapped with what stands between them and the teacher.

teacher, layers -> a smaller model with their weights (DistilBERT, arXiv:1910.01108, section 3)
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .plan import Lesson, signals_of
from .signals import MAP, SCORE, Signals, collect, parts

# Where the number of a block stands in the name of a weight, by stack; "" is the only stack of a model.
BLOCK = r"(?:layers|layer|h|blocks|block)\.(\d+)\."
STACKS = {"": rf"(?:^|\.){BLOCK}", "encoder": rf"(?:^|\.)encoder\.{BLOCK}", "decoder": rf"(?:^|\.)decoder\.{BLOCK}"}
DEPTHS = {"encoder": ("encoder_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}


def student_of(
    teacher: PreTrainedModel, layers: Sequence[int] | dict[str, Sequence[int]], **fields: Any
) -> PreTrainedModel:
    """A student of the teacher's class, made of some of its layers.

    Args:
        layers: the teacher's blocks, counted from 0, in order; DistilBERT's are 0, 2, 4, 7, 9, 11 of 12. Of a model
            with an encoder and a decoder, {stack: blocks}; a stack that is not named stays whole.
        fields: of the configuration that differ from the teacher's, say ``type_vocab_size=0``; not widths.

    Raises:
        ValueError: a layer does not exist, or the widths differ.
    """
    config = copy.deepcopy(teacher.config)
    chosen = layers if isinstance(layers, dict) else {"": layers}
    for stack, blocks in chosen.items():
        names = DEPTHS.get(stack, ("num_hidden_layers",))
        setattr(config, next((n for n in names if hasattr(config, n)), names[0]), len(blocks))
    student = type(teacher)(type(config)(**{**config.to_dict(), **fields}))
    copy_layers(student, teacher, chosen)
    return student


def copy_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Sequence[int] | dict[str, Sequence[int]],
    truncate_width: bool = False,
) -> list[str]:
    """Give a student the weights of some of the teacher's layers, and those of all that is not in a layer.

    Args:
        student, teacher: whose weights have the same names; a model of transformers is first loaded as one of ours.
        layers: see `student_of`.
        truncate_width: of wider weights take the first rows and columns. What they compute together is lost by that,
            so it has to be asked for.

    Returns:
        The names of the student's weights that the teacher has none for.

    Raises:
        ValueError: a layer does not exist, or is one too many or few; a width differs; or the teacher has nothing for
            the student's layers.
    """
    chosen = layers if isinstance(layers, dict) else {"": layers}
    source = teacher.state_dict()
    ours = student.state_dict()
    for stack, blocks in chosen.items():
        check_depth(stack, blocks, ours, source)
    fresh, taken = [], {}
    for name, own in ours.items():
        origin = origin_of(name, chosen)
        if origin not in source:
            fresh.append(name)
            continue
        taken[name] = fitted(name, source[origin], own, truncate_width)
    if not any(block_of(name, stack) is not None for name in taken for stack in chosen):
        raise ValueError(
            f"the weights of {type(teacher).__name__} have other names than those of {type(student).__name__}: load "
            "the teacher as the student's class"
        )
    student.load_state_dict(taken, strict=False)
    return fresh


def block_of(name: str, stack: str) -> re.Match | None:
    """Where the name of a weight has the number of its block in a stack."""
    return re.search(STACKS[stack], name)


def check_depth(stack: str, blocks: Sequence[int], student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """See `copy_layers`."""
    if stack not in STACKS:
        raise ValueError(f'stack must be one of {", ".join(STACKS)}, got "{stack}"')
    ours, theirs = (
        1 + max((int(found[1]) for name in state if (found := block_of(name, stack))), default=-1)
        for state in (student, teacher)
    )
    where = f" of the {stack}" if stack else ""
    if len(blocks) != ours:
        raise ValueError(f"layers{where} must be {ours}, one for each of the student's, got {len(blocks)}")
    for block in blocks:
        if not 0 <= block < theirs:
            raise ValueError(f"layers{where} must be in [0, {theirs}), the teacher's, got {block}")


def origin_of(name: str, layers: dict[str, Sequence[int]]) -> str:
    """The teacher's name of a student's weight."""
    for stack, blocks in layers.items():
        if found := block_of(name, stack):
            return f"{name[: found.start(1)]}{blocks[int(found[1])]}{name[found.end(1) :]}"
    return name


def fitted(name: str, given: Tensor, own: Tensor, truncate: bool) -> Tensor:
    """A teacher's weight in the shape of the student's."""
    if given.shape == own.shape:
        return given
    smaller = given.ndim == own.ndim and all(a <= b for a, b in zip(own.shape, given.shape, strict=True))
    if not (truncate and smaller):
        raise ValueError(
            f"{name} is {tuple(own.shape)} for the student and {tuple(given.shape)} for the teacher: widths must be "
            "the same" + (", or truncate_width=True takes the first rows and columns" if smaller else "")
        )
    return given[tuple(slice(side) for side in own.shape)]


class Distilled(nn.Module):
    """A student with the learned projections between it and its teacher; what the loop trains as its model.

    In the end the student alone is saved. What one term compares in several layers goes through one projection, as in
    TinyBERT (arXiv:1909.10351, equations 8 and 9).

    Args:
        student: on which `lessons` were planned.
        lessons: see `plan.plan`.
    """

    def __init__(self, student: PreTrainedModel, lessons: Sequence[Lesson]):
        super().__init__()
        self.student, self.lessons = student, tuple(lessons)
        self.names = signals_of(lessons, "student")
        widths = {lesson.name: lesson.widths for lesson in lessons if lesson.widths}
        self.projections = nn.ModuleDict({name: nn.Linear(*pair, bias=False) for name, pair in widths.items()})
        for projection in self.projections.values():
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # states keep their size

    @property
    def config(self):
        """The student's."""
        return self.student.config

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """See transformers.

        Raises:
            ValueError: attention scores are compared: they are formed in the forward pass alone, and a layer that runs
                again in the backward pass would form others.
        """
        if any(parts(name)[1] == SCORE for name in self.names):
            raise ValueError("gradient_checkpointing does not work with terms on attention: turn one of them off")
        self.student.gradient_checkpointing_enable(**kwargs)

    def forward(self, inputs: dict[str, Any], places: Tensor | None = None) -> tuple[Signals, ModelOutput]:
        """Run the student.

        Args:
            inputs, places: see `collect`.

        Returns:
            its signals, projected ones under `Lesson.projected`; and its output.
        """
        signals, output = collect(self.student, inputs, self.names, places)
        for lesson in self.lessons:
            if lesson.widths:
                projection = self.projections[lesson.name]
                for name, _ in lesson.pairs:
                    signals[lesson.projected(name)] = project(projection, signals[name], parts(name)[1] == MAP)
        return signals, output


def project(projection: nn.Linear, states: Tensor, channels_first: bool) -> Tensor:
    """States (B, T, D), or maps (B, D, h, w), of the student in the teacher's width."""
    return projection(states.movedim(1, -1)).movedim(-1, 1) if channels_first else projection(states)


def freeze_unused(accelerator: Accelerator, task: Any, model: nn.Module, batch: Any) -> list[str]:
    """Freeze what a loss does not reach, say the classifier where only inner layers are compared.

    Data-parallel training waits for the gradient of every weight that learns; and one without would still decay.

    Args:
        task: gives the losses.
        model: not prepared yet.
        batch: one that counts, as the task's ``collate`` gives it.

    Returns:
        The names of the frozen weights.

    Raises:
        ValueError: the loss reaches no weight.
    """
    model.to(accelerator.device)
    sum(task.losses(model, send_to_device(batch, accelerator.device)).values()).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, parameter in learning.items() if parameter.grad is None]
    if len(unused) == len(learning):
        raise ValueError("the loss reaches no weight of the student")
    for name in unused:
        learning[name].requires_grad_(False)
    model.zero_grad()
    return unused
