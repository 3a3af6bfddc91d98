"""Batches of a stream, which continue at any step without reading the stream from its start.

    shards in shuffled order -> lanes -> rounds of pieces -> pools of samples -> steps -> a part for each rank

The shards of a stream (files, see `datasets.IterableDataset.num_shards`) are shuffled by (seed, epoch) and dealt to
*lanes*, which are read at the same time. A *round* takes a fixed number of *pieces*, a few rows each, from every lane.
Each piece is prepared (tokenized) by one worker of one rank, and the ranks exchange the results; each lane is read
only where a piece of it is prepared. The samples of successive rounds form *pools*, and each pool is batched like a
small data set.

Neither the number of ranks nor that of workers changes the order: lanes, pieces and pools do not depend on them.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .batching import (
    Example,
    MicroBatches,
    Sampler,
    StepLoader,
    StepPart,
    TokenBudgetSampler,
    part_of_rank,
    rng,
    worker_loader,
)

PIECES = 64  # of a round, at most; also the number of processes, over all ranks, that can prepare them at once

Position = dict[str, Any]
Prepare = Callable[[Mapping[str, list], list[int]], Mapping[str, list]]
Exchange = Callable[[list[Any]], list[Any]]


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
        samples: examples, in order.
        lane: position of its lane after the round, with the last piece of the lane alone.
        problem: why the rows cannot be read; the other fields are then empty.
    """

    number: int
    samples: list[Example]
    lane: Position | None = None
    problem: str | None = None


class StreamLoader:
    """`StepLoader` for a stream.

    A `MicroBatches` that it yields carries the `position` of the next step. `epoch` continues there, and reads only
    what the rest of the pool needs: whole rounds that hold it, and for formats without parts (JSON lines, text, CSV)
    the rows before them in the shards that are being read, which are skipped without being prepared.

    Args:
        stream: rows; read again in every epoch.
        measure: example -> lengths of its sides.
        prepare: (rows by column, their indices) -> examples by column, not necessarily as many; default: the rows are
            the examples. The ranks share this work.
        pool_samples: number of samples that are sorted and shuffled together.
        max_lanes: number of shards that are read at the same time, at most `PIECES`.
        exchange: list of this rank -> lists of all ranks, concatenated; needed for several ranks if there is
            ``prepare``. Without ``prepare``, every rank reads all rows.
        num_workers: number of worker processes that prepare rows, or without ``prepare``, that collate.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        measure: Callable[[Example], Sequence[int]],
        max_tokens: int,
        collate: Callable[..., Any],
        seed: int = 0,
        prepare: Prepare | None = None,
        pool_samples: int = 20_000,
        max_lanes: int = PIECES,
        micro_batch_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.stream, self.measure, self.max_tokens, self.collate = stream, measure, max_tokens, collate
        self.seed, self.prepare, self.pool_samples = seed, prepare, pool_samples
        self.micro_batch_tokens, self.rank, self.world_size = micro_batch_tokens, rank, world_size
        self.pin_memory = pin_memory
        few = min(1, num_workers)
        self.readers, self.collators = (num_workers, few) if prepare else (few, num_workers)
        self.exchange: Exchange = list
        # This rank and the number of ranks among which the pieces of a round are divided.
        self.share = 0, 1
        if prepare and world_size > 1:
            if exchange is None:
                raise ValueError(f"exchange is needed for {world_size} ranks that prepare rows together")
            self.exchange, self.share = exchange, (rank, world_size)
        self.lanes = min(max_lanes, PIECES, stream.num_shards)
        self.lane_pieces = PIECES // self.lanes
        self.pieces = self.lanes * self.lane_pieces
        self.piece_rows = -(-pool_samples // self.pieces)

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

        loader = worker_loader(_Collated(self.collate), parts(), self.collators, self.pin_memory)
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
            sampler = self.sampler(pool, int(rng(self.seed, first).integers(2**32)))
            placement = self.micro_batch_tokens, self.rank, self.world_size
            loader = StepLoader(pool, sampler, self.collate, *placement, first_index=first)
            begin["pool_step"] = number
            for step in sampler.steps(epoch):
                number += 1
                if number > first_step:
                    yield loader.part(step, epoch), {**begin, "step": number}

    def sampler(self, pool: list[Example], seed: int) -> Sampler:
        """Return the sampler that batches a pool."""
        lengths = np.array([self.measure(example) for example in pool])
        return TokenBudgetSampler(lengths, self.max_tokens, seed)

    def pools(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Yield the samples of each pool, and where it begins."""
        first = position["sample"] if position else 0
        skipped = position["skipped"] if position else 0  # samples of the first round that an earlier pool has
        held: list[Example] = []
        rounds: list[tuple[int, Position]] = []  # place in ``held`` of the first sample of a round; its beginning

        def take() -> tuple[list[Example], Position]:
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

    def rounds(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Yield the samples of each round, and where it begins."""
        shards = self.stream.num_shards
        if position and position["shards"] != shards:
            raise ValueError(
                f"the stream has {shards} shards, but the run to be resumed was reading {position['shards']}: "
                "the data set has changed"
            )
        number = position["round"] if position else 0
        lanes = position["lanes"] if position else [{"shard": 0, "state": None}] * self.lanes
        readers = max(1, self.readers)
        items = -(-self.pieces // (self.share[1] * readers))  # of a reader in a round
        reader = iter(worker_loader(_Reader(self, epoch, number, lanes), None, self.readers, prefetch=items))
        order = shard_order(self.seed, epoch, shards)
        while any(lane["shard"] < len(order[i :: self.lanes]) for i, lane in enumerate(lanes)):
            begin = {"shards": shards, "round": number, "lanes": lanes}
            mine = [piece for piece in itertools.islice(reader, items * readers) if piece is not None]
            pieces = sorted(self.exchange(mine), key=lambda piece: piece.number)  # lane by lane
            if problem := next((piece.problem for piece in pieces if piece.problem), None):
                raise ValueError(problem)
            lanes = [piece.lane for piece in pieces if piece.lane is not None]
            turns = (pieces[k :: self.lane_pieces] for k in range(self.lane_pieces))  # of all lanes
            yield [sample for turn in turns for piece in turn for sample in piece.samples], begin
            number += 1


def shard_order(seed: int, epoch: int, shards: int) -> list[int]:
    """Return the numbers of all shards in the order of an epoch."""
    return rng(seed, epoch).permutation(shards).tolist()


class _Reader(IterableDataset):
    """The pieces of all rounds that this worker of this rank prepares; equally many items for each, some None."""

    def __init__(self, loader: StreamLoader, epoch: int, first_round: int, lanes: Sequence[Position]):
        self.loader, self.number, self.first_round, self.positions = loader, epoch, first_round, lanes

    def __iter__(self) -> Iterator[Piece | None]:
        loader, worker = self.loader, get_worker_info()
        rank, ranks = loader.share
        reader, readers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = part_of_rank(range(loader.pieces), rank * readers + reader, ranks * readers)
        order = shard_order(loader.seed, self.number, loader.stream.num_shards)
        lanes = {
            i: Lane(loader.stream, order[i :: loader.lanes], loader.piece_rows, **self.positions[i])
            for i in dict.fromkeys(piece // loader.lane_pieces for piece in mine)
        }
        empty = -(-loader.pieces // (ranks * readers)) - len(mine)
        for number in itertools.count(self.first_round):
            try:
                yield from self.round(lanes, mine, number)
            except ValueError as error:  # all ranks raise it, so that none waits for this one
                yield Piece(0, [], problem=str(error))
                return
            yield from [None] * empty

    def round(self, lanes: dict[int, Lane], mine: Sequence[int], number: int) -> Iterator[Piece]:
        """Yield the pieces ``mine`` of a round; the other pieces of the same lanes are read, too."""
        loader = self.loader
        for i, lane in lanes.items():
            for k in range(loader.lane_pieces):
                batch, piece = lane.read(), i * loader.lane_pieces + k
                if piece not in mine:
                    continue
                last = k == loader.lane_pieces - 1
                yield Piece(piece, self.prepared(batch, number, piece), lane.position() if last else None)

    def prepared(self, batch: Mapping[str, list], number: int, piece: int) -> list[Example]:
        """Return the examples of the rows of a piece."""
        if not batch:
            return []
        rows = len(next(iter(batch.values())))
        if self.loader.prepare is not None:
            first = (number * self.loader.pieces + piece) * self.loader.piece_rows
            batch = self.loader.prepare(batch, list(range(first, first + rows)))
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


class _Collated(Dataset):
    """Collates the part of a step that is its own index."""

    def __init__(self, collate: Callable[..., Any]):
        self.collate = collate

    def __getitem__(self, part: StepPart) -> MicroBatches:
        return part.collate(self.collate)
