"""A polite end: SIGTERM, a cluster's notice that the job ends soon."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """SIGTERM came in what `StopRequest.at_once` surrounds."""


class StopRequest:
    """``with StopRequest() as request:`` sets ``request.set`` on SIGTERM instead of ending the process."""

    def __init__(self):
        self.set, self.leave = False, False

    def __enter__(self) -> "StopRequest":
        self.main_thread = threading.current_thread() is threading.main_thread()
        if self.main_thread:  # Python delivers signals nowhere else
            self.before = signal.signal(signal.SIGTERM, self.notice)
        return self

    @contextmanager
    def at_once(self, on: bool = True) -> Iterator[None]:
        """SIGTERM ends what runs in here by `Interrupted`; it can be repeated, and may be long."""
        self.leave = on
        try:
            if on and self.set:
                raise Interrupted
            yield
        finally:
            self.leave = False

    def notice(self, *_: Any) -> None:
        self.set = True
        if self.leave:
            self.leave = False  # a second notice finds the state being saved
            raise Interrupted

    def __exit__(self, *_: Any) -> None:
        if self.main_thread:
            signal.signal(signal.SIGTERM, self.before)


def install_sigterm_handler() -> None:
    """From now on SIGTERM ends this process with exit status 0, where a `StopRequest` does not ask for more.

    Before and after the steps of a run there is nothing to save that the same command would not make again.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()

    def leave(*_: Any) -> None:
        if os.getpid() != process:  # a child that was forked since then, and is ended by its parent
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        print("asked to stop outside of training: the same command goes on", file=sys.stderr, flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
