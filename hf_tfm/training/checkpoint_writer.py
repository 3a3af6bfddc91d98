"""Checkpoints written by a background thread while training continues.

    step -> copy of all tensors in host memory -> next step
                   `-> thread: files, synced and hashed -> state.json -> rename -> older checkpoints are deleted

Training waits for the copy only, and at the next save for a write that has not ended yet: at most one is in flight,
and at most one copy is held. An error of the thread is raised at the next step or save, on all processes. Whatever
ends the process in mid-write leaves the checkpoint before.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

from ..hub.saved_files import CHECKPOINTS
from ..writing import explain_write_errors
from .checkpoint import Progress, begin_checkpoint, checkpoint_path, take_snapshot, update_progress, write_checkpoint
from .ranks import on_main
from .sigterm import Watchdog


class CheckpointWriter:
    """Writes the checkpoints of a run in their order; every process has one.

    As a context manager, it waits for the write in flight, also if an error ends the run.

    Args:
        output_dir: folder of the run.
        shards: each process writes its own shards; all must see the folder.
        timeout: seconds that one process waits for the shards of another.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, shards: bool = False, timeout: int = 1800):
        self.accelerator, self.output_dir = accelerator, output_dir
        # Of their own, because the threads communicate while the main ones do.
        limit = timedelta(seconds=timeout)
        self.group = distributed.new_group(backend="gloo", timeout=limit) if shards else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.jobs: list[Future[None]] = []
        self.error: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        with Watchdog.paused():
            self.thread.shutdown()

    def save(self, progress: Progress, *state: Any) -> None:
        """Copy the state of this step and begin to write its checkpoint; every process must call it.

        Args:
            state: arguments of `checkpoint.take_snapshot` after the first two.

        Raises:
            WriteError: this checkpoint cannot be begun, or an earlier one was not written.
        """
        self.wait()
        folder = checkpoint_path(self.output_dir, progress.step)
        with Watchdog.paused():
            snapshot = take_snapshot(self.accelerator, progress, *state, shards=self.group is not None)
            on_main(self.accelerator, lambda: begin_checkpoint(folder))
        self.submit(lambda: write_checkpoint(folder, snapshot, self.group), everywhere=self.group is not None)

    def update(self, progress: Progress) -> None:
        """Replace the progress in the checkpoint of this step, after it is written."""
        folder, content = checkpoint_path(self.output_dir, progress.step), deepcopy(progress)
        self.submit(lambda: update_progress(folder, content))

    def submit(self, job: Callable[[], None], everywhere: bool = False) -> None:
        """Run a job after those before it, unless one of them has failed; on the main process or ``everywhere``."""
        if everywhere or self.accelerator.is_main_process:
            self.jobs.append(self.thread.submit(self.run, job))

    def run(self, job: Callable[[], None]) -> None:
        if self.error is None:
            try:
                job()
            except BaseException as error:
                self.error = error

    def wait(self, shared: bool = True) -> None:
        """Wait until all jobs are done; every process must call it.

        Args:
            shared: raise an error on all processes, which must be able to communicate.

        Raises:
            WriteError: a checkpoint was not written.
        """
        with Watchdog.paused():
            while self.jobs:
                self.jobs[0].result()
                del self.jobs[0]
            errors = gather_object([self.error]) if shared and self.accelerator.num_processes > 1 else [self.error]
        for error in errors:
            if error is not None:
                raise error


def is_shared(accelerator: Accelerator, output_dir: Path) -> bool:
    """Return True if all processes see the output folder of the main process."""

    def create() -> Path:
        (output_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".part-step-", dir=output_dir / CHECKPOINTS))

    with explain_write_errors(output_dir):
        probe = on_main(accelerator, create)
    shared = all(gather_object([probe.is_dir()]))
    on_main(accelerator, probe.rmdir)
    return shared
