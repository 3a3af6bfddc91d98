"""Refuse models and batches that the machine's memory cannot hold, before they are built.

configuration -> parameters, counted without allocating any -> bytes of training against those of the machine
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

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


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB"


def count_parameters(build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig) -> int:
    """Parameters of a model, without memory for any of them.

    Of more than `COUNTED_AS_BUILT` equal blocks, one and two are built; the others are taken to be like the second.

    Raises:
        ValueError: a tensor has more bytes than 64 bits can count.
    """
    names = [name for name in REPEATED if name in type(config).__dataclass_fields__]
    many = {name: value for name in names if (value := getattr(config, name)) > COUNTED_AS_BUILT}

    def counted(**changes: Any) -> int:
        smaller = deepcopy(config)
        for name, value in changes.items():
            setattr(smaller, name, value)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return sum(parameter.numel() for parameter in build(smaller).parameters())

    try:
        first = counted(**dict.fromkeys(many, 1))
        return first + sum((many[name] - 1) * (counted(**dict.fromkeys(many, 1) | {name: 2}) - first) for name in many)
    except RuntimeError as error:
        if "overflow" not in str(error).lower():
            raise
        raise ValueError(f"the model's weights are larger than any memory: {' '.join(str(error).split())}") from error


def new_model(build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig) -> Any:
    """A new model, unless the machine cannot hold its training.

    Args:
        build: configuration -> model, say its class.

    Raises:
        ValueError: parameters times 16 bytes (4 where an accelerator holds the rest) are more than the machine has.
    """
    each = WEIGHT if torch.accelerator.is_available() else TRAINING
    check_memory(count_parameters(build, config), each)
    return build(config)


def check_memory(parameters: int, each: int = TRAINING) -> None:
    """Refuse a number of parameters that the machine cannot hold.

    Args:
        each: bytes a parameter.
    """
    if parameters * each > (most := machine_memory()):
        raise ValueError(
            f"a model of {parameters:,} parameters needs {gigabytes(parameters * each)} ({each} bytes each), and this "
            f"machine has {gigabytes(most)}: choose a smaller size, model or vocab_size"
        )


def check_batch_memory(args: ImageBatches, size: Iterable[int]) -> None:
    """Refuse images of which those that are computed at once do not fit into the machine's memory.

    Args:
        size: height and width in pixels.
    """
    height, width = size
    images = min(args.micro_batch_size or args.batch_size, args.batch_size)
    needed = images * 3 * height * width * 4
    if needed > (most := machine_memory()):
        raise ValueError(
            f"{images:,} images of {height} x {width} pixels need {gigabytes(needed)}, and this machine has "
            f"{gigabytes(most)}: lower image_size, batch_size or micro_batch_size"
        )
