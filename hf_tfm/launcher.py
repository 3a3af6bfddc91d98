"""The accelerator of this process, and a check that it found all processes that the launcher started."""

import os
from typing import Any

import torch
from accelerate import Accelerator

# Set by `accelerate launch` for every process, and, as MASTER_ADDR, for more than one.
OF_ACCELERATE = "ACCELERATE_MIXED_PRECISION"


def create_accelerator(**options: Any) -> Accelerator:
    """Return the accelerator; several processes on a machine without an accelerator device communicate with gloo.

    Accelerate alone would not connect processes that torchrun starts on such a machine.

    Args:
        options: of `accelerate.Accelerator`.

    Raises:
        ValueError: see `check_world`.
    """
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    accelerator = Accelerator(cpu=several and not torch.accelerator.is_available(), **options)
    check_world(accelerator.num_processes)
    return accelerator


def check_world(connected: int) -> None:
    """Refuse a process that should be one of several, but is alone: each would train the whole model by itself.

    Args:
        connected: number of processes in the process group.

    Raises:
        ValueError: the launcher was asked for another number.
    """
    asked = int(os.environ.get("WORLD_SIZE") or connected)
    if connected != asked:
        raise ValueError(
            f"the launcher has started {asked} processes (WORLD_SIZE), but {connected} can be connected: start one "
            "process for each GPU, or set the environment variable ACCELERATE_USE_CPU=true to train on the CPU"
        )
    if connected == 1 and OF_ACCELERATE in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes, but has started only this one, as it does on a CPU: "
            "use python -m torch.distributed.run --nproc_per_node N instead, or --num_processes 1"
        )
