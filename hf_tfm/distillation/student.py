"""Students: initialised from some of a teacher's layers, and wrapped with the projections to the teacher's width.

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

from .resolve import ResolvedTerm, signals_of
from .signals import MAP, SCORE, Signals, collect, parts

# Position of the block number in a weight's name, by stack; "" is the only stack of a single-stack model.
BLOCK = r"(?:layers|layer|h|blocks|block)\.(\d+)\."
STACKS = {"": rf"(?:^|\.){BLOCK}", "encoder": rf"(?:^|\.)encoder\.{BLOCK}", "decoder": rf"(?:^|\.)decoder\.{BLOCK}"}
# Position of the number in a weight's name, for detectors with a head of their own for each decoder layer, and in two
# stages one more for the encoder.
HEADS = r"(?:^|\.)(?:class_embed|bbox_embed)\.(\d+)\."
DEPTHS = {"encoder": ("encoder_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}


def student_of(
    teacher: PreTrainedModel, layers: Sequence[int] | dict[str, Sequence[int]], **fields: Any
) -> PreTrainedModel:
    """Create a student of the teacher's class from some of the teacher's layers.

    Args:
        layers: indices of the teacher's blocks, from 0, in order; DistilBERT uses 0, 2, 4, 7, 9, 11 of 12. For an
            encoder-decoder model, {stack: blocks}; a stack that is not named is copied whole.
        fields: configuration fields that differ from the teacher's, for example ``type_vocab_size=0``; not widths.

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
    """Copy the weights of some of the teacher's layers, and all weights outside layers, into a student.

    Args:
        student, teacher: must have the same weight names; load a transformers model as one of this package's first.
        layers: see `student_of`.
        truncate_width: copy the first rows and columns of wider weights. This destroys the function they compute
            together, so it is off by default.

    Returns:
        The names of the student's weights that the teacher does not have.

    Raises:
        ValueError: a layer does not exist, the number of layers is wrong, a width differs, or the teacher has no
            weights for the student's layers.
    """
    chosen = layers if isinstance(layers, dict) else {"": layers}
    source = teacher.state_dict()
    ours = student.state_dict()
    for stack, blocks in chosen.items():
        check_depth(stack, blocks, ours, source)
    depth = count(STACKS["decoder"], source) if count(HEADS, source) > 1 else None
    fresh, taken = [], {}
    for name, own in ours.items():
        origin = origin_of(name, chosen, depth)
        if origin not in source:
            fresh.append(name)
            continue
        taken[name] = fitted(name, source[origin], own, truncate_width)
    if not any(block_of(name, stack) is not None for name in taken for stack in chosen):
        raise ValueError(
            f"the weights of {type(teacher).__name__} have different names than those of {type(student).__name__}: "
            "load the teacher as the student's class"
        )
    student.load_state_dict(taken, strict=False)
    return fresh


def block_of(name: str, stack: str) -> re.Match | None:
    """Find the block number in the name of a weight of a stack; a backbone belongs to none, whatever its names are."""
    return None if ".backbone." in f".{name}" else re.search(STACKS[stack], name)


def check_depth(stack: str, blocks: Sequence[int], student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """Check the number of layers and their indices, see `copy_layers`."""
    if stack not in STACKS:
        raise ValueError(f'stack must be one of {", ".join(STACKS)}, got "{stack}"')
    ours, theirs = (count(STACKS[stack], state) for state in (student, teacher))
    where = f" of the {stack}" if stack else ""
    if len(blocks) != ours:
        raise ValueError(f"layers{where} must be {ours}, one for each of the student's, got {len(blocks)}")
    for block in blocks:
        if not 0 <= block < theirs:
            raise ValueError(
                f"layers{where} must be in [0, {theirs}), the number of the teacher's layers, got {block}"
            )


def count(pattern: str, state: dict[str, Tensor]) -> int:
    """Return how many numbered modules have weights whose name matches the pattern."""
    return 1 + max((int(found[1]) for name in state if (found := re.search(pattern, name))), default=-1)


def origin_of(name: str, layers: dict[str, Sequence[int]], depth: int | None = None) -> str:
    """Return the teacher's name for a student's weight.

    Args:
        layers: see `student_of`.
        depth: number of the teacher's decoder layers, if each has a head of its own, see `HEADS`.
    """
    for stack, blocks in layers.items():
        if found := block_of(name, stack):
            return renumbered(name, found, blocks[int(found[1])])
    if depth is not None and "decoder" in layers and (found := re.search(HEADS, name)):
        number, blocks = int(found[1]), layers["decoder"]
        return renumbered(name, found, blocks[number] if number < len(blocks) else depth + number - len(blocks))
    return name


def renumbered(name: str, found: re.Match, number: int) -> str:
    """Return a name with another number at the group of a match."""
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"


def fitted(name: str, given: Tensor, own: Tensor, truncate: bool) -> Tensor:
    """Return a teacher's weight in the shape of the student's."""
    if given.shape == own.shape:
        return given
    smaller = given.ndim == own.ndim and all(a <= b for a, b in zip(own.shape, given.shape, strict=True))
    if not (truncate and smaller):
        raise ValueError(
            f"{name} is {tuple(own.shape)} for the student and {tuple(given.shape)} for the teacher: widths must be "
            "the same" + (", or truncate_width=True takes the first rows and columns" if smaller else "")
        )
    return given[tuple(slice(side) for side in own.shape)]


class StudentWithProjections(nn.Module):
    """A student with the trainable projections to its teacher's width; the model that the training loop optimises.

    Only the student is saved at the end. All layer pairs of a term share one projection, as in TinyBERT
    (arXiv:1909.10351, equations 8 and 9).

    Args:
        student: model for which `terms` were planned.
        terms: see `resolve.resolve_terms`.
    """

    def __init__(self, student: PreTrainedModel, terms: Sequence[ResolvedTerm]):
        super().__init__()
        self.student, self.terms = student, tuple(terms)
        self.names = signals_of(terms, "student")
        widths = {term.name: term.widths for term in terms if term.widths}
        self.projections = nn.ModuleDict({name: nn.Linear(*pair, bias=False) for name, pair in widths.items()})
        for projection in self.projections.values():
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # preserves the scale of the states

    @property
    def config(self):
        """Configuration of the student."""
        return self.student.config

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Enable gradient checkpointing of the student, see transformers.

        Raises:
            ValueError: attention scores are compared. They are recorded in the forward pass, and recomputation in the
                backward pass would create different ones.
        """
        if any(parts(name)[1] == SCORE for name in self.names):
            raise ValueError("gradient_checkpointing does not work with terms on attention: turn one of them off")
        self.student.gradient_checkpointing_enable(**kwargs)

    def forward(self, inputs: dict[str, Any], positions: Tensor | None = None) -> tuple[Signals, ModelOutput]:
        """Run the student.

        Args:
            inputs, positions: see `collect`.

        Returns:
            its signals, with projected ones named by `ResolvedTerm.projected`; and its output.
        """
        signals, output = collect(self.student, inputs, self.names, positions)
        for term in self.terms:
            if term.widths:
                projection = self.projections[term.name]
                for name, _ in term.pairs:
                    signals[term.projected(name)] = project(projection, signals[name], parts(name)[1] == MAP)
        return signals, output


def project(projection: nn.Linear, states: Tensor, channels_first: bool) -> Tensor:
    """Project states (B, T, D), or feature maps (B, D, h, w), of the student to the teacher's width."""
    return projection(states.movedim(1, -1)).movedim(-1, 1) if channels_first else projection(states)


def freeze_unused(accelerator: Accelerator, task: Any, model: nn.Module, batch: Any) -> list[str]:
    """Freeze parameters that the loss does not reach, such as the classifier if only hidden layers are compared.

    Distributed data parallel waits for the gradient of every trainable parameter, and weight decay would still shrink
    parameters without a gradient.

    Args:
        task: computes the losses.
        model: not prepared yet.
        batch: a non-empty batch from the task's ``collate``.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: the loss reaches no parameter.
    """
    model.to(accelerator.device)
    sum(task.losses(model, send_to_device(batch, accelerator.device)).values()).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, parameter in trainable.items() if parameter.grad is None]
    if len(unused) == len(trainable):
        raise ValueError("the loss does not depend on any weight of the student")
    for name in unused:
        trainable[name].requires_grad_(False)
    model.zero_grad()
    return unused
