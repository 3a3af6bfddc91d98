"""Batches of equal cost, in an order that depends only on (seed, epoch, sample index).

    lengths of all samples -> one list of indices per optimizer step -> a part for each rank -> micro-batches

A *step* is the set of samples of one optimizer step, over all ranks. Ranks and micro-batches only split a step, so
their number changes neither the samples of a step nor the order of steps.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Example = dict[str, Any]

PARENT_SECONDS = 1.0  # between two looks of a worker process for its parent
COPY, SIDE = 2**40, 2**16  # exclusive upper bounds of an index, and of the height and width of a canvas


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample of an epoch. A plain int refers to a sample that is neither a copy nor has a canvas.

    Args:
        index: row of the data set.
        copy: number of the copy, if a step has several of the row, each augmented differently.
        canvas: height and width to which the images of its step are padded.
    """

    index: int
    copy: int = 0
    canvas: tuple[int, int] | None = None

    @property
    def key(self) -> int:
        """A number that differs between all samples: key of their random draws, and their name in a cache."""
        height, width = self.canvas or (0, 0)
        return self.index + COPY * (self.copy + height * SIDE + width)


Sample = int | SampleRef
Steps = Sequence[Sequence[Sample]]
PlacedStep = list[list[tuple[Sequence[Sample], bool]]]  # see `place_step`


def sample_ref(sample: Sample) -> SampleRef:
    """Return the reference of a sample that may be given by its index."""
    return sample if isinstance(sample, SampleRef) else SampleRef(sample)


def key_of(sample: Sample) -> int:
    """Return the key of a sample that may be given by its index, see `SampleRef`."""
    return sample.key if isinstance(sample, SampleRef) else sample


def shifted(sample: Sample, first: int) -> Sample:
    """Return the sample in a sequence of which its data set is the piece that starts at ``first``."""
    if not first:
        return sample
    return replace(sample, index=sample.index + first) if isinstance(sample, SampleRef) else sample + first


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad rows of ids with ``value``; returns (B, longest) int64."""
    table = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


def pad_tokens(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad token ids: ``input_ids`` (B, T), and ``attention_mask`` (B, T) if there is padding."""
    ids = pad([example["input_ids"] for example in examples], pad_token_id)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if int(lengths.min()) == ids.shape[1]:
        return {"input_ids": ids}  # attention is faster without a mask
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def rng(*key: Sample) -> np.random.Generator:
    """Return a random generator that is a pure function of its key, such as (seed, epoch, sample)."""
    return np.random.default_rng(np.random.SeedSequence([key_of(part) for part in key]))


def two_sided_order(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Sort samples so that neighbours have similar lengths on both sides.

    The primary key is the longer side, which the token budget counts. Samples with an equal longer side are sorted by
    the difference between the first and the last side, alternately ascending and descending, so that neither side
    jumps when the longer one grows.

    Args:
        lengths: (N, sides) lengths in tokens, for example of source and target.
        order: (N,) a permutation that breaks ties.

    Returns:
        (N,) indices.
    """
    longest = lengths[order].max(axis=1)
    difference = lengths[order, 0] - lengths[order, -1]
    rank = np.unique(longest, return_inverse=True)[1]
    return order[np.lexsort((np.where(rank % 2, -difference, difference), longest))]


def cut(
    order: Sequence[int] | np.ndarray, longest: np.ndarray, max_tokens: int, max_samples: int | None = None
) -> list[list[int]]:
    """Cut an ordered list into runs of at most ``max_tokens`` padded tokens on the longer side.

    Args:
        order: indices of samples, none longer than ``max_tokens``.
        longest: (N,) tokens on the longer side of each sample.
        max_samples: maximum number of samples per run.
    """
    indices = np.asarray(order, dtype=np.int64)
    runs: list[list[int]] = []
    run: list[int] = []
    widest = 0
    for index, length in zip(indices.tolist(), longest[indices].tolist(), strict=True):
        full = max_samples is not None and len(run) >= max_samples
        if run and (full or (len(run) + 1) * max(widest, length) > max_tokens):
            runs.append(run)
            run, widest = [], 0
        run.append(index)
        widest = max(widest, length)
    if run:
        runs.append(run)
    return runs


def checked_counts(name: str, values: Any) -> np.ndarray:
    """Return counts (N,) or (N, k) as an array.

    Raises:
        ValueError: if the array has other dimensions, or a value is negative or not an integer.
    """
    values = np.asarray(values)
    if values.ndim not in (1, 2):
        raise ValueError(f"{name} must have one or two dimensions, got shape {values.shape}")
    if values.size and not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} must be numbers, got {values.dtype}")
    wrong = ~((values >= 0) & (values == np.floor(values)))  # also true for NaN
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise ValueError(f"{name}[{row}] must be a whole number of at least 0, got {values[row].tolist()}")
    return values.astype(np.int64) if values.dtype.kind == "f" else values


class TokenBudgetSampler:
    """Steps of about equal cost: at most ``max_tokens`` padded tokens on the longer of source and target side.

    Args:
        lengths: (N,) or (N, sides) tokens of each sample.
        max_tokens: budget of a step in padded tokens (fairseq's ``--max-tokens``, summed over ranks).
        seed: determines the order, together with the epoch.
        shuffle: False keeps the steps sorted by length, for evaluation.
        max_samples: maximum number of samples per step.

    Raises:
        ValueError: if a single sample exceeds the budget, there are no samples, or a length is not a valid count.
    """

    unit = 1

    def __init__(
        self, lengths: np.ndarray, max_tokens: int, seed: int = 0, shuffle: bool = True, max_samples: int | None = None
    ):
        lengths = checked_counts("lengths", lengths)
        self.lengths = lengths[:, None] if lengths.ndim == 1 else lengths
        if len(self.lengths) == 0:
            raise ValueError("there are no samples to batch")
        self.longest = self.lengths.max(axis=1)
        self.max_tokens, self.seed, self.shuffle, self.max_samples = max_tokens, seed, shuffle, max_samples
        self.last: tuple[int | None, Steps] = (None, [])  # the epoch built last, and its steps
        self.check_budget("batch_tokens", max_tokens)

    def check_budget(self, name: str, tokens: int) -> None:
        """Raise if the budget ``tokens`` of the argument ``name`` is too small for a sample."""
        worst = int(self.longest.argmax())
        if self.longest[worst] > tokens:
            raise ValueError(
                f"{name} must be at least the length of the longest sample, got {tokens} for sample {worst} of "
                f"{self.longest[worst]} tokens"
            )

    def cut(self, part: Sequence[int], tokens: int) -> Steps:
        """Split a part of a step into runs of at most ``tokens`` padded tokens."""
        return cut(part, self.longest, tokens)

    def steps(self, epoch: int) -> Steps:
        """Return the steps of an epoch, each a list of sample indices sorted by length."""
        if self.last[0] != epoch:
            self.last = epoch, self.make_steps(epoch)
        return self.last[1]

    def make_steps(self, epoch: int) -> Steps:
        """Build `steps`; takes seconds for millions of samples."""
        count = len(self.lengths)
        random = rng(self.seed, epoch)
        order = random.permutation(count) if self.shuffle else np.arange(count)
        steps = cut(two_sided_order(self.lengths, order), self.longest, self.max_tokens, self.max_samples)
        return [steps[i] for i in random.permutation(len(steps))] if self.shuffle else steps


class Sampler(Protocol):
    """The interface of a sampler, implemented by `TokenBudgetSampler` and `equal_batches.BatchSampler`.

    ``steps(epoch)`` returns lists of samples; ``cut`` splits a rank's part of a step into micro-batches;
    ``check_budget`` raises if ``size``, the value of the argument ``name``, is invalid. Groups of ``unit`` neighbours
    always stay together.
    """

    unit: int

    def steps(self, epoch: int) -> Steps: ...

    def cut(self, part: Sequence[Any], size: int) -> Steps: ...

    def check_budget(self, name: str, size: int) -> None: ...


def padding_waste(steps: Sequence[Sequence[int]], lengths: np.ndarray) -> float:
    """Return the fraction of padding tokens, over all sides, if each step is padded to its longest samples."""
    padded = sum(len(step) * lengths[list(step)].max(axis=0).sum() for step in steps)
    return 1.0 - lengths[[i for step in steps for i in step]].sum() / padded


def part_of_rank(step: Sequence[Any], rank: int, world_size: int, unit: int = 1) -> Sequence[Any]:
    """Return the contiguous part of a step for a rank, in whole units; samples of similar length stay together."""
    bounds = [round(math.ceil(len(step) / unit) * r / world_size) * unit for r in (rank, rank + 1)]
    return step[bounds[0] : bounds[1]]


class MicroBatches(list):
    """This rank's micro-batches of a step.

    Attributes:
        numbers: position of each in the whole step, over all ranks, dummy ones not counted. Random numbers drawn for a
            micro-batch depend on it, not on the rank.
        total: number of micro-batches of the whole step, dummy ones not counted.
        position: where a stream continues after this step, see `stream.StreamLoader`; None for other data.
    """

    numbers: Sequence[int] = ()
    total: int = 0
    position: dict[str, Any] | None = None

    def followed_by(self, others: "MicroBatches") -> "MicroBatches":
        """Return a step of these micro-batches and others, which come behind these of all ranks."""
        joined = MicroBatches([*self, *others])
        joined.numbers = [*self.numbers, *(self.total + number for number in others.numbers)]
        joined.total = self.total + others.total
        return joined


@dataclass(frozen=True, slots=True)
class StepPart:
    """The samples of a step that this rank collates.

    Args:
        runs: (examples, samples, is_dummy) of each micro-batch.
        first: number of micro-batches, dummy ones not counted, on the ranks before this one.
        total: see `MicroBatches`.
        epoch: number of the epoch.
    """

    runs: list[tuple[list[Example], list[Sample], bool]]
    first: int
    total: int
    epoch: int

    def collate(self, collate: Callable[..., Any]) -> MicroBatches:
        """Return the micro-batches; see `StepLoader` for ``collate``."""
        batches = MicroBatches(collate(examples, samples, self.epoch, dummy) for examples, samples, dummy in self.runs)
        batches.numbers = range(self.first, self.first + len(self.runs))
        batches.total = self.total
        return batches


class StepLoader:
    """Yields the steps of an epoch as lists of this rank's micro-batches.

    Args:
        examples: the data set.
        sampler: provides ``steps(epoch)``.
        collate: ``collate(examples, samples, epoch, is_dummy)`` -> batch. A dummy batch must not count;
            it is requested if a step has fewer samples than there are ranks.
        micro_batch_tokens: maximum size of a micro-batch, in padded tokens or the sampler's own unit; None computes a
            rank's part in one micro-batch.
        rank, world_size: this process and the number of processes.
        num_workers: number of worker processes; it never changes a batch.
        pin_memory: pin memory for faster copies to a GPU.

    Raises:
        ValueError: if ``micro_batch_tokens`` does not fit the samples.
    """

    def __init__(
        self,
        examples: Dataset | Sequence[Example],
        sampler: Sampler,
        collate: Callable[..., Any],
        micro_batch_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.examples, self.sampler, self.collate = examples, sampler, collate
        self.micro_batch_tokens, self.rank, self.world_size = micro_batch_tokens, rank, world_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        if micro_batch_tokens is not None:
            sampler.check_budget("micro_batch_tokens", micro_batch_tokens)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Return the number of optimizer steps in an epoch; may vary slightly between epochs."""
        return len(self.sampler.steps(epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """Yield this rank's micro-batches of every step of an epoch, starting at step ``start``."""
        steps = self.sampler.steps(epoch)
        order = range(start, len(steps))
        return iter(worker_loader(_StepDataset(self, steps, epoch), order, self.num_workers, self.pin_memory))

    def micro_batches(self, step: Sequence[Sample], epoch: int) -> MicroBatches:
        """Collate this rank's part of a step, see `part`."""
        return self.part(step, epoch).collate(self.collate)

    def part(self, step: Sequence[Sample], epoch: int) -> StepPart:
        """Fetch this rank's part of a step."""
        placed = place_step(step, self.sampler, self.micro_batch_tokens, self.world_size)
        return part_of_step(placed, self.rank, epoch, self.fetch)

    def fetch(self, run: Sequence[Sample]) -> tuple[list[Example], list[Sample]]:
        """Fetch the examples of a run; also return its samples."""
        return fetch(self.examples, [sample_ref(sample).index for sample in run]), list(run)


def place_step(
    step: Sequence[Sample], sampler: Sampler, micro_batch_tokens: int | None, world_size: int
) -> PlacedStep:
    """Divide a step: return for each rank its micro-batches, (samples, is_dummy).

    Every rank gets the same number of micro-batches, because sharded models communicate in each of them; dummy
    batches fill the gaps.
    """

    def runs(part: Sequence[Sample]) -> Steps:
        if micro_batch_tokens is None:
            return [list(part)] if len(part) else []
        return sampler.cut(part, micro_batch_tokens)

    found = [runs(part_of_rank(step, rank, world_size, sampler.unit)) for rank in range(world_size)]
    most = max(map(len, found))
    return [[(run, False) for run in own] + [(step[:1], True)] * (most - len(own)) for own in found]


def part_of_step(
    placed: PlacedStep,
    rank: int,
    epoch: int,
    fetch: Callable[[Sequence[Sample]], tuple[list[Example], list[Sample]]],
) -> StepPart:
    """Return a rank's part of a step.

    Args:
        placed: see `place_step`.
        fetch: samples -> their examples, and the samples as ``collate`` receives them.
    """
    counts = [sum(not is_dummy for _, is_dummy in own) for own in placed]  # of each rank
    runs = [(*fetch(run), is_dummy) for run, is_dummy in placed[rank]]
    return StepPart(runs, sum(counts[:rank]), sum(counts), epoch)


def fetch(examples: Dataset | Sequence[Example], indices: list[int]) -> list[Example]:
    """Fetch several examples at once, with torch's ``__getitems__`` if available (much faster for `datasets`)."""
    if hasattr(examples, "__getitems__"):
        return examples.__getitems__(indices)
    return [examples[i] for i in indices]


class _StepDataset(Dataset):
    """Item i holds this rank's micro-batches of step i."""

    def __init__(self, loader: StepLoader, steps: Steps, epoch: int):
        self.loader, self.steps, self.number = loader, steps, epoch

    def __getitem__(self, i: int) -> list[Any]:
        return self.loader.micro_batches(self.steps[i], self.number)


def worker_loader(
    items: Dataset,
    order: Iterable[Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch: int | None = None,
) -> DataLoader:
    """Return torch's loader over the finished items of a data set, in ``order`` or as they are streamed.

    Args:
        prefetch: items that a worker prepares in advance; default: torch's.
    """
    return DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=_start_worker,
        # Own generator: a loader otherwise draws from torch's global one, so a resumed run would differ.
        generator=torch.Generator(),
    )


def _start_worker(_: int) -> None:
    # A cluster sends SIGTERM to every process of a job, but the training process still needs batches to finish its
    # step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # If the parent's tokenizer has used threads, a forked process would wait forever for threads it does not have.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # torch's worker ends after its parent too, but not if it waits to deliver a batch to it.
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
