"""SIGTERM: recorded, raised as an exception where requested, or ends the process with status 0."""

import multiprocessing
import os
import signal

import pytest

from hf_tfm.training.sigterm import Interrupted, StopRequest, install_sigterm_handler


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_request_is_recorded_and_the_old_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.set
        terminate()
        assert request.set
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("early", [False, True])
def test_interruptible_block_is_left_at_once(early):
    done = []
    with StopRequest() as request:
        with pytest.raises(Interrupted):
            if early:
                terminate()
            with request.at_once():
                terminate()
                done.append("the rest")
        terminate()  # a second signal is only recorded
    assert request.set and not done


def test_uninterruptible_block_is_finished():
    done = []
    with StopRequest() as request, request.at_once(False):
        terminate()
        done.append("the rest")
    assert request.set and done


def stop_child_then_self(reports) -> None:
    """A process that receives SIGTERM after its forked child did."""
    install_sigterm_handler()
    if (child := os.fork()) == 0:
        terminate()
        os._exit(1)
    reports.put(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    reports.close()
    reports.join_thread()
    terminate()
    os._exit(1)


def test_sigterm_outside_of_training_exits_with_status_0(capfd):
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    process = context.Process(target=stop_child_then_self, args=(reports,))
    process.start()
    assert reports.get(timeout=60) == -signal.SIGTERM  # the child dies by the signal
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err.count("run the same command to resume") == 1
