"""Batches for writing a cache: sample positions -> teacher batches -> tensors of a shard."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..data.batching import Sample, fetch, sample_ref, worker_loader
from .samples import TrainingSamples, encode, read_samples, split
from .shards import CacheIndex, pack
from .signals import Signals
from .teacher import Teacher, to_dtype


class Chunks(Dataset):
    """Teacher batches for a range of cache positions; texts are grouped by length."""

    def __init__(self, samples: TrainingSamples, positions: range, batch_size: int):
        self.samples, self.positions = samples, positions
        rows = samples.rows
        self.chunks: list[tuple[int, list[Sample]]] = []  # epoch, samples
        for epoch in range(positions.start // len(rows), (positions.stop - 1) // len(rows) + 1):
            here = range(
                max(positions.start - epoch * len(rows), 0), min(positions.stop - epoch * len(rows), len(rows))
            )
            own = list(here)
            if samples.refs is not None:
                refs = samples.refs(epoch)
                found = {sample_ref(sample).index: sample for sample in refs}
                if len(found) < len(refs):
                    raise ValueError(f"epoch {epoch} has several copies of a sample, which cannot be cached")
                own = [found[row] for row in here if row in found]
            own = by_length(rows, own)
            self.chunks += [(epoch, own[i : i + batch_size]) for i in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to data loader workers, which only collate: `inputs` may hold a model.
        return {**vars(self), "samples": replace(self.samples, inputs=None, positions=None)}

    def __getitem__(self, i: int) -> tuple[int, list[Sample], dict[str, Any]]:
        epoch, samples = self.chunks[i]
        return epoch, samples, self.samples.batch(samples, epoch)


def by_length(rows: Sequence[Any], samples: list[Sample]) -> list[Sample]:
    """Sort texts by token count to reduce padding; other samples keep their order."""
    indices = [sample_ref(sample).index for sample in samples]
    if not samples or "input_ids" not in fetch(rows, indices[:1])[0]:
        return samples
    lengths = [len(row["input_ids"]) for row in fetch(rows, indices)]
    return [samples[i] for i in sorted(range(len(samples)), key=lengths.__getitem__)]


def shard_tensors(teacher: Teacher, chunks: Chunks, index: CacheIndex, num_workers: int) -> dict[str, Tensor]:
    """Compute the tensors of a shard."""
    found: dict[int, tuple[int, Signals]] = {}
    for epoch, samples, batch in worker_loader(chunks, range(len(chunks)), num_workers):
        if batch.get("images", len(samples)) == 0:
            continue  # no image of this batch can be read
        positions = chunks.samples.positions(batch)
        given = teacher.signals({}, chunks.samples.inputs(batch), index.signals, positions)
        stored = encode(given, index.top_k, index.temperature, to_dtype(index.dtype))
        for ref, sample in zip(read_samples(batch, samples), split(batch, stored, positions), strict=True):
            found[epoch * index.rows + ref.index] = ref.key, {k: v.clone() for k, v in sample.items()}
    if not found:
        raise ValueError(f"no sample of {chunks.positions} can be read")
    return pack([found.get(place) for place in chunks.positions])
