"""Optimizer, learning-rate schedule, and weights averaged over training."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from .arguments import TrainingArguments

SCHEDULES = {
    "inverse_sqrt": "inverse_sqrt",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and vectors (biases, norms), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """Fused Adam or AdamW: one kernel, and it can leave out a step on the device's own word (see `train_step`)."""
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, args.weight_decay)
    return kind(groups, lr=args.learning_rate, betas=tuple(args.adam_betas), eps=args.adam_epsilon, fused=True)


def build_schedule(optimizer: Optimizer, args: TrainingArguments, num_steps: int) -> LRScheduler:
    """transformers' schedules; they scale ``learning_rate``, which is their highest value."""
    return get_scheduler(SCHEDULES[args.schedule], optimizer, args.warmup_steps, num_steps)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows its weights: ``ema = decay * ema + (1 - decay) * weights`` a step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def average_weights(checkpoints: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints (Vaswani et al. 2017, section 6.1), summed in float64.

    Raises:
        ValueError: there are none.
    """
    if not checkpoints:
        raise ValueError("there are no checkpoints to average")
    total: dict[str, Tensor] = {}
    for folder in checkpoints:
        for name, value in load_file(folder / "model.safetensors").items():
            total[name] = total[name].add_(value) if name in total else value.double()
    return {name: (value / len(checkpoints)).float() for name, value in total.items()}
