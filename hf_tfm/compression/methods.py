"""Compression methods: how each is written, and what it does to a model.

[{name: heads, ratio: 0.5}, int8] -> methods, applied in this order and in place -> configuration of the result

Methods that measure importance need the loss of a task on some batches, see `Calibration`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.compressed import INT8, quantize
from ..values import check_bounds, closest, conform_fields, shown
from .low_rank import factorize_model
from .masks import magnitude_masks
from .structured import Blocks, Importance, drop_layers, kept_of, require_field

Loss = Callable[[nn.Module, Any], dict[str, Tensor]]


@dataclass
class Calibration:
    """Data for methods that measure importance.

    Args:
        loss: (model, batch) -> {term: sum of losses}, as `Task.losses`.
        batches: on the device of the model; read once by each method.
        total: sums a tensor over all processes, which have different batches.
    """

    loss: Loss
    batches: Iterable[Any]
    total: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class Method:
    """A compression method with its options.

    Attributes:
        name: how users write it.
        place: methods are applied in ascending order of this number.
        needs_data: it measures importance.
    """

    name: ClassVar[str]
    place: ClassVar[int]
    needs_data: ClassVar[bool] = False

    def __post_init__(self):
        conform_fields(self)

    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """Compress a model in place; return what was done, for the report.

        Raises:
            ValueError: the model does not allow it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Layers(Method):
    """Removal of blocks (Sajjad et al. 2020, arXiv:2004.03844, section 3).

    Args:
        drop: top removes the last blocks; alternate every other one, from the top.
        count: number of blocks to remove; default, half of them.
        keep: numbers of the blocks to keep, counted from 0, in place of drop and count.
    """

    name, place = "layers", 0
    drop: Literal["top", "alternate"] = "top"
    count: int | None = None
    keep: list[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_bounds("count", self.count, 1)
        check_bounds("keep", self.keep, 0)
        if self.keep is not None and self.count is not None:
            raise ValueError(f"give either keep or count, got {self.keep} and {self.count}")

    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """See `Method`."""
        total = len(Blocks(model).layers)
        count = total // 2 if self.count is None else self.count
        if self.keep is not None:
            keep = self.keep
        elif not 0 < count < total:
            raise ValueError(f"count of layers must be in [1, {total - 1}] for a model of {total}, got {count}")
        elif self.drop == "top":
            keep = list(range(total - count))
        elif count > total // 2:
            raise ValueError(f'drop "alternate" removes at most {total // 2} of {total} layers, got count {count}')
        else:
            gone = {total - 1 - 2 * i for i in range(count)}
            keep = [i for i in range(total) if i not in gone]
        drop_layers(model, keep)
        return {"kept": keep}


@dataclass(frozen=True, kw_only=True)
class Removal(Method):
    """Removal of the least important units, by |d loss / d gate| (Michel et al. 2019, arXiv:1905.10650, section 4.1).

    Args:
        ratio: fraction of the units to remove, over all blocks.
        scope: model compares units of all blocks, whose importances are divided by their norm in each block; layer
            removes the same fraction of every block. Every block keeps at least one unit.
        rounds: number of rounds, after each of which the importance is measured again.
        round_to: the number of units left in each block is a multiple of this, which suits the kernels.
    """

    unit: ClassVar[str]
    needs_data = True
    ratio: float = 0.5
    scope: Literal["model", "layer"] = "model"
    rounds: int = 1
    round_to: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must be above 0 and below 1, got {self.ratio}")
        check_bounds("rounds", self.rounds, 1, 100)
        check_bounds("round_to", self.round_to, 1, 4096)

    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """See `Method`."""
        if data is None:
            raise ValueError(f'method "{self.name}" measures importance on data: give dataset_name')
        blocks = Blocks(model)
        before = blocks.counts(self.unit)
        for i in range(self.rounds):
            share = 1.0 - self.ratio * (i + 1) / self.rounds
            measured = Importance(model, self.unit).measure(data.loss, data.batches, data.total)
            left = round(share * sum(before))
            kept = kept_of(measured, left, self.scope, self.round_to if i == self.rounds - 1 else 1)
            blocks.remove(self.unit, kept)
        return {"left": blocks.counts(self.unit), "of": before}


@dataclass(frozen=True, kw_only=True)
class Heads(Removal):
    """Removal of attention heads, see `Removal`."""

    name, place, unit = "heads", 1, "heads"


@dataclass(frozen=True, kw_only=True)
class Neurons(Removal):
    """Removal of neurons of the feed-forward layers, see `Removal`."""

    name, place, unit = "neurons", 1, "neurons"


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Products of two matrices in place of one, by a truncated singular value decomposition.

    Args:
        modules: embedding, the word embeddings (Lan et al. 2020); linear, those of the blocks; or all.
        rank: rank of the products.
        ratio: rank as a fraction of the smaller side, in place of rank.
    """

    name, place = "low_rank", 2
    modules: Literal["embedding", "linear", "all"] = "embedding"
    rank: int | None = None
    ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.rank is None) == (self.ratio is None):
            raise ValueError(f"low_rank needs either rank or ratio, got {self.rank} and {self.ratio}")
        check_bounds("rank", self.rank, 1)
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")

    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """See `Method`."""
        ranks = factorize_model(model, self.modules, self.rank, self.ratio)
        return {"modules": len(ranks), "ranks": sorted(set(ranks.values()))}


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Weights of the smallest magnitude in all linear layers of the blocks are set to zero, at once.

    The recipe compress_train does this gradually, while the other weights are trained.

    Args:
        sparsity: fraction of zeros.
    """

    name, place = "magnitude", 3
    sparsity: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity must be above 0 and below 1, got {self.sparsity}")

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """See `Method`."""
        masks = magnitude_masks(model, self.sparsity)
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
        return {"sparsity": self.sparsity, "modules": len(masks)}


@dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """Weights of 8 bits with a scale of each row; on a CPU inputs are quantised dynamically.

    Args:
        layers: linear, or all with the embeddings.
    """

    name, place = "int8", 4
    layers: Literal["linear", "all"] = "all"

    def apply(self, model: PreTrainedModel, data: Calibration | None) -> dict[str, Any]:
        """See `Method`."""
        require_field(model, "int8", "int8")
        if model.config.int8 is not None:
            raise ValueError("int8: the model is quantised already")
        if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
            raise ValueError(f"int8: the output layer of {type(model).__name__} shares the weights of its embeddings")
        assert self.layers in INT8
        count = quantize(model, self.layers)
        if not count:
            raise ValueError(f"int8: {type(model).__name__} has no linear layer")
        model.config.int8 = self.layers
        return {"quantized layers": count}


@dataclass(frozen=True, kw_only=True)
class OnnxDynamic(Method):
    """ONNX Runtime with int8 weights; activations are quantised at run time. The folder holds model.onnx."""

    name, place = "onnx_dynamic", 5


@dataclass(frozen=True, kw_only=True)
class OnnxStatic(Method):
    """ONNX Runtime with int8 weights and activations, whose scales are measured on data. The folder holds model.onnx.

    Args:
        method: how the range of activations is measured, see onnxruntime's CalibrationMethod.
    """

    name, place, needs_data = "onnx_static", 5, True
    method: Literal["minmax", "entropy", "percentile"] = "minmax"


@dataclass(frozen=True, kw_only=True)
class Onnx(Method):
    """ONNX Runtime in float32. The folder holds model.onnx."""

    name, place = "onnx", 5


METHODS: dict[str, type[Method]] = {
    one.name: one for one in (Layers, Heads, Neurons, LowRank, Magnitude, Int8, Onnx, OnnxDynamic, OnnxStatic)
}
EXPORTS = (Onnx, OnnxDynamic, OnnxStatic)


def read_methods(given: Any, argument: str = "method", exports: bool = True) -> tuple[Method, ...]:
    """Read methods: a name, a mapping {name: ..., option: value}, or a list of these.

    Args:
        argument: name of the option, for errors.
        exports: accept those whose result is not a model of torch.

    Raises:
        ValueError: a name or an option is unknown, a value is invalid, or the order is not that of application.
    """
    items = given if isinstance(given, (list, tuple)) else [given]
    found = []
    known = [name for name, kind in METHODS.items() if exports or kind not in EXPORTS]
    for item in items:
        if isinstance(item, Method):
            found.append(item)
            continue
        options = {"name": item} if isinstance(item, str) else item
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise ValueError(f"{argument} must be names or mappings with a name, got {shown(item)}")
        name = options["name"]
        if name not in known:
            raise ValueError(f"{argument} must be among {', '.join(known)}, got {shown(name)}{closest(name, known)}")
        own = [field.name for field in fields(METHODS[name])]
        for option in options.keys() - {"name"}:
            if option not in own:
                has = f"has the options {', '.join(own)}" if own else "has no options"
                raise ValueError(f'{argument}: "{name}" {has}, got "{option}"{closest(option, own)}')
        try:
            found.append(METHODS[name](**{option: value for option, value in options.items() if option != "name"}))
        except ValueError as error:
            raise ValueError(f"{argument}: {name}: {error}") from error
    for first, second in pairwise(found):
        if first.place > second.place or (first.place == second.place and first.name == second.name):
            raise ValueError(
                f"{argument} must be in the order layers, heads or neurons, low_rank, magnitude, int8, onnx, each "
                f"once; {second.name} cannot follow {first.name}"
            )
        if isinstance(first, Int8) or (isinstance(first, EXPORTS) and isinstance(second, EXPORTS)):
            raise ValueError(f"{argument}: {second.name} cannot follow {first.name}")
    return tuple(found)


def apply_methods(
    model: PreTrainedModel, methods: Sequence[Method], data: Calibration | None = None
) -> list[dict[str, Any]]:
    """Compress a model in place; return what each method did, see `Method.apply`.

    Raises:
        ValueError: a method needs data, or the model does not allow it.
    """
    if model.config.__dict__.get("int8"):
        raise ValueError("the model has int8 weights, which cannot be compressed further: compress the original")
    done = []
    for method in methods:
        result = method.apply(model, data)
        options = {name: value for name, value in asdict(method).items() if value is not None}
        done.append({"name": method.name, **options, **result})
    return done


def describe(done: Sequence[dict[str, Any]]) -> str:
    """Return the names of methods as text, as they stand in tables and file names."""
    return " + ".join(one["name"] for one in done) or "original"
