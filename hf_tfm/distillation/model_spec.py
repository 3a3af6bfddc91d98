"""Model properties that distillation depends on; small enough to be stored in a cache's index."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.class_scoring import scoring_name
from .signals import timm_blocks

# Texts for comparing tokenizers: they cover case, accents, numbers, punctuation and unknown characters.
PROBES = ("The café's  10,000 QUESTIONS — aren't they\tfunny?", "naïve don't\n日本語 🙂 x_1=3.14")

CLASSIFIERS = ("class_labels_classifier", "class_embed")  # names of modules in detectors of transformers


@dataclass(frozen=True)
class StackSpec:
    """Number of layers, hidden size and attention heads of a stack of blocks."""

    layers: int
    width: int
    heads: int | None


@dataclass(frozen=True)
class ModelSpec:
    """Model properties that distillation depends on.

    Args:
        kind: class name of the model.
        stacks: stacks of blocks by name; "" is the only stack of a single-stack model.
        outputs: logits per row: vocabulary size, or classes (for a detector with "softmax" scoring, including "no
            object"); None without a head.
        labels: class names; None if there are no classes or the names are placeholders.
        queries: object queries of a detector, or None.
        scoring: how a detector scores classes, a name of `SCORINGS`; None for other models.
        widths: output channels of the modules that produce feature maps, by module name.
    """

    kind: str
    stacks: dict[str, StackSpec]
    outputs: int | None = None
    labels: tuple[str, ...] | None = None
    queries: int | None = None
    scoring: str | None = None
    widths: dict[str, int] = field(default_factory=dict)

    def stack(self, name: str, side: str) -> StackSpec:
        """Return a stack by name.

        Raises:
            ValueError: the model has no such stack.
        """
        if name not in self.stacks:
            known = ", ".join(f'"{stack}"' for stack in self.stacks) or "none that is known"
            raise ValueError(f'stack "{name}" is not one of the {side}, a {self.kind}; it has {known}')
        return self.stacks[name]

    def channels(self, module: str, side: str) -> int:
        """Return the number of output channels of a module.

        Raises:
            ValueError: there is no such module, or its number of channels is unknown.
        """
        if module not in self.widths:
            raise ValueError(
                f'"{module}" of the {side}, a {self.kind}, is not a module with a known number of output '
                "channels, such as a convolution or a norm"
            )
        return self.widths[module]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "ModelSpec":
        """Rebuild from the output of `to_json`."""
        labels = None if given["labels"] is None else tuple(given["labels"])
        stacks = {name: StackSpec(**stack) for name, stack in given["stacks"].items()}
        return cls(**{**given, "labels": labels, "stacks": stacks})


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """Collect the properties of a model."""
    config = model.config
    detects = "Detection" in type(model).__name__ or "Segmentation" in type(model).__name__
    queries = getattr(config, "num_queries", None) if detects else None
    outputs = count_outputs(model, queries)
    return ModelSpec(
        kind=type(model).__name__,
        stacks=stacks_of(model),
        outputs=outputs,
        labels=label_names(config) if has_classes(model) else None,
        queries=queries,
        scoring=None if queries is None or outputs is None else scoring_name(config, outputs),
        widths={name: width for name, module in model.named_modules() if (width := width_of(module))},
    )


def stacks_of(model: PreTrainedModel) -> dict[str, StackSpec]:
    """Return every stack of blocks by name."""
    config, blocks = model.config, timm_blocks(model)
    if blocks is not None:
        return {"": StackSpec(len(blocks), model.timm_model.num_features, None)}
    width = getattr(config, "hidden_size", None)
    if width is None:
        return {}
    heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "layer_num_attention_heads", None):
        heads = None  # they differ between blocks, so maps of attention cannot be compared
    if isinstance(heads, (list, tuple)):  # a hierarchical model: stages of different widths are no stack
        return {}
    if not getattr(config, "is_encoder_decoder", False):
        layers = getattr(config, "num_hidden_layers", None)
        return {} if layers is None else {"": StackSpec(layers, width, heads)}
    found = {}
    for name in ("encoder", "decoder"):
        layers = getattr(config, f"{name}_layers", None) or getattr(config, f"num_{name}_layers", None)
        if layers is not None:
            found[name] = StackSpec(layers, width, getattr(config, f"{name}_attention_heads", heads))
    return found


def has_classes(model: PreTrainedModel) -> bool:
    """Return True if the model predicts classes."""
    return any(part in type(model).__name__ for part in ("Classification", "Detection", "Segmentation"))


def count_outputs(model: PreTrainedModel, queries: int | None) -> int | None:
    """Return the number of logits per row, see `ModelSpec.outputs`."""
    if (head := model.get_output_embeddings()) is not None:
        return head.weight.shape[0]
    if not has_classes(model):
        return None
    names = {*getattr(model, "classifier_modules", CLASSIFIERS)}  # the attribute of a detector of this package
    for name, module in model.named_modules() if queries else ():
        if isinstance(module, nn.Linear) and not names.isdisjoint(name.split(".")):
            return module.out_features
    return model.config.num_labels + (1 if queries else 0)


def label_names(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """Return class names in order; None if they are transformers' placeholders (LABEL_0, LABEL_1, ...)."""
    if set(config.id2label) != set(range(config.num_labels)):  # of a model without classes
        return None
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return None if names == tuple(f"LABEL_{i}" for i in range(config.num_labels)) else names


def width_of(module: nn.Module) -> int | None:
    """Return the number of output channels of a convolution or norm; None for other modules."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features
    return module.num_channels if isinstance(module, nn.GroupNorm) else None


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose tokenizer differs from the student's.

    Raises:
        ValueError: reports the first difference.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items())[0]
        raise ValueError(
            f"student and teacher must have the same tokenizer, got {len(ours)} and {len(theirs)} tokens; "
            f'"{token}" is {ours.get(token)} for the student, {theirs.get(token)} for the teacher'
        )
    for text in PROBES:
        if (mine := student(text)["input_ids"]) != (other := teacher(text)["input_ids"]):
            raise ValueError(
                f"student and teacher must have the same tokenizer, got {student.convert_ids_to_tokens(mine)} and "
                f"{teacher.convert_ids_to_tokens(other)} for {text!r}"
            )


def check_processors(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose image processor resizes or normalises differently from the student's.

    Raises:
        ValueError: reports the first difference.
    """
    fields = ("size", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize")
    for name in (*fields, "image_mean", "image_std"):
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours != theirs and not (name == "crop_size" and not student.do_center_crop):
            raise ValueError(
                f"student and teacher must have the same {name} in their image processors, got {ours} and {theirs}"
            )
