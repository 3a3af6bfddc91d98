"""Batches for writing a cache: sample positions -> teacher batches -> tensors of a shard."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..data.batching import COPY, fetch, worker_loader
from .samples import TrainingSamples, encode, split
from .shards import CacheIndex, pack
from .signals import Signals
from .teacher import Teacher, to_dtype


class Chunks(Dataset):
    """Teacher batches for a range of cache positions; texts are grouped by length."""

    def __init__(self, samples: TrainingSamples, positions: range, batch_size: int):
        self.samples, self.positions = samples, positions
        rows, numbers = samples.rows, samples.numbers
        self.chunks: list[tuple[int, list[int]]] = []  # epoch, sample numbers
        for epoch in range(positions.start // len(rows), (positions.stop - 1) // len(rows) + 1):
            here = range(
                max(positions.start - epoch * len(rows), 0), min(positions.stop - epoch * len(rows), len(rows))
            )
            own = list(here)
            if numbers is not None:
                own = sorted((n for n in numbers(epoch) if n % COPY in here), key=lambda n: n % COPY)
                if len({n % COPY for n in own}) < len(own):
                    raise ValueError(f"epoch {epoch} has several copies of a sample, which cannot be cached")
            own = by_length(rows, own)
            self.chunks += [(epoch, own[i : i + batch_size]) for i in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to data loader workers, which only collate: `inputs` may hold a model.
        return {**vars(self), "samples": replace(self.samples, inputs=None, positions=None)}

    def __getitem__(self, i: int) -> tuple[int, list[int], dict[str, Any]]:
        epoch, numbers = self.chunks[i]
        return epoch, numbers, self.samples.batch(numbers, epoch)


def by_length(rows: Sequence[Any], numbers: list[int]) -> list[int]:
    """Sort the numbers of texts by token count to reduce padding; other samples keep their order."""
    found = fetch(rows, [numbers[0] % COPY]) if numbers else [{}]
    if "input_ids" not in found[0]:
        return numbers
    lengths = {
        n: len(row["input_ids"]) for n, row in zip(numbers, fetch(rows, [n % COPY for n in numbers]), strict=True)
    }
    return sorted(numbers, key=lengths.__getitem__)


def shard_tensors(teacher: Teacher, chunks: Chunks, index: CacheIndex, num_workers: int) -> dict[str, Tensor]:
    """Compute the tensors of a shard."""
    found: dict[int, tuple[int, Signals]] = {}
    for epoch, numbers, batch in worker_loader(chunks, range(len(chunks)), num_workers):
        if batch.get("images", len(numbers)) == 0:
            continue  # no image of this batch can be read
        positions = chunks.samples.positions(batch)
        given = teacher.signals({}, chunks.samples.inputs(batch), index.signals, positions)
        stored = encode(given, index.top_k, index.temperature, to_dtype(index.dtype))
        kept = {n % COPY for n in batch["indices"].tolist()} if "images" in batch else None
        numbers = [n for n in numbers if kept is None or n % COPY in kept]
        for number, sample in zip(numbers, split(batch, stored, positions), strict=True):
            found[epoch * index.rows + number % COPY] = number, {k: v.clone() for k, v in sample.items()}
    if not found:
        raise ValueError(f"no sample of {chunks.positions} can be read")
    return pack([found.get(place) for place in chunks.positions])
