"""CPU threads of a run: one for a small model, torch's default for a large one.

A small model gains next to nothing from a second thread, and loses much on a busy machine: every operation waits for
its slowest thread. With both of two cores busy elsewhere, training steps of the quickstart's translator ran at 294
target tokens/s with two threads and at 4,700 with one. The rule looks at the model alone, not at the load when the run
starts, so a run computes the same numbers each time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL = 2_000_000  # parameters
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user or launcher chooses


def limit_threads(model: nn.Module, device: torch.device) -> bool:
    """Use one thread where ``model`` is small and runs on a CPU, unless the environment sets the number.

    Returns:
        Whether the number was changed.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1 or any(map(os.environ.get, VARIABLES)):
        return False
    if sum(parameter.numel() for parameter in model.parameters()) >= SMALL_MODEL:
        return False
    torch.set_num_threads(1)
    return True


@contextmanager
def threads_restored() -> Iterator[None]:
    """Set the number of threads back to what it was, in the end."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
