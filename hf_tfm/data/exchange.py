"""Objects that the processes of a run exchange while they read a stream together."""

import itertools
import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed


class Exchange(Protocol):
    """Exchange between ranks; each method is called by all of them, in the same order.

    ``gather`` returns the lists of all ranks, concatenated in the order of ranks; ``deal`` takes one list for each
    rank, and returns those for this rank, concatenated likewise.
    """

    def gather(self, objects: list[Any]) -> list[Any]: ...

    def deal(self, parts: Sequence[list[Any]]) -> list[Any]: ...


class Alone:
    """The exchange of a single rank."""

    def gather(self, objects: list[Any]) -> list[Any]:
        """See `Exchange`."""
        return objects

    def deal(self, parts: Sequence[list[Any]]) -> list[Any]:
        """See `Exchange`."""
        return parts[0]


class ProcessExchange:
    """The exchange of a process group, through host memory: it neither waits for a GPU nor takes its memory.

    Args:
        timeout: of one exchange.
    """

    def __init__(self, timeout: timedelta):
        gloo = distributed.get_backend() == "gloo"
        self.group = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo", timeout=timeout)

    def gather(self, objects: list[Any]) -> list[Any]:
        """See `Exchange`."""
        found: list[list[Any]] = [[]] * distributed.get_world_size(self.group)
        distributed.all_gather_object(found, objects, group=self.group)
        return list(itertools.chain(*found))

    def deal(self, parts: Sequence[list[Any]]) -> list[Any]:
        """See `Exchange`."""
        pickled = [pickle.dumps(part) for part in parts]
        sent = torch.tensor([len(part) for part in pickled])
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self.group)
        content = torch.frombuffer(bytearray(b"".join(pickled)), dtype=torch.uint8)
        del pickled
        found = torch.empty(int(received.sum()), dtype=torch.uint8)
        distributed.all_to_all_single(found, content, received.tolist(), sent.tolist(), group=self.group)
        own = memoryview(found.numpy())
        ends = received.cumsum(0).tolist()
        return list(itertools.chain(*(pickle.loads(own[a:b]) for a, b in itertools.pairwise([0, *ends]))))
