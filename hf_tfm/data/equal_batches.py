"""Batches with an equal number of samples, in an order that depends only on (seed, epoch)."""

from collections.abc import Sequence

import numpy as np

from .batching import Sample, SampleRef, Steps, rng


class BatchSampler:
    """Steps with an equal number of samples.

    Args:
        count: number of samples in the data set.
        batch_size: samples per step, over all ranks.
        seed: determines the order, together with the epoch.
        shuffle: False keeps the order of the data set, for evaluation.
        drop_last: drop the samples that do not fill a step.
        repeats: copies of a sample in a step, each augmented differently (Hoffer et al. 2020, arXiv:1901.09335). The
            number of steps per epoch does not change, so an epoch covers 1 / ``repeats`` of the samples, as in DeiT.
            The samples of a step are then `SampleRef`s.
        unit: number of neighbours in a step that ranks and micro-batches never separate, for example 2 for mixup with
            the neighbour.

    Raises:
        ValueError: if there are no samples or an option is out of range.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        repeats: int = 1,
        unit: int = 1,
    ):
        for name, value in (("batch_size", batch_size), ("repeats", repeats), ("unit", unit)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if count < 1:
            raise ValueError("there are no samples to batch")
        if drop_last and count < batch_size:
            raise ValueError(f"batch_size must be at most the {count} samples with drop_last, got {batch_size}")
        if repeats > 1 and not shuffle:
            raise ValueError(f"repeats={repeats} leaves samples out: it needs shuffle")
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle
        self.drop_last, self.repeats, self.unit = drop_last, repeats, unit
        self.last: tuple[int | None, Steps] = (None, [])  # the epoch built last, and its steps
        self.check_budget("batch_size", batch_size)

    def check_budget(self, name: str, samples: int) -> None:
        """Raise if ``samples``, the value of the argument ``name``, would separate neighbours."""
        name = name.replace("tokens", "size")  # the name of the argument for images
        if samples % self.unit:
            raise ValueError(f"{name} must be a multiple of {self.unit}, so that pairs stay together, got {samples}")

    def cut(self, part: Sequence[Sample], samples: int) -> Steps:
        """Split a part of a step into runs of at most ``samples``."""
        return [list(part[i : i + samples]) for i in range(0, len(part), samples)]

    def steps(self, epoch: int) -> Steps:
        """Return the steps of an epoch, each a list of samples; copies of a sample are not adjacent."""
        if self.last[0] != epoch:
            self.last = epoch, self.make_steps(epoch)
        return self.last[1]

    def make_steps(self, epoch: int) -> Steps:
        """See `steps`."""
        order = rng(self.seed, epoch).permutation(self.count) if self.shuffle else np.arange(self.count)
        steps = []
        for start in range(0, self.count, self.batch_size):
            size = min(self.batch_size, self.count - start)
            if size < self.batch_size and self.drop_last:
                break
            different = -(-size // self.repeats)
            first = len(steps) * -(-self.batch_size // self.repeats)
            rows = order[first : first + different].tolist()
            if self.repeats > 1:
                rows = [SampleRef(rows[k % different], k // different) for k in range(size)]
            steps.append(rows)
        return steps
