"""Optimizer, learning-rate schedule, EMA and checkpoint averaging."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, get_scheduler

from ..arguments import TrainingArguments
from .checkpoint import read_weights

SCHEDULES = {  # names in transformers
    "inverse_sqrt": "inverse_sqrt",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}
# Stage and block of a hierarchical model, in the name of a parameter.
NESTED = re.compile(r"(?:^|\.)layers\.(\d+)\.blocks\.(\d+)\.")
# Backbone of a detector, and blocks whose numbers start again in every stage.
IN_BACKBONE = re.compile(r"(?:^|\.)backbone\.body\.")
STAGED = re.compile(r"(?:^|\.)stages\.\d+\.(?:\w+\.)*layers?\.\d+\.")


def layer_id(name: str) -> float:
    """Return the layer id of a parameter: 0 for embeddings; 1, 2, ... for blocks; infinity above the blocks."""
    if "bbox_" in name:  # box heads number their own linear layers
        return math.inf
    if block := re.search(r"(?:^|\.)(?:layers?|h)\.(\d+)\.", name):
        return 1 + int(block[1])
    # GPT names its embeddings wte and wpe, and encoder-decoder models the shared one of both sides "shared".
    return 0 if re.search(r"embedding|distillation_token|(?:^|\.)(?:w[tp]e|shared)\.", name) else math.inf


def layer_ids(names: Iterable[str]) -> dict[str, float]:
    """Return {name: layer id} of all parameters of a model.

    Blocks of a hierarchical model, such as ``layers.2.blocks.5`` of Swin, are numbered through all stages, and what
    follows the blocks of a stage has the number of its last block; for other models see `layer_id`.

    If the backbone of a detector has blocks, they are the layers, and all that is outside of the backbone is above
    them, as in ViTDet (Li et al. 2022, arXiv:2203.16527, appendix A.2).
    """
    names = list(names)
    inside = [name for name in names if IN_BACKBONE.search(name)]
    if any(0 < layer_id(name) < math.inf for name in inside) and len(inside) < len(names):
        return {**dict.fromkeys(names, math.inf), **layer_ids(inside)}
    nested = {name: (int(found[1]), int(found[2])) for name in names if (found := NESTED.search(name))}
    numbers = {block: 1 + i for i, block in enumerate(sorted(set(nested.values())))}
    last: dict[float, int] = {}  # by stage
    for (stage, _), number in numbers.items():
        last[1 + stage] = max(number, last.get(1 + stage, 0))
    ids = {name: layer_id(name) for name in names}
    return {name: numbers[nested[name]] if name in nested else last.get(ids[name], ids[name]) for name in names}


def check_layers(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Refuse ``layer_wise_lr_decay`` for a model whose parameter names do not identify its layers, see `layer_ids`.

    Raises:
        ValueError: no parameter belongs to a block, or an embedding of tokens does not have layer id 0.
    """
    if args.layer_wise_lr_decay == 1.0:
        return
    names = [name for name, _ in model.named_parameters()]
    ids = layer_ids(names)
    tokens = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == getattr(model.config, "vocab_size", None)
    }
    blocks = any(0 < layer < math.inf for layer in ids.values())
    if not blocks or any(ids.get(name, 0) for name in tokens) or any(STAGED.search(name) for name in names):
        found = getattr(model.config, "backbone_config", None)
        backbone = f" with a {found['model_type']} backbone" if found else ""
        raise ValueError(
            f"layer_wise_lr_decay must be 1 for a {model.config.model_type} model{backbone}, got "
            f"{args.layer_wise_lr_decay}"
        )


def parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict]:
    """Group parameters by weight decay and learning rate.

    Weight decay applies to weight matrices of layers, not to vectors (biases, norms), positions and single tokens.
    With ``layer_wise_lr_decay`` d and N blocks, the learning rate is multiplied by 1 above the blocks, by
    ``d ** (N + 1 - i)`` in block i of 1..N, and by ``d ** (N + 1)`` in embeddings (Clark et al. 2020,
    arXiv:2003.10555; He et al. 2021, table 9). ``rate_factors`` multiply this.

    Raises:
        ValueError: a key of ``rate_factors`` occurs in no parameter name.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ids = layer_ids(name for name, _ in named)
    top = 1 + max((layer for layer in ids.values() if layer < math.inf), default=0)
    groups: dict[tuple[float, float], list] = {}
    if unknown := [part for part in args.rate_factors if not any(part in name for name in ids)]:
        raise ValueError(f"rate_factors: no trained weight has {unknown[0]} in its name")
    for name, parameter in named:
        decays = parameter.ndim >= 2 and name.endswith(("weight", "weight.original"))  # the latter: being pruned
        scale = args.layer_wise_lr_decay ** (top - min(ids[name], top))
        scale *= math.prod(factor for part, factor in args.rate_factors.items() if part in name)
        groups.setdefault((args.weight_decay * decays, args.learning_rate * scale), []).append(parameter)
    return [{"params": own, "weight_decay": decay, "lr": rate} for (decay, rate), own in groups.items()]


def build_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """Create a fused optimizer: a single kernel, which can skip a step on the device (see `train_step`)."""
    groups = parameter_groups(model, args)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, fused=True)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=args.learning_rate, betas=tuple(args.adam_betas), eps=args.adam_epsilon, fused=True)


def build_schedule(optimizer: Optimizer, args: TrainingArguments, max_steps: int) -> LRScheduler:
    """Create the schedule ``args.lr_scheduler_type``, which scales ``learning_rate``, its peak value.

    Raises:
        ValueError: ``args.warmup_steps`` is above ``max_steps``.
    """
    warmup = args.warmup(max_steps)
    if args.min_lr_rate:
        floor = {"min_lr_rate": args.min_lr_rate}
        return get_scheduler("cosine_with_min_lr", optimizer, warmup, max_steps, scheduler_specific_kwargs=floor)
    if args.lr_scheduler_type != "step":
        return get_scheduler(SCHEDULES[args.lr_scheduler_type], optimizer, warmup, max_steps)

    def factor(step: int) -> float:
        rise = min(step / warmup, 1.0) if warmup else 1.0
        return rise * (0.1 if step >= round(args.lr_drop_ratio * max_steps) else 1.0)

    return LambdaLR(optimizer, factor)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Create an exponential moving average of the weights: ``ema = decay * ema + (1 - decay) * weights`` every
    step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def average_weights(checkpoints: list[Path]) -> dict[str, Tensor]:
    """Average the weights of several checkpoints (Vaswani et al. 2017, section 6.1), accumulated in float64.

    Raises:
        ValueError: there are no checkpoints, or one is damaged.
    """
    if not checkpoints:
        raise ValueError("there are no checkpoints to average")
    total: dict[str, Tensor] = {}
    for folder in checkpoints:
        for name, value in read_weights(folder).items():
            total[name] = total[name].add_(value) if name in total else value.double()
    return {name: (value / len(checkpoints)).float() for name, value in total.items()}
