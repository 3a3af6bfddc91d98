"""Processes that the launcher started are connected or refused, and no process waits without end for another."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from processes import run_ranks
from torch import distributed
from training_helpers import arguments

from hf_tfm.command import describe, is_expected
from hf_tfm.data import batching
from hf_tfm.launcher import check_world
from hf_tfm.training import sigterm
from hf_tfm.training.run import start_accelerator


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "started 2 processes .* but 1 can be connected: .*ACCELERATE_USE_CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch was asked for several"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a", "ACCELERATE_MIXED_PRECISION": "no"}, None),
    ],
)
def test_lone_process_of_several_is_refused(monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if told is None:
        check_world(1)
        return
    with pytest.raises(ValueError, match=told):
        check_world(1)


def wait_in_vain(folder: Path) -> None:
    """Rank 0 waits for rank 1, which waits until that has failed."""
    del os.environ["ACCELERATE_USE_CPU"]  # as after torchrun
    accelerator = start_accelerator(arguments(folder, ddp_timeout=1))
    print("rank", accelerator.process_index, "of", accelerator.num_processes)
    if accelerator.is_main_process:
        try:
            accelerator.wait_for_everyone()
        except RuntimeError as error:
            assert is_expected(error)
            (folder / "error").write_text(describe(error))
    else:
        while not (folder / "error").exists():
            time.sleep(0.01)


def test_processes_without_a_gpu_are_connected_and_wait_no_longer_than_ddp_timeout(tmp_path):
    done = run_ranks(wait_in_vain, tmp_path)
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
    assert (tmp_path / "error").read_text().startswith("another process has not answered within ddp_timeout")


def wait_for_the_others(ready) -> None:
    sigterm.STUCK_SECONDS = 0.5
    sigterm.install_sigterm_handler()
    sigterm.Watchdog.install(on_cpu=True)
    store = distributed.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=60))
    ready.set()
    store.get("of a process that does not answer")


def work_on(ready) -> None:
    sigterm.STUCK_SECONDS = 0.5
    sigterm.Watchdog.install(on_cpu=True)
    with sigterm.StopRequest() as request:
        ready.set()
        while not request.set:
            time.sleep(0.01)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            sum(range(1000))
        with sigterm.Watchdog.paused():
            time.sleep(1)
    time.sleep(1)


@pytest.mark.parametrize(("work", "status"), [(wait_for_the_others, 143), (work_on, 0)])
def test_process_that_waits_for_another_ends_soon_after_sigterm(work, status, capfd):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,))
    process.start()
    assert ready.wait(60)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == status
    assert ("run the same command to resume from the last checkpoint" in capfd.readouterr().err) == (status != 0)


def parent_of_a_worker(reports) -> None:
    batching.PARENT_SECONDS = 0.05
    if (worker := os.fork()) == 0:
        batching._start_worker(0)
        time.sleep(60)
        os._exit(0)
    reports.send(worker)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_worker_ends_with_its_killed_parent():
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    process = context.Process(target=parent_of_a_worker, args=(send,))
    process.start()
    worker = psutil.Process(receive.recv())
    process.join(60)
    end = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)
