"""Batches of a stream, which continue at any step without reading the stream from its start.

    shards in shuffled order -> lanes -> rounds of pieces -> pools of samples -> steps -> a part for each rank

The shards of a stream (files, see `datasets.IterableDataset.num_shards`) are shuffled by (seed, epoch) and dealt to
*lanes*, which are read at the same time. A *round* takes a fixed number of *pieces*, a few rows each, from every lane.
Each piece is prepared by one worker of one rank, which keeps its samples and tells the other ranks their sizes; each
lane is read only where a piece of it is prepared. The samples of successive rounds form *pools*. Every rank batches a
pool by its sizes like a small data set, and then the samples are sent to the ranks that compute them.

Neither the number of ranks nor that of workers changes the order: lanes, pieces and pools do not depend on them.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .batching import (
    Example,
    MicroBatches,
    PlacedStep,
    Sample,
    Sampler,
    StepPart,
    part_of_rank,
    part_of_step,
    place_step,
    rng,
    sample_ref,
    shifted,
    worker_loader,
)
from .exchange import Alone, Exchange

PIECES = 64  # of a round, at least, if a lane has several; also the processes, over all ranks, that can share them

Position = dict[str, Any]
Prepare = Callable[[Mapping[str, list], list[int]], Mapping[str, list]]


@dataclass
class Lane:
    """The rows of some shards, one shard after the other.

    Args:
        rows: the stream.
        shards: numbers of its shards.
        piece_rows: rows that are read at once.
        shard: place in ``shards`` of the next row.
        state: position in that shard, its ``state_dict``; None at its start.
    """

    rows: datasets.IterableDataset
    shards: Sequence[int]
    piece_rows: int
    shard: int = 0
    state: dict[str, Any] | None = None

    def __post_init__(self):
        self.stream: datasets.IterableDataset | None = None
        self.batches: Iterator[dict[str, list]] = iter(())

    def read(self) -> dict[str, list]:
        """Return the next rows of one shard, by column; {} at the end."""
        while self.shard < len(self.shards):
            if self.stream is None:
                # Parts of a shard, such as row groups, are skipped without being read when a run is resumed.
                self.stream = self.rows.shard(self.rows.num_shards, self.shards[self.shard]).reshard()
                if self.state is not None:
                    self.stream.load_state_dict(self.state)
                # Not `iter(stream)`, which deals shards to the workers of torch's loader.
                self.batches = self.stream.iter(self.piece_rows)
            if (batch := next(self.batches, None)) is not None:
                return batch
            self.shard, self.stream, self.state = self.shard + 1, None, None
        return {}

    def position(self) -> Position:
        """Return ``shard`` and ``state`` of the next row, which can be written as JSON."""
        return {"shard": self.shard, "state": self.state if self.stream is None else self.stream.state_dict()}


@dataclass
class Piece:
    """A part of a round.

    Args:
        number: of the piece in its round.
        rank: that has prepared it.
        sizes: of its samples, see `StreamLoader`.
        samples: examples, in order; None on the other ranks.
        lane: position of its lane after the round, with the last piece of the lane alone.
        problem: why the rows cannot be read; the other fields are then empty.
    """

    number: int
    rank: int
    sizes: list[Sequence[int]]
    samples: list[Example] | None
    lane: Position | None = None
    problem: str | None = None


class Held(NamedTuple):
    """A sample of a pool: its size, and the rank that holds its example; on other ranks, ``example`` is None."""

    size: Sequence[int]
    rank: int
    example: Example | None


class StreamLoader:
    """`StepLoader` for a stream.

    A `MicroBatches` that it yields carries the `position` of the next step. `epoch` continues there, and reads only
    what the rest of the pool needs: whole rounds that hold it, and for formats without parts (JSON lines, text, CSV)
    the rows before them in the shards that are being read, which are skipped without being prepared.

    Args:
        stream: rows; read again in every epoch.
        sampler: (sizes (n, sides) of the samples of a pool, number of the first one in the epoch) -> sampler.
        collate: see `StepLoader`.
        size: example -> what its batching depends on: lengths of its sides, or height and width; default: nothing.
        seed: determines the order of the shards, together with the epoch.
        prepare: (rows by column, their indices) -> examples by column, not necessarily as many; default: the rows are
            the examples.
        pool_samples: number of samples that are batched together. Each rank holds its share of them in memory.
        max_lanes: number of shards that are read at the same time, at most.
        exchange: with the other ranks; needed if there are any.
        num_workers: number of worker processes that collate.
        num_readers: number of worker processes that read and prepare rows.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        sampler: Callable[[np.ndarray, int], Sampler],
        collate: Callable[..., Any],
        size: Callable[[Example], Sequence[int]] | None = None,
        seed: int = 0,
        prepare: Prepare | None = None,
        pool_samples: int = 20_000,
        max_lanes: int = PIECES,
        micro_batch_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
        num_workers: int = 0,
        num_readers: int = 0,
        pin_memory: bool = False,
    ):
        if exchange is None and world_size > 1:
            raise ValueError(f"exchange is needed for {world_size} ranks that read a stream together")
        self.stream, self.sampler, self.collate, self.size = stream, sampler, collate, size
        self.seed, self.prepare, self.pool_samples = seed, prepare, pool_samples
        self.micro_batch_tokens, self.rank, self.world_size = micro_batch_tokens, rank, world_size
        self.exchange: Exchange = exchange or Alone()
        self.num_workers, self.num_readers, self.pin_memory = num_workers, num_readers, pin_memory
        self.lanes = min(max_lanes, stream.num_shards)

    def steps_per_epoch(self, epoch: int = 0) -> None:
        """Return None: the length of a stream is unknown."""
        return None

    def epoch(self, epoch: int, start: int | Position = 0) -> Iterator[MicroBatches]:
        """Yield this rank's micro-batches of every step of an epoch.

        Args:
            start: number of the first step, up to which the stream is then read, or a position.

        Raises:
            ValueError: the position is of a stream with another number of shards.
        """
        positions: deque[Position] = deque()  # of the steps that workers are collating

        def parts() -> Iterator[StepPart]:
            for part, position in self.parts(epoch, start):
                positions.append(position)
                yield part

        loader = worker_loader(_Collated(self.collate), parts(), self.num_workers, self.pin_memory)
        for micro_batches in loader:
            micro_batches.position = positions.popleft()
            yield micro_batches

    def parts(self, epoch: int, start: int | Position) -> Iterator[tuple[StepPart, Position]]:
        """Yield this rank's part of every step from ``start`` on, and the position after it."""
        position = start if isinstance(start, dict) else None
        number = position["pool_step"] if position else 0  # of the next step
        first_step = position["step"] if position else start
        for pool, begin in self.pools(epoch, position):
            first = begin["sample"]
            sampler = self.sampler(np.array([held.size for held in pool]), first)
            if self.micro_batch_tokens is not None:
                sampler.check_budget("micro_batch_tokens", self.micro_batch_tokens)
            steps = sampler.steps(epoch)
            begin["pool_step"] = number
            done = min(max(0, first_step - number), len(steps))
            placed = [place_step(step, sampler, self.micro_batch_tokens, self.world_size) for step in steps[done:]]
            examples = self.delivered(pool, placed)
            own = functools.partial(of_pool, examples, first)
            for i, step in enumerate(placed, start=number + done + 1):
                yield part_of_step(step, self.rank, epoch, own), {**begin, "step": i}
            number += len(steps)

    def delivered(self, pool: list[Held], steps: Sequence[PlacedStep]) -> dict[int, Any]:
        """Send the samples of a pool to the ranks that compute them.

        Args:
            pool: is emptied.
            steps: see `place_step`.

        Returns:
            Those of this rank, {place in the pool: example}.
        """
        wanted: list[set[int]] = [set() for _ in range(self.world_size)]
        for step in steps:
            for places, runs in zip(wanted, step, strict=True):
                places.update(sample_ref(sample).index for run, _ in runs for sample in run)
        own = [[(i, pool[i].example) for i in sorted(places) if pool[i].rank == self.rank] for places in wanted]
        pool.clear()
        return dict(self.exchange.deal(own))

    def pools(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[Held], Position]]:
        """Yield the samples of each pool, and where it begins."""
        first = position["sample"] if position else 0
        skipped = position["skipped"] if position else 0  # samples of the first round that an earlier pool has
        held: list[Held] = []
        rounds: list[tuple[int, Position]] = []  # place in ``held`` of the first sample of a round; its beginning

        def take() -> tuple[list[Held], Position]:
            nonlocal held, first, rounds
            while len(rounds) > 1 and rounds[1][0] <= 0:
                rounds = rounds[1:]
            begin, round_begin = rounds[0]
            pool, held = held[: self.pool_samples], held[self.pool_samples :]
            rounds = [(place - len(pool), at) for place, at in rounds]
            first += len(pool)
            return pool, {**round_begin, "skipped": -begin, "sample": first - len(pool)}

        for samples, round_begin in self.rounds(epoch, position):
            rounds.append((len(held) - skipped, round_begin))
            held += samples[skipped:]
            skipped = 0
            while len(held) >= self.pool_samples:
                yield take()
        if held:
            yield take()

    def rounds(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[Held], Position]]:
        """Yield the samples of each round, and where it begins."""
        shards = self.stream.num_shards
        if position and position["shards"] != shards:
            raise ValueError(
                f"the stream has {shards} shards, but the run to be resumed was reading {position['shards']}: "
                "the data set has changed"
            )
        number = position["round"] if position else 0
        # An epoch keeps its number of lanes: earlier versions had another one for images.
        lanes = position["lanes"] if position else [{"shard": 0, "state": None}] * self.lanes
        count, each = len(lanes), pieces_of_lane(len(lanes))
        readers = max(1, self.num_readers)
        items = -(-count * each // (self.world_size * readers))  # of a reader in a round
        order = shard_order(self.seed, epoch, shards)
        reader = iter(worker_loader(_Reader(self, order, number, lanes), None, self.num_readers, prefetch=items))
        while any(lane["shard"] < len(order[i::count]) for i, lane in enumerate(lanes)):
            begin = {"shards": shards, "round": number, "lanes": lanes}
            mine = {piece.number: piece for piece in itertools.islice(reader, items * readers) if piece is not None}
            pieces = self.exchange.gather([replace(piece, samples=None) for piece in mine.values()])
            if problem := next((piece.problem for piece in pieces if piece.problem), None):
                raise ValueError(problem)
            pieces = [mine.get(piece.number, piece) for piece in sorted(pieces, key=lambda piece: piece.number)]
            lanes = [piece.lane for piece in pieces if piece.lane is not None]
            turns = (pieces[k::each] for k in range(each))  # of all lanes
            yield [held for turn in turns for piece in turn for held in held_of(piece)], begin
            number += 1


def of_pool(examples: Mapping[int, Example], first: int, run: Sequence[Sample]) -> tuple[list[Example], list[Sample]]:
    """Return the examples of samples of a pool, and the samples as those of the epoch.

    Args:
        examples: by place in the pool.
        first: number of the first sample of the pool in the epoch.
    """
    return [examples[sample_ref(sample).index] for sample in run], [shifted(sample, first) for sample in run]


def held_of(piece: Piece) -> Iterator[Held]:
    """Yield the samples of a piece."""
    for i, size in enumerate(piece.sizes):
        yield Held(size, piece.rank, piece.samples and piece.samples[i])


def pieces_of_lane(lanes: int) -> int:
    """Return the number of pieces that a round takes from each lane."""
    return max(1, PIECES // lanes)


def pool_seed(seed: int, first: int) -> int:
    """Return the seed of the sampler of a pool; ``first`` is the number of its first sample."""
    return int(rng(seed, first).integers(2**32))


def shard_order(seed: int, epoch: int, shards: int) -> list[int]:
    """Return the numbers of all shards in the order of an epoch."""
    return rng(seed, epoch).permutation(shards).tolist()


class _Reader(IterableDataset):
    """The pieces of all rounds that this worker of this rank prepares; equally many items for each, some None."""

    def __init__(self, loader: StreamLoader, order: Sequence[int], first_round: int, lanes: Sequence[Position]):
        self.stream, self.prepare, self.size = loader.stream, loader.prepare, loader.size
        self.rank, self.world_size = loader.rank, loader.world_size
        self.order, self.first_round, self.positions = order, first_round, lanes
        self.lanes, self.lane_pieces = len(lanes), pieces_of_lane(len(lanes))
        self.piece_rows = -(-loader.pool_samples // (self.lanes * self.lane_pieces))

    def __iter__(self) -> Iterator[Piece | None]:
        worker, pieces = get_worker_info(), self.lanes * self.lane_pieces
        reader, readers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = part_of_rank(range(pieces), self.rank * readers + reader, self.world_size * readers)
        lanes = {
            i: Lane(self.stream, self.order[i :: self.lanes], self.piece_rows, **self.positions[i])
            for i in dict.fromkeys(piece // self.lane_pieces for piece in mine)
        }
        empty = -(-pieces // (self.world_size * readers)) - len(mine)
        for number in itertools.count(self.first_round):
            try:
                yield from self.round(lanes, mine, number * pieces)
            except ValueError as error:  # all ranks raise it, so that none waits for this one
                yield Piece(-1, self.rank, [], [], problem=str(error))
                return
            yield from [None] * empty

    def round(self, lanes: dict[int, Lane], mine: Sequence[int], first: int) -> Iterator[Piece]:
        """Yield the pieces ``mine`` of a round; the other pieces of the same lanes are read, too.

        Args:
            first: number of pieces of earlier rounds.
        """
        for i, lane in lanes.items():
            for k in range(self.lane_pieces):
                batch, piece = lane.read(), i * self.lane_pieces + k
                if piece not in mine:
                    continue
                samples = self.prepared(batch, (first + piece) * self.piece_rows)
                end = lane.position() if k == self.lane_pieces - 1 else None
                sizes = [self.size(sample) if self.size else () for sample in samples]
                yield Piece(piece, self.rank, sizes, samples, end)

    def prepared(self, batch: Mapping[str, list], first: int) -> list[Example]:
        """Return the examples of the rows of a piece; ``first`` is the index of its first row."""
        if not batch:
            return []
        if self.prepare is not None:
            batch = self.prepare(batch, list(range(first, first + len(next(iter(batch.values()))))))
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


class _Collated(Dataset):
    """Collates the part of a step that is its own index."""

    def __init__(self, collate: Callable[..., Any]):
        self.collate = collate

    def __getitem__(self, part: StepPart) -> MicroBatches:
        return part.collate(self.collate)
