"""Linear probing: a linear classifier on the features of a frozen encoder (He et al. 2021, appendix A.1).

features (B, D) -> normalised by mean and variance, measured once over training images -> linear layer
"""

import math

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base import Loader, Task

STATISTICS_IMAGES = 10_000  # their mean is within 1 % of a standard deviation of that of all images


def heads_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers above the base model; of several, the classifier takes the mean."""
    return [name for name, module in model.named_children() if isinstance(module, nn.Linear | ProbeHead)]


class ProbeHead(nn.Module):
    """Batch norm without parameters, then a linear layer; after training, both fold into one linear layer.

    The statistics of the norm are fixed, since the features of a frozen encoder can be measured beforehand. With those
    of each batch, as in the authors' code, a step would depend on how it is split into micro-batches and ranks.

    Args:
        linear: the classifier to train; features in, classes out.
        mean, variance: (D,) of the features.
    """

    def __init__(self, linear: nn.Linear, mean: Tensor, variance: Tensor):
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6).to(linear.weight.device).eval()
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
        self.linear = linear

    def train(self, mode: bool = True) -> "ProbeHead":
        """See `nn.Module.train`; the norm stays in eval mode."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        return self.linear(self.norm(features.float()))

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """Return the linear layer that computes the same."""
        scale = (self.norm.running_var + self.norm.eps).rsqrt()  # (D,)
        folded = nn.Linear(self.linear.in_features, self.linear.out_features).to(self.linear.weight)
        folded.weight.copy_(self.linear.weight * scale)
        folded.bias.copy_(self.linear.bias - folded.weight @ self.norm.running_mean)
        return folded


@torch.no_grad()
def measure_features(task: Task, model: nn.Module, loader: Loader, max_steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure mean and variance (D,) of the input of each head of a model, see `heads_of`.

    The results are float64, on the CPU, and equal on all ranks.

    Args:
        model: on the device, without dropout; not prepared.
        loader: of training images, augmented and mixed as in training.
        max_steps: steps of the loader's first epoch that are read.

    Raises:
        ValueError: none of the images can be read.
    """
    accelerator = task.accelerator
    heads = {name: getattr(model, name) for name in heads_of(model)}
    count, sums = 0, {name: torch.zeros(2, head.in_features, dtype=torch.float64) for name, head in heads.items()}

    def add(name: str, features: Tensor) -> None:
        features = features.float().cpu().double()  # (B, D)
        sums[name] += torch.stack([features.sum(dim=0), features.square().sum(dim=0)])

    hooks = [
        head.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0])) for name, head in heads.items()
    ]
    for _, micro_batches in zip(range(max_steps), loader.epoch(0), strict=False):
        for batch in micro_batches:
            if not batch["images"]:
                continue
            with accelerator.autocast():
                count += len(model(**task.inputs(send_to_device(batch, accelerator.device))).logits)
    for hook in hooks:
        hook.remove()
    if accelerator.num_processes > 1:
        parts = gather_object([(count, sums)])
        count, sums = sum(part[0] for part in parts), {name: sum(part[1][name] for part in parts) for name in sums}
    if not count:
        raise ValueError("no training image can be read")
    means = {name: total / count for name, total in sums.items()}
    return {name: (mean, (square - mean.square()).clamp_min(0.0)) for name, (mean, square) in means.items()}


def prepare_probe(task: Task, model: nn.Module, loader: Loader) -> None:
    """Freeze an image classifier except for its linear layers, and put batch norm before those.

    With a distillation token there are two; their mean is one linear classifier of the features of both tokens.

    Args:
        task, model, loader: see `measure_features`.
    """
    model.to(task.accelerator.device)
    steps = min(math.ceil(STATISTICS_IMAGES / task.args.batch_size), loader.steps_per_epoch() or math.inf)
    measured = measure_features(task, model.eval(), loader, steps)
    model.requires_grad_(False)
    for name, (mean, variance) in measured.items():
        setattr(model, name, ProbeHead(getattr(model, name), mean, variance))
        getattr(model, name).linear.requires_grad_(True)


def fold_probe(model: nn.Module) -> None:
    """Replace the heads of `prepare_probe` by linear layers that compute the same."""
    for name in heads_of(model):
        setattr(model, name, getattr(model, name).fold())
