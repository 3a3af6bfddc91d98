"""Work done by the main process whose result or error is shared with all processes."""

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import distributed_c10d

POLL_SECONDS = 0.1
Result = TypeVar("Result")
_calls = itertools.count()  # of `main_first`, equally many on all processes


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """Return the result of ``work`` on the main process, or raise its error, on all processes.

    Without sharing the error, the other processes would wait for the failed one.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Return the result of ``work``, whose costly part is cached on the disk: the other processes read that cache.

    The main process works first, then the first process of each other machine, which may have a cache of its own, then
    all others. They may wait for longer than the timeout of a process group. ``work`` must not communicate.

    Raises:
        Exception: that of the first process that failed, on all processes.
    """
    if accelerator.num_processes == 1:
        return work()
    store, call = distributed_c10d._get_default_store(), next(_calls)
    turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    turns = gather_object([turn])
    done: list[Result] = []
    for now in sorted(set(turns)):
        key = f"hf-tfm/main-first/{call}/{now}"
        failed: Exception | None = None
        if turn == now:
            try:
                done.append(work())
            except Exception as error:
                failed = error
            store.add(key, 1)
        while store.add(key, 0) < turns.count(now):
            time.sleep(POLL_SECONDS)
        if errors := [error for error in gather_object([failed]) if error is not None]:
            raise errors[0]
    return done[0]
