"""Detect models with infinite or NaN weights."""

import torch
from torch import nn


@torch.no_grad()
def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first saved weight with an infinite or NaN value; None if all are finite.

    Weights on the meta device are skipped. Synchronises with each device once.
    """
    named = [(n, value) for n, value in model.state_dict().items() if value.is_floating_point() and not value.is_meta]
    for device in dict.fromkeys(value.device for _, value in named):
        own = [(name, value) for name, value in named if value.device == device]
        finite = torch.stack([torch.isfinite(value).all() for _, value in own]).tolist()
        for (name, _), good in zip(own, finite, strict=True):
            if not good:
                return name
    return None


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with infinite or NaN weights.

    Args:
        what: description of the model for the error, for example 'model_name_or_path "runs/vit"'.

    Raises:
        ValueError: a weight is not finite; the message names it.
    """
    if name := first_not_finite(model):
        raise ValueError(f"{what} has weights that are not finite: {name} is the first")
