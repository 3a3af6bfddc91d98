"""Work of one process whose result, or error, all processes share."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """The result of ``work`` on the main process, or the error it raised, on all processes.

    So no process waits for one that has failed.
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
