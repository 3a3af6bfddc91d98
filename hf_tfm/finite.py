"""Models whose weights are no numbers are refused."""

import torch
from torch import nn


@torch.no_grad()
def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first saved weight with a value that is infinite or not a number; None if all are finite.

    Weights without data (meta device) are passed over. The host waits once for each device.
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
    """Refuse a model with a weight that is infinite or not a number.

    Args:
        what: the model, for the error, say 'model_name_or_path "runs/vit"'.

    Raises:
        ValueError: there is one; the message names it.
    """
    if name := first_not_finite(model):
        raise ValueError(f"{what} has weights that are not finite: {name} is the first")
