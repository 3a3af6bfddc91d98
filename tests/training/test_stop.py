"""SIGTERM: noted, left by an exception where that was asked for, or the end of the process with status 0."""

import multiprocessing
import os
import signal

import pytest

from hf_tfm.training.sigterm import Interrupted, StopRequest, install_sigterm_handler


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.set
        terminate()
        assert request.set
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("early", [False, True])
def test_what_may_be_left_at_once_is(early):
    done = []
    with StopRequest() as request:
        with pytest.raises(Interrupted):
            if early:
                terminate()
            with request.at_once():
                terminate()
                done.append("the rest")
        terminate()  # a second notice is only noted again
    assert request.set and not done


def test_what_must_be_finished_is():
    done = []
    with StopRequest() as request, request.at_once(False):
        terminate()
        done.append("the rest")
    assert request.set and done


def ended(reports) -> None:
    """A process that is told to end, after a child of its own that it forked."""
    install_sigterm_handler()
    if (child := os.fork()) == 0:
        terminate()
        os._exit(1)
    reports.put(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    reports.close()
    reports.join_thread()
    terminate()
    os._exit(1)


def test_outside_of_training_a_process_ends_well(capfd):
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    process = context.Process(target=ended, args=(reports,))
    process.start()
    assert reports.get(timeout=60) == -signal.SIGTERM  # a child ends as children do
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err.count("run the same command to resume") == 1
