"""Throughput of a model on its own and of everything around it."""

import time
from typing import Any

import torch
from torch import Tensor, nn


class Stopwatch:
    """Measures samples per second within a ``with`` block.

    The first forward pass of a model, in which kernels are chosen and memory is allocated, is left out if there are
    others.

    Args:
        model: the batch size of a pass is that of its first tensor argument.

    Attributes:
        sample: keyword arguments of the first pass, for its first sample.
    """

    def __init__(self, model: nn.Module):
        self.model, self.passes = model, []
        self.sample: dict[str, Any] = {}

    def __enter__(self) -> "Stopwatch":
        self.hooks = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, with_kwargs=True),
        ]
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        for hook in self.hooks:
            hook.remove()

    def now(self) -> float:
        """Return the time once the device has finished its work."""
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return time.perf_counter()

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Start of a forward pass."""
        if not self.passes:
            self.sample = {name: value[:1] for name, value in kwargs.items() if isinstance(value, Tensor)}
        self.began = self.now()

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """End of a forward pass."""
        size = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 0)
        self.passes.append((size, self.now() - self.began))

    def throughput(self, samples: int) -> dict[str, float]:
        """Return samples per second: ``model`` alone, and ``whole`` with reading and preprocessing.

        Args:
            samples: number of samples read.
        """
        counts, seconds = zip(*(self.passes[1:] or self.passes), strict=True)
        return {"model": sum(counts) / sum(seconds), "whole": samples / self.seconds}
