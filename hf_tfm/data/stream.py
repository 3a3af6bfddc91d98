"""Batches of a stream: samples are collected into pools, and each pool is batched like a small data set.

    stream -> pools of samples -> one list of samples per optimizer step -> a part for each rank -> micro-batches

Every rank reads the whole stream and keeps its part, so the samples of a step depend only on the stream.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from .batching import Example, Sampler, StepLoader, TokenBudgetSampler, rng, worker_loader


class StreamLoader:
    """`StepLoader` for a stream.

    Args:
        stream: examples; iterated again in every epoch.
        measure: example -> lengths of its sides.
        pool_samples: number of samples that are sorted and shuffled together.
    """

    def __init__(
        self,
        stream: Iterable[Example],
        measure: Callable[[Example], Sequence[int]],
        max_tokens: int,
        collate: Callable[..., Any],
        seed: int = 0,
        pool_samples: int = 20_000,
        micro_batch_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.stream, self.measure, self.max_tokens, self.collate = stream, measure, max_tokens, collate
        self.seed, self.pool_samples, self.micro_batch_tokens = seed, pool_samples, micro_batch_tokens
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.num_workers = min(1, num_workers)  # a second worker would read the same stream again

    def steps_per_epoch(self, epoch: int = 0) -> None:
        """Return None: the length of a stream is unknown."""
        return None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """Yield this rank's micro-batches of every step of an epoch, starting at step ``start``."""
        steps = _StreamDataset(self, epoch, start)
        return iter(worker_loader(steps, num_workers=self.num_workers, pin_memory=self.pin_memory))

    def pools(self) -> Iterator[tuple[int, list[Example]]]:
        """Yield (index of the first sample, samples) of each pool."""
        pool: list[Example] = []
        first = 0
        for example in self.stream:
            pool.append(example)
            if len(pool) == self.pool_samples:
                yield first, pool
                first, pool = first + len(pool), []
        if pool:
            yield first, pool

    def sampler(self, pool: list[Example], seed: int) -> Sampler:
        """Return the sampler that batches a pool."""
        lengths = np.array([self.measure(example) for example in pool])
        return TokenBudgetSampler(lengths, self.max_tokens, seed)

    def steps(self, epoch: int, start: int) -> Iterator[list[Any]]:
        """See `epoch`; steps before ``start`` are read and skipped without collating."""
        number = 0
        for first, pool in self.pools():
            sampler = self.sampler(pool, int(rng(self.seed, first).integers(2**32)))
            placement = self.micro_batch_tokens, self.rank, self.world_size
            loader = StepLoader(pool, sampler, self.collate, *placement, first_index=first)
            for step in sampler.steps(epoch):
                if number >= start:
                    yield loader.micro_batches(step, epoch)
                number += 1


class _StreamDataset(IterableDataset):
    def __init__(self, loader: StreamLoader, epoch: int, start: int):
        self.loader, self.number, self.start = loader, epoch, start

    def __iter__(self) -> Iterator[list[Any]]:
        return self.loader.steps(self.number, self.start)
