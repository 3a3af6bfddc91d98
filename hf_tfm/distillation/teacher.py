"""Teachers: loaded, put where there is room, and looked at before anything is trained.

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
from .facts import Facts, facts_of
from .plan import Lesson
from .signals import Signals, collect

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_dtype(name: str, argument: str = "dtype") -> torch.dtype:
    """A dtype by its short name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in DTYPES:
        raise ValueError(f'{argument} must be one of {", ".join(DTYPES)}, got "{name}"')
    return DTYPES[name]


class Teacher:
    """A model that gives signals and learns nothing.

    Args:
        model: of transformers' kind. One that is spread over devices (``device_map``) stays as it is.
        dtype: "fp32", "bf16" or "fp16", of its weights and what it computes.
        device: where it computes, which need not be where the student does; default, where it is.

    Its model may be called with what is on another device, or in another dtype, and answers on the device of that: so
    whoever scores it need not know where it stands.

    `facts` is what its lessons are planned on; `hash` is of its weights as they were loaded, None where some of them
    are not in memory; `dtype` as it was given.

    Raises:
        ValueError: there is no such dtype.
    """

    def __init__(self, model: PreTrainedModel, dtype: str = "fp32", device: torch.device | str | None = None):
        self.facts: Facts = facts_of(model)
        self.dtype = dtype
        away = any(value.is_meta for value in model.state_dict().values())
        self.hash = None if away else weights_hash(model)
        model.requires_grad_(False)
        spread = getattr(model, "hf_device_map", None) is not None
        self.model = (model if spread else model.to(device=device, dtype=to_dtype(dtype))).eval()
        Visits(self.model, spread)

    def __getstate__(self) -> dict[str, Any]:
        # It goes to workers that make batches, and need no model.
        return {name: value for name, value in vars(self).items() if name != "model"}

    def require(self, lessons: Sequence[Lesson]) -> None:
        """Nothing: it can compute all that was planned on its facts. See `cache.CachedTeacher`."""

    def epoch(self, epoch: int) -> int:
        """It knows them all."""
        return epoch

    def attach(self, *_: Any) -> dict[str, Any]:
        """Nothing is added to a batch: this teacher computes when it is asked."""
        return {}

    @torch.no_grad()
    def signals(
        self, attached: dict[str, Any], inputs: dict[str, Any], names: Collection[str], places: Tensor | None
    ) -> Signals:
        """Signals for a batch, on the device of the inputs.

        Args:
            attached: what `attach` gave, is not looked at.
            inputs, names, places: see `collect`.
        """
        if self.model.training:
            self.model.eval()  # whoever else used it
        home = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        own = next(self.model.parameters()).device
        with torch.autocast(home.type, enabled=False), torch.autocast(own.type, enabled=False):
            found, _ = collect(self.model, inputs, names, places)
        return {name: value.to(home, non_blocking=True) for name, value in found.items()}


def load_teacher(
    name: str,
    kind: Any,
    dtype: str = "fp32",
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **options: Any,
) -> Teacher:
    """A teacher of a folder or the Hub.

    Args:
        kind: the Auto class, or the model's own, that has the head it teaches with.
        dtype, device: see `Teacher`.
        device_map: spreads a model that fits on no device alone, see transformers; takes the place of ``device``.
        options: others of ``from_pretrained``, say ``revision``.

    Raises:
        ValueError: both a device and a map are given, or the weights lack a head, which would then be random.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"give device or device_map, not both, got {device} and {device_map}")
    if device_map is not None:
        options |= {"device_map": device_map, "dtype": to_dtype(dtype)}
    with explained("teacher", name):
        options = {"trust_remote_code": False, **options}
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        # A pooler that pretraining leaves out is not looked at, unless a head stands on it, which is then missing too.
        if missing := sorted(key for key in report["missing_keys"] if "pooler." not in key):
            raise LoadingError(
                f'teacher "{name}" lacks the weights {", ".join(missing[:3])} of {type(model).__name__}: it was not '
                "trained for this"
            )
        check_weights(model, report, may_lack=lambda key: "pooler." in key)
    return Teacher(model, dtype, device)


class Visits:
    """Hooks of a model that bring what it is given to its device, and what it gives back to where that came from.

    Args:
        model: gets the hooks. Where its weights are, is looked up each time.
        spread: it is on several devices, and has hooks of its own that bring tensors from one to the other.
    """

    def __init__(self, model: nn.Module, spread: bool):
        self.spread, self.home = spread, None
        model.register_forward_pre_hook(self.come, with_kwargs=True)
        model.register_forward_hook(self.go, prepend=True)  # the last to come is the first to go

    def come(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments on the model's device, images in its dtype."""
        own = next(model.parameters())
        self.home = find_device((args, kwargs))
        dtype = own.dtype

        def brought(value: Any) -> Any:
            if not self.spread:
                value = send_to_device(value, own.device)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tuple(map(brought, args)), {name: brought(value) for name, value in kwargs.items()}

    def go(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """What the model gives, where its arguments came from."""
        return output if self.home is None else send_to_device(output, self.home)


def weights_hash(model: nn.Module) -> str:
    """A hash of every weight and buffer that is saved, with its name, shape and dtype."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def origin_of(name: str) -> str | None:
    """What tells a teacher from others without loading it; None where nothing does.

    Args:
        name: a folder, of whose files of weights it is a hash; or an id on the Hub, of which it is the commit.
    """
    if not Path(name).is_dir():
        try:
            return PreTrainedConfig.get_config_dict(name)[0].get("_commit_hash")
        except OSError:  # no network, and not on this machine
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
    """Refuse a teacher that is worse on the validation data than it should be, before a student learns from it.

    What is behind it mostly: a checkpoint without its fine-tuning, labels in another order, or another tokenizer.

    Args:
        scores: of the teacher, by metric.
        metric: the one that is expected; higher is better, but of "loss".
        expected: what it should be.
        tolerance: how much worse it may be.

    Raises:
        ValueError: with both numbers, or the metrics there are.
    """
    if metric not in scores:
        raise ValueError(f'metric "{metric}" is not evaluated; there are {", ".join(scores)}')
    found = scores[metric]
    worse = found - expected if metric == "loss" else expected - found
    if math.isnan(found) or worse > tolerance:
        raise ValueError(
            f"the teacher's {metric} is {found:.4g} on the validation data and should be {expected:.4g} (tolerance "
            f"{tolerance:g}): look whether it was fine-tuned, and on the same labels and texts"
        )
