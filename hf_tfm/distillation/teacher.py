"""Teachers: load them, place them on a device, and check them before training.

model -> in evaluation mode, without gradients, in its dtype, on its device -> signals of a batch
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_device, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.loading import LoadingError, check_weights, explained
from .model_spec import ModelSpec, spec_of
from .resolve import ResolvedTerm
from .signals import Signals, collect

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_dtype(name: str, argument: str = "dtype") -> torch.dtype:
    """Return the dtype with a short name.

    Raises:
        ValueError: there is no such name.
    """
    if name not in DTYPES:
        raise ValueError(f'{argument} must be one of {", ".join(DTYPES)}, got "{name}"')
    return DTYPES[name]


class Teacher:
    """A frozen model that provides signals.

    Its model accepts inputs on another device or in another dtype and returns outputs on the device of the inputs, so
    callers need not know where it is placed.

    Args:
        model: a `PreTrainedModel`. A model dispatched over several devices (``device_map``) is not moved.
        dtype: "fp32", "bf16" or "fp16", for weights and computation.
        device: device of the teacher, which may differ from the student's; by default the model is not moved.

    Attributes:
        facts: the properties that terms are planned on.
        hash: hash of the weights as loaded; None if some weights are not in memory.
        dtype: as passed.

    Raises:
        ValueError: unknown dtype.
    """

    def __init__(self, model: PreTrainedModel, dtype: str = "fp32", device: torch.device | str | None = None):
        self.spec: ModelSpec = spec_of(model)
        self.dtype = dtype
        away = any(value.is_meta for value in model.state_dict().values())
        self.hash = None if away else weights_hash(model)
        model.requires_grad_(False)
        spread = getattr(model, "hf_device_map", None) is not None
        self.model = (model if spread else model.to(device=device, dtype=to_dtype(dtype))).eval()
        Visits(self.model, spread)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to data loader workers, which do not need the model.
        return {name: value for name, value in vars(self).items() if name != "model"}

    def require(self, terms: Sequence[ResolvedTerm]) -> None:
        """Accept all terms: a model can compute every planned signal. See `cache.CachedTeacher`."""

    def epoch(self, epoch: int) -> int:
        """Return the epoch unchanged: a model can compute every epoch."""
        return epoch

    def attach(self, *_: Any) -> dict[str, Any]:
        """Add nothing to a batch: signals are computed on demand."""
        return {}

    @torch.no_grad()
    def signals(
        self, attached: dict[str, Any], inputs: dict[str, Any], names: Collection[str], positions: Tensor | None
    ) -> Signals:
        """Compute the signals of a batch, on the device of the inputs.

        Args:
            attached: result of `attach`, unused.
            inputs, names, positions: see `collect`.
        """
        if self.model.training:
            self.model.eval()  # another user of the model may have left it in training mode
        home = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        own = next(self.model.parameters()).device
        with torch.autocast(home.type, enabled=False), torch.autocast(own.type, enabled=False):
            found, _ = collect(self.model, inputs, names, positions)
        return {name: value.to(home, non_blocking=True) for name, value in found.items()}


def load_teacher(
    name: str,
    kind: Any,
    dtype: str = "fp32",
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **options: Any,
) -> Teacher:
    """Load a teacher from a folder or the Hub.

    Args:
        kind: an Auto class or a model class that has the head to distill from.
        dtype, device: see `Teacher`.
        device_map: spreads a model over several devices, see transformers; replaces ``device``.
        options: further arguments of ``from_pretrained``, for example ``revision``.

    Raises:
        ValueError: both a device and a device_map are given, or the weights lack a head, which would then be random.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"give device or device_map, not both, got {device} and {device_map}")
    if device_map is not None:
        options |= {"device_map": device_map, "dtype": to_dtype(dtype)}
    with explained("teacher", name):
        options = {"trust_remote_code": False, **options}
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        # A missing pooler is harmless unless a head uses it, and then the head is missing too.
        if missing := sorted(key for key in report["missing_keys"] if "pooler." not in key):
            raise LoadingError(
                f'teacher "{name}" lacks the weights {", ".join(missing[:3])} of {type(model).__name__}: it was not '
                "trained for this"
            )
        check_weights(model, report, may_lack=lambda key: "pooler." in key)
    return Teacher(model, dtype, device)


class Visits:
    """Hooks that move a model's inputs to its device, and its outputs back to the device of the inputs.

    Args:
        model: gets the hooks. Its device is looked up at every call.
        spread: True for a model on several devices, whose own hooks move tensors between them.
    """

    def __init__(self, model: nn.Module, spread: bool):
        self.spread, self.home = spread, None
        model.register_forward_pre_hook(self.come, with_kwargs=True)
        model.register_forward_hook(self.go, prepend=True)  # runs first, as the input hook ran last

    def come(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Move the arguments to the model's device, and cast floating-point tensors to its dtype."""
        own = next(model.parameters())
        self.home = find_device((args, kwargs))
        dtype = own.dtype

        def brought(value: Any) -> Any:
            if not self.spread:
                value = send_to_device(value, own.device)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tuple(map(brought, args)), {name: brought(value) for name, value in kwargs.items()}

    def go(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Move the output to the device of the arguments."""
        return output if self.home is None else send_to_device(output, self.home)


def weights_hash(model: nn.Module) -> str:
    """Hash all saved weights and buffers with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def origin_of(name: str) -> str | None:
    """Identify a teacher without loading it; None if that is impossible.

    Args:
        name: a folder, identified by a hash of its weight files, or a Hub id, identified by its commit.
    """
    if not Path(name).is_dir():
        try:
            return PreTrainedConfig.get_config_dict(name)[0].get("_commit_hash")
        except OSError:  # no network, and not in the local cache
            return None
    digest = hashlib.sha256()
    files = sorted(path for like in ("model*.safetensors", "pytorch_model*.bin") for path in Path(name).glob(like))
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for block in iter(partial(file.read, 2**20), b""):
                digest.update(block)
    return digest.hexdigest()[:16] if files else None


def check_score(scores: dict[str, float], metric: str, expected: float, tolerance: float = 0.01) -> None:
    """Refuse a teacher that scores worse on the validation data than expected, before training starts.

    Typical causes: a checkpoint that was not fine-tuned, labels in another order, or another tokenizer.

    Args:
        scores: the teacher's scores, by metric.
        metric: metric to check; higher is better, except for "loss".
        expected: expected score.
        tolerance: largest accepted shortfall.

    Raises:
        ValueError: reports both numbers, or the available metrics.
    """
    if metric not in scores:
        raise ValueError(f'metric "{metric}" is not evaluated; available: {", ".join(scores)}')
    found = scores[metric]
    worse = found - expected if metric == "loss" else expected - found
    if math.isnan(found) or worse > tolerance:
        raise ValueError(
            f"the teacher's {metric} is {found:.4g} on the validation data and should be {expected:.4g} (tolerance "
            f"{tolerance:g}): check that it was fine-tuned, and on the same labels and texts"
        )
