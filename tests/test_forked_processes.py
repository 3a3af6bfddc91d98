"""The helper `processes`: forks behave as new processes do, and fail loudly."""

import os
import signal
import sys

import pytest
from processes import finish, run_ranks, start

PROCESS = "import os, sys; print(sys.argv, os.getcwd(), os.environ['SHADE'], os.getsid(0) == os.getpid())"
IMPORTED = "import sys; print(*[name in sys.modules for name in ('torch', 'huggingface_hub', 'timm', 'hf_tfm')])"
RANKS = """
import sys, time, torch.distributed as dist
dist.init_process_group("gloo")
print("rank", dist.get_rank(), "of", dist.get_world_size(), "reports", *sys.argv[1:])
if "fail" in sys.argv and dist.get_rank() == 1:
    raise ValueError("a fault")
time.sleep(600 if {"fail", "sleep"} & set(sys.argv) else 0)
"""


def exit_with(status) -> None:
    print("about to exit")
    sys.exit(status)


def test_command_line_environment_and_folder(tmp_path):
    process = start("-c", PROCESS, "one", 2, environment={**os.environ, "SHADE": "blue"}, cwd=tmp_path)
    assert finish(process) == f"['-c', 'one', '2'] {tmp_path} blue True\n"


@pytest.mark.parametrize(
    ("server", "found"),
    [("torch", "True False False False"), ("libraries", "True True True False"), ("package", "True True True True")],
)
def test_servers_have_imported_their_libraries_and_no_others(server, found):
    assert finish(start("-c", IMPORTED, server=server)) == f"{found}\n"


@pytest.mark.parametrize(("status", "expected", "more"), [(None, 0, ""), (3, 3, ""), ("a reason", 1, "a reason\n")])
def test_exit_status_of_a_function(status, expected, more):
    assert finish(start(exit_with, status), expected=expected) == f"about to exit\n{more}"


def test_error_is_a_trace_and_status_1():
    process = start("-c", "raise ValueError('a fault')", merge=False)
    with pytest.raises(AssertionError, match=r"exit status 1\n(.*\n)*ValueError: a fault"):
        finish(process)
    assert process.stdout.read_text() == "" and "ValueError: a fault" in process.stderr.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_a_process(number):
    process = start("-c", "import time; time.sleep(600)")
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == process.poll() == -number


def test_time_limit_kills_a_process():
    process = start("-c", "import time; print('started'); time.sleep(600)")
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
        process.wait(0.5)
    assert process.returncode == -signal.SIGKILL


def test_variables_read_by_imports_are_refused():
    with pytest.raises(ValueError, match=r"server 'libraries' has read HF_ENDPOINT=.*, got 'http://nowhere'"):
        start("-c", "", environment={**os.environ, "HF_ENDPOINT": "http://nowhere"}, server="libraries")
    assert finish(start("-c", "", environment={**os.environ, "HF_ENDPOINT": "http://nowhere"}, server="torch")) == ""


def test_ranks_form_a_process_group():
    assert run_ranks("-c", RANKS, "well").stdout == "rank 0 of 2 reports well\nrank 1 of 2 reports well\n"


def test_failure_of_one_rank_ends_the_others():
    with pytest.raises(AssertionError, match=r"exit status 1\n(.*\n)*rank 1:\nrank 1 of 2(.*\n)*ValueError: a fault"):
        run_ranks("-c", RANKS, "fail")


def test_time_limit_ends_all_ranks():
    with pytest.raises(AssertionError, match="not done within 1 s\nrank 0:"):
        run_ranks("-c", RANKS, "sleep", timeout=1)
