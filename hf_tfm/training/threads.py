"""CPU threads of a run: one for a small model, torch's default for a large one.

A small model gains almost nothing from a second thread, and loses much on a busy machine, because every operation
waits for its slowest thread. With both of two cores busy, the quickstart's translator trained at 294 target tokens/s
with two threads and at 4,700 with one. The rule depends on the model only, not on the load at the start, so results
are reproducible.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL = 2_000_000  # parameters
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # set by a user or launcher to choose the number


def limit_threads(model: nn.Module, device: torch.device) -> bool:
    """Use one thread if ``model`` is small and runs on a CPU, unless an environment variable sets the number.

    Returns:
        True if the number was changed.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1 or any(map(os.environ.get, VARIABLES)):
        return False
    if sum(parameter.numel() for parameter in model.parameters()) >= SMALL_MODEL:
        return False
    torch.set_num_threads(1)
    return True


@contextmanager
def threads_restored() -> Iterator[None]:
    """Restore the number of threads on exit."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
