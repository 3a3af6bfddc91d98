"""Refuse models and batches that do not fit in the machine's memory, before they are built.

configuration -> parameters and buffers, counted without allocating any -> bytes compared with the machine's memory
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # typeshed has the module on every system

TRAINING = 16  # bytes per parameter: float32 weight, gradient and the two moments of Adam
WEIGHT = 4  # bytes of the weight alone, which is built in host memory even if an accelerator trains it
# Configuration fields, of all families, that give the number of repeated blocks.
REPEATED = (
    *("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
    "decoder_num_hidden_layers",
)
COUNTED_AS_BUILT = 64  # up to this many blocks, all are built for counting

Model = TypeVar("Model", bound=nn.Module)


class ImageBatches(Protocol):
    """Options that determine how many images are processed at once."""

    batch_size: int
    micro_batch_size: int | None


def machine_memory() -> int:
    """Return the machine's memory in bytes."""
    return psutil.virtual_memory().total


def usable_memory() -> int:
    """Return the memory in bytes that this process may use: the machine's, or a lower limit (``ulimit -v``)."""
    if resource is None or (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return machine_memory()
    return min(machine_memory(), limit)


def gigabytes(count: float) -> str:
    """Format bytes in GB."""
    return f"{count / 1e9:,.1f} GB"


class TooLarge(ValueError):
    """The model does not fit in this machine's memory."""


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Count the elements of several tensors."""
    return sum(tensor.numel() for tensor in tensors)


def count_values(build: Callable[[Any], nn.Module], config: PreTrainedConfig, reduce: bool = True) -> tuple[int, int]:
    """Count the elements of a model's parameters and buffers without allocating memory.

    Args:
        build: configuration -> model.
        reduce: for more than `COUNTED_AS_BUILT` equal blocks, build one and two blocks and extrapolate. Requires that
            all blocks of a kind are equal.

    Raises:
        TooLarge: the bytes of a tensor exceed 64 bits.
    """
    names = [name for name in REPEATED if reduce and name in type(config).__dataclass_fields__]
    many = {name: value for name in names if (value := getattr(config, name)) > COUNTED_AS_BUILT}

    def counted(**changes: Any) -> tuple[int, int]:
        smaller = deepcopy(config)
        for name, value in changes.items():
            setattr(smaller, name, value)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = build(smaller)
        return count_elements(model.parameters()), count_elements(model.buffers())

    try:
        first = counted(**dict.fromkeys(many, 1))
        more = {name: counted(**dict.fromkeys(many, 1) | {name: 2}) for name in many}
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise TooLarge(f"the size of the model's weights exceeds 64 bits: {' '.join(str(error).split())}") from error

    def total(kind: int) -> int:
        return first[kind] + sum((many[name] - 1) * (more[name][kind] - first[kind]) for name in many)

    return total(0), total(1)


def new_model(build: Callable[[Any], Model], config: PreTrainedConfig) -> Model:
    """Build a new model, unless its training does not fit in memory.

    Args:
        build: configuration -> model, for example its class.

    Raises:
        TooLarge: 16 bytes per parameter (4 if an accelerator holds the rest), plus buffers, exceed the memory.
    """
    each = WEIGHT if torch.accelerator.is_available() else TRAINING
    parameters, buffers = count_values(build, config)
    needed = parameters * each + buffers * WEIGHT
    if needed > (most := usable_memory()):
        raise TooLarge(
            f"a model of {parameters:,} parameters needs {gigabytes(needed)} ({each} bytes per parameter), but this "
            f"machine has {gigabytes(most)}: choose a smaller size, model or vocab_size"
        )
    return build(config)


def check_saved_size(build: Callable[[Any], nn.Module], config: PreTrainedConfig) -> None:
    """Refuse a saved model that is larger than the memory, before allocating any of it.

    Args:
        build: configuration -> model; a model that cannot be built on the meta device is not checked.

    Raises:
        TooLarge: reports the bytes of its weights in float32 and the bytes available.
    """
    try:
        needed = WEIGHT * sum(count_values(build, config, reduce=False))
    except TooLarge as error:
        raise TooLarge("according to its config.json, the size of its weights exceeds 64 bits") from error
    except (ImportError, NotImplementedError, RuntimeError, TypeError):
        return
    if needed > (most := usable_memory()):
        raise TooLarge(
            f"according to its config.json, its weights take {gigabytes(needed)}, but this machine has "
            f"{gigabytes(most)}"
        )


def check_batch_memory(args: ImageBatches, size: Iterable[int], frames: int = 1) -> None:
    """Refuse an image size at which the images processed at once do not fit in memory.

    Args:
        size: height and width in pixels.
        frames: images of a sample.
    """
    height, width = size
    images = frames * min(args.micro_batch_size or args.batch_size, args.batch_size)
    needed = images * 3 * height * width * 4
    if needed > (most := usable_memory()):
        raise ValueError(
            f"{images:,} images of {height} x {width} pixels need {gigabytes(needed)}, but this machine has "
            f"{gigabytes(most)}: lower image_size, batch_size or micro_batch_size"
        )
