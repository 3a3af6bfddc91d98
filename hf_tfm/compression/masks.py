"""Gradual pruning of single weights during training: masks that grow by a cubic schedule.

step -> sparsity (Zhu and Gupta 2017, arXiv:1710.01878, equation 1) -> threshold of all scores -> weights * masks

A weight's score is its magnitude, or, in movement pruning (Sanh et al. 2020, arXiv:2005.07683, section 3), a parameter
that is trained with the gradient of the mask passed straight through: d loss / d score = d loss / d (weight * mask) *
weight. Masks and scores are part of the model's state, so checkpoints hold them and runs resume exactly.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BLOCK = re.compile(r"(?:^|\.)layers?\.\d+\.")
METHODS = ("magnitude", "movement")


def prunable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks of a model, of any family, by name.

    Raises:
        ValueError: there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and BLOCK.search(f"{name}.")
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with linear layers to prune")
    return found


def threshold(scores: Mapping[str, Tensor], sparsity: float) -> float:
    """Return the number that a fraction ``sparsity`` of all scores does not exceed."""
    every = torch.cat([value.detach().flatten().float() for value in scores.values()])
    count = round(sparsity * every.numel())
    return -torch.inf if count == 0 else every.kthvalue(count).values.item()


def masks_of(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return masks, True for the weights to keep, by which a fraction ``sparsity`` of all weights is 0."""
    limit = threshold(scores, sparsity)
    return {name: value.detach().float() > limit for name, value in scores.items()}


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Return `masks_of` the magnitudes of the weights of all `prunable` layers."""
    return masks_of({name: module.weight.abs() for name, module in prunable(model).items()}, sparsity)


class StraightThrough(torch.autograd.Function):
    """``weight * mask``; the scores get the gradient that the mask would have."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


class Mask(nn.Module):
    """Parametrization of a weight: multiplied by a mask.

    Args:
        weight: (M, N).
        trained: keep a trained score of each weight (movement pruning); otherwise its magnitude is the score.
    """

    def __init__(self, weight: Tensor, trained: bool):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.scores = nn.Parameter(torch.zeros_like(weight)) if trained else None

    def forward(self, weight: Tensor) -> Tensor:
        """(M, N) -> (M, N)."""
        if self.scores is None:
            return weight * self.mask
        return StraightThrough.apply(weight, self.scores, self.mask)


class Pruner:
    """Prunes the linear layers of a model's blocks while it is trained; a callback of `training.session.train`.

    Args:
        model: gets the parametrizations.
        method: one of `METHODS`.
        sparsity: final fraction of zeros.
        interval: steps between two updates of the masks.
    """

    def __init__(self, model: nn.Module, method: str, sparsity: float, interval: int):
        self.sparsity, self.interval = sparsity, interval
        self.begin, self.end = 0, 1
        self.layers = prunable(model)
        for layer in self.layers.values():
            parametrize.register_parametrization(layer, "weight", Mask(layer.weight, method == "movement"))

    def schedule(self, begin: int, end: int) -> None:
        """Set the first step with a mask, and the step from which on the sparsity is final."""
        self.begin, self.end = begin, max(end, begin + 1)

    def sparsity_at(self, step: int) -> float:
        """Return the fraction of zeros in training step ``step``, counted from 0."""
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.sparsity * (1.0 - (1.0 - progress) ** 3)

    def before_step(self, step: int) -> None:
        """Update the masks if it is time to.

        Args:
            step: number of completed steps.
        """
        due = step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.interval == 0)
        if not due:
            return
        scores = {}
        for name, layer in self.layers.items():
            scores[name] = self.own(layer).scores
            if scores[name] is None:
                scores[name] = layer.parametrizations.weight.original.detach().abs()
        for name, mask in masks_of(scores, self.sparsity_at(step)).items():
            self.own(self.layers[name]).mask.copy_(mask)

    def may_select(self, step: int) -> bool:
        """Return True if the weights after ``step`` steps may be the best ones: their sparsity is final."""
        return step > self.end

    @staticmethod
    def own(layer: nn.Module) -> Mask:
        """Return the parametrization of a layer."""
        return layer.parametrizations.weight[0]

    def measured(self) -> float:
        """Return the fraction of zeros in the masks."""
        masks = [self.own(layer).mask for layer in self.layers.values()]
        return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def bake(self) -> None:
        """Replace the parametrizations by the masked weights."""
        for layer in self.layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
