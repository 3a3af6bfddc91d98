"""Graceful shutdown on SIGTERM, which a cluster sends before it ends a job."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """SIGTERM arrived inside `StopRequest.at_once`."""


class StopRequest:
    """``with StopRequest() as request:`` sets ``request.set`` on SIGTERM instead of ending the process."""

    def __init__(self):
        self.set, self.leave = False, False

    def __enter__(self) -> "StopRequest":
        self.main_thread = threading.current_thread() is threading.main_thread()
        if self.main_thread:  # Python handles signals only in the main thread
            self.before = signal.signal(signal.SIGTERM, self.notice)
        return self

    @contextmanager
    def at_once(self, on: bool = True) -> Iterator[None]:
        """Raise `Interrupted` on SIGTERM in this context; for long work that can be repeated."""
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
            self.leave = False  # a second SIGTERM must not interrupt saving
            raise Interrupted

    def __exit__(self, *_: Any) -> None:
        if self.main_thread:
            signal.signal(signal.SIGTERM, self.before)


def install_sigterm_handler() -> None:
    """Make SIGTERM end this process with exit status 0, outside of a `StopRequest`.

    Before and after the training steps there is no state to save: the same command reproduces it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()

    def leave(*_: Any) -> None:
        if os.getpid() != process:  # a forked child uses the default handler, so that its parent can end it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        print("asked to stop outside of training: run the same command to resume", file=sys.stderr, flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
