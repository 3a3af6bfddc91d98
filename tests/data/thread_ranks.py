"""Ranks of a stream that are threads of one process."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor


class ThreadExchange:
    """The exchange of ranks that are threads; counts the objects that were dealt to this one."""

    def __init__(self, rank, parts, barrier):
        self.rank, self.parts, self.barrier, self.dealt = rank, parts, barrier, 0

    def swap(self, mine):
        self.parts[self.rank] = mine
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def gather(self, objects):
        assert all(piece.samples is None for piece in objects), "sizes alone are told to all"
        return list(itertools.chain(*self.swap(objects)))

    def deal(self, parts):
        found = list(itertools.chain(*(theirs[self.rank] for theirs in self.swap(parts))))
        self.dealt += len(found)
        return found


def run_on_ranks(world, make, epoch=0, start=0, count=None, **options):
    """The first ``count`` steps of each rank, and how many examples it was sent.

    Args:
        make: makes the loader of a rank.
    """
    parts, barrier = [None] * world, threading.Barrier(world, timeout=60)

    def run(rank):
        exchange = ThreadExchange(rank, parts, barrier)
        loader = make(**options, rank=rank, world_size=world, exchange=exchange)
        try:
            return list(itertools.islice(loader.epoch(epoch, start), count)), exchange.dealt
        except ValueError:  # of the data: all ranks must raise it
            raise
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(run, range(world)))
