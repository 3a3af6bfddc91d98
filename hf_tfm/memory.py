"""Refuse models and batches that the machine's memory cannot hold, before they are built.

configuration -> parameters and buffers, counted without allocating any -> bytes against those of the machine
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

TRAINING = 16  # bytes a parameter: float32 weight, gradient and two moments of Adam
WEIGHT = 4  # the weight alone, which is built in the machine's memory also where an accelerator trains it
# Fields of a configuration that say how often a block is repeated, of all families.
REPEATED = (
    *("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
    "decoder_num_hidden_layers",
)
COUNTED_AS_BUILT = 64  # up to so many blocks a model is counted as it is


class ImageBatches(Protocol):
    """Options that say how many images are computed at once."""

    batch_size: int
    micro_batch_size: int | None


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    return psutil.virtual_memory().total


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where a limit is set (``ulimit -v``)."""
    if resource is None or (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return machine_memory()
    return min(machine_memory(), limit)


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB"


class TooLarge(ValueError):
    """A model that this machine's memory cannot hold."""


def count_values(
    build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig, reduce: bool = True
) -> tuple[int, int]:
    """Numbers in the parameters and in the buffers of a model, without memory for any of them.

    Args:
        build: configuration -> model.
        reduce: of more than `COUNTED_AS_BUILT` equal blocks, build one and two, and take the others to be like the
            second. For a family in which all blocks of a kind are equal.

    Raises:
        TooLarge: a tensor has more bytes than 64 bits can count.
    """
    names = [name for name in REPEATED if reduce and name in type(config).__dataclass_fields__]
    many = {name: value for name in names if (value := getattr(config, name)) > COUNTED_AS_BUILT}

    def counted(**changes: Any) -> tuple[int, int]:
        smaller = deepcopy(config)
        for name, value in changes.items():
            setattr(smaller, name, value)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = build(smaller)
        return tuple(sum(tensor.numel() for tensor in tensors) for tensors in (model.parameters(), model.buffers()))

    try:
        first = counted(**dict.fromkeys(many, 1))
        more = {name: counted(**dict.fromkeys(many, 1) | {name: 2}) for name in many}
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise TooLarge(f"the model's weights are larger than any memory: {' '.join(str(error).split())}") from error
    return tuple(
        first[kind] + sum((many[name] - 1) * (more[name][kind] - first[kind]) for name in many) for kind in (0, 1)
    )


def new_model(build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig) -> Any:
    """A new model, unless the machine cannot hold its training.

    Args:
        build: configuration -> model, say its class.

    Raises:
        TooLarge: parameters times 16 bytes (4 where an accelerator holds the rest), and buffers, are more than the
            machine has.
    """
    each = WEIGHT if torch.accelerator.is_available() else TRAINING
    parameters, buffers = count_values(build, config)
    needed = parameters * each + buffers * WEIGHT
    if needed > (most := usable_memory()):
        raise TooLarge(
            f"a model of {parameters:,} parameters needs {gigabytes(needed)} ({each} bytes each), and this "
            f"machine has {gigabytes(most)}: choose a smaller size, model or vocab_size"
        )
    return build(config)


def check_saved_size(build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig) -> None:
    """Refuse a saved model that is larger than the memory, before any of it is made.

    Args:
        build: configuration -> model; one that cannot be built without memory is not checked.

    Raises:
        TooLarge: with the bytes of its weights in float32 and those there are.
    """
    try:
        needed = WEIGHT * sum(count_values(build, config, reduce=False))
    except TooLarge as error:
        raise TooLarge("by its config.json its weights are larger than any memory") from error
    except (ImportError, NotImplementedError, RuntimeError, TypeError):
        return
    if needed > (most := usable_memory()):
        raise TooLarge(
            f"by its config.json its weights take {gigabytes(needed)}, and this machine has {gigabytes(most)}"
        )


def check_batch_memory(args: ImageBatches, size: Iterable[int]) -> None:
    """Refuse images of which those that are computed at once do not fit into the machine's memory.

    Args:
        size: height and width in pixels.
    """
    height, width = size
    images = min(args.micro_batch_size or args.batch_size, args.batch_size)
    needed = images * 3 * height * width * 4
    if needed > (most := usable_memory()):
        raise ValueError(
            f"{images:,} images of {height} x {width} pixels need {gigabytes(needed)}, and this machine has "
            f"{gigabytes(most)}: lower image_size, batch_size or micro_batch_size"
        )
