"""Structured pruning: attention heads, neurons of feed-forward layers, and whole blocks are really removed.

batches -> |d loss / d gate| of each unit, averaged over samples -> least important units -> rows and columns removed

A gate multiplies the output of a head, or of a neuron; with all gates at 1 the model is unchanged, and a gate of 0
masks the unit (Michel et al. 2019, arXiv:1905.10650, equations 2 to 4).

Shapes: B samples; T tokens; L blocks; H heads; Dh features of a head; F neurons.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.compressed import LowRankLinear

FIELDS = {"heads": "layer_num_attention_heads", "neurons": "layer_intermediate_sizes"}


def require_field(model: PreTrainedModel, name: str, what: str) -> None:
    """Check that a configuration can describe a compressed model.

    Args:
        name: of the field.
        what: what is done to the model, for the error.

    Raises:
        ValueError: it has no such field.
    """
    if name not in {field.name for field in fields(model.config)}:
        raise ValueError(
            f"{what}: a {model.config.model_type} model has no configuration field {name}; for transformers' BERT and "
            "ViT, run hf-tfm convert --to tfm first"
        )


class Blocks:
    """The blocks of an encoder, whose units can be removed.

    Raises:
        ValueError: the configuration of the model cannot describe blocks of different sizes.
    """

    def __init__(self, model: PreTrainedModel):
        require_field(model, FIELDS["heads"], "structured pruning")
        self.model, self.config = model, model.config
        self.layers: nn.ModuleList = model.base_model.layers

    def output(self, layer: nn.Module, unit: str) -> nn.Module:
        """Return the linear layer that reads the outputs of the units of a block."""
        return layer.self_attn.out_proj if unit == "heads" else layer.feed_forward.down_proj

    def inputs(self, layer: nn.Module, unit: str) -> list[tuple[nn.Module, str]]:
        """Return parents and names of the linear layers that compute the units of a block."""
        if unit == "heads":
            return [(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        return [(layer.feed_forward, "up_proj")]

    def size(self, unit: str) -> int:
        """Return the number of features of a unit."""
        return self.config.hidden_size // self.config.num_attention_heads if unit == "heads" else 1

    def counts(self, unit: str) -> list[int]:
        """Return the number of units of each block."""
        return [self.output(layer, unit).in_features // self.size(unit) for layer in self.layers]

    def remove(self, unit: str, kept: Sequence[Sequence[int]]) -> None:
        """Remove all units but some, in place.

        Args:
            kept: numbers of the units to keep, at least one, by block.
        """
        for layer, units in zip(self.layers, kept, strict=True):
            width = self.size(unit)
            features = torch.tensor([u * width + i for u in sorted(units) for i in range(width)])
            for parent, name in self.inputs(layer, unit):
                setattr(parent, name, with_outputs(getattr(parent, name), features))
            if unit == "heads":
                layer.self_attn.out_proj = with_inputs(layer.self_attn.out_proj, features)
            else:
                layer.feed_forward.down_proj = with_inputs(layer.feed_forward.down_proj, features)
        self.describe(unit)

    def describe(self, unit: str) -> None:
        """Write the sizes of the blocks to the configuration; feed-forward layers of equal size need no list."""
        counts = self.counts(unit)
        if unit == "neurons" and len(set(counts)) == 1:
            self.config.intermediate_size, self.config.layer_intermediate_sizes = counts[0], None
        elif unit == "heads" and set(counts) == {self.config.num_attention_heads}:
            self.config.layer_num_attention_heads = None
        else:
            setattr(self.config, FIELDS[unit], counts)


@torch.no_grad()
def with_outputs(layer: nn.Module, features: Tensor) -> nn.Module:
    """Return a linear layer with some of its outputs only."""
    if isinstance(layer, LowRankLinear):
        layer.up, layer.out_features = with_outputs(layer.up, features), len(features)
        return layer
    weight, bias = layer.weight[features], None if layer.bias is None else layer.bias[features]
    return linear_of(weight, bias)


@torch.no_grad()
def with_inputs(layer: nn.Module, features: Tensor) -> nn.Module:
    """Return a linear layer with some of its inputs only."""
    if isinstance(layer, LowRankLinear):
        layer.down, layer.in_features = with_inputs(layer.down, features), len(features)
        return layer
    return linear_of(layer.weight[:, features], layer.bias)


@torch.no_grad()
def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with a copy of these weights (out, in) and biases (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def drop_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Remove all blocks but some, in place.

    Args:
        keep: numbers of blocks to keep, in ascending order.

    Raises:
        ValueError: a block does not exist.
    """
    blocks, config = Blocks(model), model.config
    total = len(blocks.layers)
    if list(keep) != sorted(set(keep)) or not keep or not 0 <= keep[0] <= keep[-1] < total:
        raise ValueError(f"keep must be different numbers in ascending order in [0, {total - 1}], got {list(keep)}")
    model.base_model.layers = nn.ModuleList(blocks.layers[i] for i in keep)
    for i, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = i
    config.num_hidden_layers = len(keep)
    for name in FIELDS.values():
        if (values := getattr(config, name)) is not None:
            setattr(config, name, [values[i] for i in keep])
    if config.low_rank:
        config.low_rank = {
            new: rank for name, rank in config.low_rank.items() if (new := renumbered(name, keep)) is not None
        }
    if "stage_names" in config.__dict__:
        config.stage_names = config.stage_names[: len(keep) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def renumbered(name: str, keep: Sequence[int]) -> str | None:
    """Return the name of a module of a block after others are removed; None if it is removed."""
    found = re.match(r"layers\.(\d+)\.", name)
    if found is None:
        return name
    return f"layers.{keep.index(int(found[1]))}.{name[found.end() :]}" if int(found[1]) in keep else None


@contextmanager
def gated(model: PreTrainedModel, unit: str, gates: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Multiply the outputs of units by gates within this context.

    Args:
        gates: (block, input (B, ..., features) of the layer that reads the units) -> gates, (units,) or (B, units).
    """
    blocks = Blocks(model)
    width, hooks = blocks.size(unit), []

    def hook(i: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            factor = gates(i, args[0]).to(args[0].dtype).repeat_interleave(width, dim=-1)
            if factor.ndim == 2:
                factor = factor.view(factor.shape[0], *[1] * (args[0].ndim - 2), -1)
            return (args[0] * factor,)

        return multiply

    for i, layer in enumerate(blocks.layers):
        hooks.append(blocks.output(layer, unit).register_forward_pre_hook(hook(i)))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class Importance:
    """Importance of units: the mean over samples of |d loss / d gate|.

    Args:
        unit: "heads" or "neurons".
    """

    def __init__(self, model: PreTrainedModel, unit: str):
        self.model, self.unit = model, unit

    def measure(
        self,
        loss: Callable[[nn.Module, Any], dict[str, Tensor]],
        batches: Iterable[Any],
        reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> list[Tensor]:
        """Return the importance of the units of each block, (units,) float64.

        The gates of every sample are tensors of their own, so that one backward pass gives the derivatives of all
        samples.

        Args:
            loss: (model, batch) -> {term: sum over items}; that of a sample must not depend on other samples.
            batches: of samples, at least one.
            reduce: sums a tensor over all processes.

        Raises:
            ValueError: there is no batch.
        """
        counts = Blocks(self.model).counts(self.unit)
        totals = [torch.zeros(count, dtype=torch.float64) for count in counts]
        samples, training = 0, self.model.training
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            for batch in batches:
                made: dict[int, Tensor] = {}

                def gates(i: int, states: Tensor, made: dict[int, Tensor] = made) -> Tensor:
                    made[i] = states.new_ones(states.shape[0], counts[i]).requires_grad_(True)
                    return made[i]

                with torch.enable_grad(), gated(self.model, self.unit, gates):
                    total = sum(loss(self.model, batch).values())
                found = torch.autograd.grad(total, [made[i] for i in range(len(counts))])
                for one, gradient in zip(totals, found, strict=True):
                    one += gradient.detach().abs().double().sum(0).cpu()
                samples += len(made[0])
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            self.model.train(training)
        count_last = torch.cat([*totals, torch.tensor([float(samples)], dtype=torch.float64)])
        device = next(self.model.parameters()).device
        *found, count = reduce(count_last.float().to(device)).cpu().double().split([*counts, 1])
        if not count:
            raise ValueError("importance needs at least one batch")
        return [value / count for value in found]


def kept_of(importance: Sequence[Tensor], left: int, scope: str, round_to: int = 1) -> list[list[int]]:
    """Choose the units to keep, those of the largest importance.

    Args:
        importance: (units,) of each block.
        left: number of units to keep in all blocks together.
        scope: "model" or "layer", see `methods.Removal`.
        round_to: see `methods.Removal`.

    Returns:
        Their numbers, ascending, by block; at least one of each.
    """
    total = sum(len(values) for values in importance)
    orders = [values.argsort(descending=True, stable=True).tolist() for values in importance]
    if scope == "layer":
        counts = [max(1, round(len(values) * left / total)) for values in importance]
    else:
        scaled = [values / values.norm().clamp_min(1e-30) for values in importance]
        # Every block keeps its best unit; the others compete.
        rest = sorted(
            ((scaled[i][unit].item(), i) for i, order in enumerate(orders) for unit in order[1:]), reverse=True
        )
        counts = [1] * len(importance)
        for _, i in rest[: max(0, left - len(counts))]:
            counts[i] += 1
    if round_to > 1:
        counts = [
            min(len(values), max(1, round(count / round_to)) * round_to)
            for count, values in zip(counts, importance, strict=True)
        ]
    return [sorted(order[:count]) for order, count in zip(orders, counts, strict=True)]
