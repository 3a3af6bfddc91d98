"""Graceful shutdown on SIGTERM, which a cluster sends before it ends a job.

Main thread: Python's handler asks the run to end after this step, or leaves an evaluation at once, see `StopRequest`.
`Watchdog`: a thread that ends the process if its main thread is stuck, because it waits for another process.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

STUCK_SECONDS = 10.0  # torchrun and Kubernetes grant 30 seconds after SIGTERM
POLL_SECONDS = 1.0
STUCK_STATUS = 128 + signal.SIGTERM


class Interrupted(Exception):
    """SIGTERM arrived inside `StopRequest.at_once`."""


class StopRequest:
    """``with StopRequest() as request:`` sets ``request.set`` on SIGTERM instead of ending the process.

    Args:
        name: equal on all ranks, and different in every run and restart: torchrun keeps the store of the process group
            when it restarts the processes.
    """

    def __init__(self, name: str = ""):
        self.set, self.leave = False, False
        self.key = f"hf_tfm/stop/{name}"  # in the store of the process group

    def __enter__(self) -> "StopRequest":
        self.main_thread = threading.current_thread() is threading.main_thread()
        if self.main_thread:  # Python handles signals only in the main thread
            self.before = signal.signal(signal.SIGTERM, self.notice)
        return self

    @contextmanager
    def at_once(self, on: bool = True) -> Iterator[None]:
        """Raise `Interrupted` on SIGTERM in this context; for long work that can be repeated.

        With several ranks, SIGTERM on any of them ends the work on all: a rank that left would block the others.
        """
        if not on:
            yield
            return
        self.leave = True
        ended = threading.Event()
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        listener = threading.Thread(target=self.listen, args=(ended,), daemon=True)
        if several:
            listener.start()
        try:
            if self.set:
                raise Interrupted
            yield
        except Exception as error:
            self.leave = False
            if several and self.set:
                with suppress(RuntimeError):  # the process that holds the store has ended
                    _get_default_store().set(self.key, "1")
            if isinstance(error, Interrupted) or not (several and self.stopped_elsewhere()):
                raise
            raise Interrupted from error  # the connection to a rank that left
        finally:
            self.leave = False
            ended.set()
            if several:  # the end of the interpreter would abort it inside the store
                listener.join(STUCK_SECONDS)

    def stopped_elsewhere(self) -> bool:
        """Return True if a rank has left the work because of SIGTERM."""
        try:
            return _get_default_store().check([self.key])
        except RuntimeError:  # see above
            return False

    def listen(self, ended: threading.Event) -> None:
        """Send this process SIGTERM if another rank has received it."""
        while not ended.wait(POLL_SECONDS):
            if self.stopped_elsewhere():
                if not ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def notice(self, *_: Any) -> None:
        self.set = True
        if self.leave:
            self.leave = False  # a second SIGTERM must not interrupt saving
            raise Interrupted

    def __exit__(self, *_: Any) -> None:
        if self.main_thread:
            signal.signal(signal.SIGTERM, self.before)
            if Watchdog.installed is not None:
                Watchdog.installed.on_guard = False  # the state is saved


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


class Watchdog:
    """Ends this process if it has received SIGTERM and its main thread does not move.

    Python runs a signal handler in the main thread, between two of its instructions. A main thread that waits in a
    collective operation for a rank that has died, or does not answer, never gets there, and the launcher would wait
    for its whole grace period. This thread learns of the signal from the handler in C, which only writes a byte.

    Nothing is saved: the run resumes from its last checkpoint.
    """

    installed: "Watchdog | None" = None

    def __init__(self, on_cpu: bool):
        self.saving = self.on_guard = False
        self.main = threading.main_thread().ident
        known = on_cpu and hasattr(time, "pthread_getcpuclockid")  # not on Windows
        self.clock = time.pthread_getcpuclockid(self.main) if known else None
        self.pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self.watch, daemon=True).start()

    @classmethod
    def install(cls, on_cpu: bool) -> None:
        """Start the thread, once in a process; only in the main thread.

        Args:
            on_cpu: the main thread computes. Waiting for a GPU takes processor time as well.
        """
        if cls.installed is None and threading.current_thread() is threading.main_thread():
            cls.installed = cls(on_cpu)

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Wait for as long as it takes in this context, in which a rank writes and the others wait for it."""
        if cls.installed is None:
            yield
            return
        cls.installed.saving = True
        try:
            yield
        finally:
            cls.installed.saving = False

    def work(self) -> float:
        """Return the processor time that the main thread has used, in seconds; 0 if it says nothing."""
        return 0.0 if self.clock is None else time.clock_gettime(self.clock)

    def watch(self) -> None:
        while True:
            if signal.SIGTERM in os.read(self.pipe, 4096):
                self.on_guard = True
                self.guard()

    def guard(self) -> None:
        """End the process once its main thread is stuck; return if it has left its `StopRequest`."""
        frame, instruction, work, since = None, 0, 0.0, time.monotonic()
        while time.monotonic() < since + STUCK_SECONDS:
            time.sleep(STUCK_SECONDS / 50)
            if not self.on_guard:
                return
            now, used = sys._current_frames()[self.main], self.work()
            moved = now is not frame or now.f_lasti != instruction or used > work + STUCK_SECONDS / 100
            if moved or self.saving:
                frame, instruction, work, since = now, now.f_lasti, used, time.monotonic()
        print(
            f"asked to stop, but this process has waited for {STUCK_SECONDS:.0f} s, probably for another one that has "
            "ended: nothing is saved; run the same command to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STUCK_STATUS)
