"""Work done by the main process whose result or error is shared with all processes."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


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
