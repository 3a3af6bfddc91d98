"""Two nodes with a network of their own and torchrun's agents: processes are killed, and the network is cut."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
import psutil
import pytest
from processes import ForkedProcess, run_ranks
from recipe_helpers import command_line, environment, history, record, write_data
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_tfm.cli import main

TIMEOUT = 15  # --ddp_timeout, in seconds
SLACK = 45  # until a process that has noticed is gone, on a busy machine
OPTIONS = {
    **{"max_steps": 80, "save_steps": 5, "eval_steps": 40, "logging_steps": 1, "learning_rate": 0.01},
    **{"dataloader_num_workers": 1, "ddp_timeout": TIMEOUT},
}
RECIPE = "translation_train"
CLONE_NEWNET = 0x40000000


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def missing() -> str:
    """Why there are no network namespaces; "" if there are."""
    if not shutil.which("ip"):
        return "there is no command ip"
    name = f"hf-tfm-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces need root: {error.stderr.strip()}"
    return ""


class Nodes:
    """Two network namespaces that only see each other."""

    def __init__(self):
        self.names = [f"hf-tfm-{os.getpid()}-{number}" for number in (0, 1)]

    def __enter__(self) -> "Nodes":
        for name in self.names:
            ip("netns", "add", name)
        ends = [["netns", name] for name in self.names]
        ip("link", "add", "veth0", *ends[0], "type", "veth", "peer", "name", "veth0", *ends[1])
        for number, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_) -> None:
        for name in self.names:
            for pid in ip("netns", "pids", name).split():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(pid)).kill()
            ip("netns", "delete", name)

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def connect(self, on: bool) -> None:
        """Connect the nodes, or cut the network between them."""
        ip("-n", self.names[1], "link", "set", "veth0", "up" if on else "down")

    def give_up_early(self) -> None:
        """Let TCP drop unanswered connections after seconds; a launcher that waits for the other node notices only
        that, by default after a quarter of an hour."""
        for name in self.names:
            ip("netns", "exec", name, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")

    def launch(self, number: int, argv: list[str]) -> ForkedProcess:
        """Start a launcher on a node."""
        config = {
            **{"min_nodes": 2, "max_nodes": 2, "nproc_per_node": 1, "max_restarts": 3, "start_method": "fork"},
            **{"rdzv_backend": "c10d", "rdzv_endpoint": f"{self.address(0)}:29500", "run_id": "two-nodes"},
            "rdzv_configs": {
                **{"is_host": number == 0, "rank": number, "timeout": 900},
                **{"join_timeout": 4 * TIMEOUT, "read_timeout": 4 * TIMEOUT},
            },
            "local_addr": self.address(number),
        }
        variables = environment(GLOO_SOCKET_IFNAME="veth0")
        return processes.start(launch, self.names[number], config, argv, environment=variables)


def launch(name: str, config: dict[str, Any], argv: list[str]) -> None:
    """Code of a launcher: what torchrun does, in a network namespace, with forks as workers."""
    with open(f"/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    try:
        elastic_launch(LaunchConfig(**config), work)(argv)
    finally:
        end = time.monotonic() + SLACK
        while left := neighbours():
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.1)


def work(argv: list[str]) -> None:
    """Code of a rank."""
    sys.exit(main(["run", RECIPE, *argv]))


def neighbours() -> list[psutil.Process]:
    """Other processes in the network namespace of this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            same = os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net")
            if same and process.pid != os.getpid() and runs(process):
                found.append(process)
    return found


def runs(process: psutil.Process) -> bool:
    """False for a process that has ended, although its parent may not have noticed yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def worker(launcher: ForkedProcess) -> psutil.Process:
    """The process that a launcher has started for a rank."""
    (found,) = psutil.Process(launcher.pid).children()
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    return write_data(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run on two processes of this machine."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(work, command_line(data, folder, **OPTIONS), timeout=600)
    return folder


class Job:
    """A run on two nodes."""

    def __init__(self, nodes: Nodes, data: Path, folder: Path):
        self.nodes, self.folder, self.argv = nodes, folder, command_line(data, folder, **OPTIONS)
        self.launchers: list[ForkedProcess] = []

    def start(self) -> None:
        self.launchers = [self.nodes.launch(number, self.argv) for number in (0, 1)]

    def printed(self) -> str:
        return "\n".join(f"node {number}:\n{one.output()}" for number, one in enumerate(self.launchers))

    def wait_for_step(self, step: int) -> None:
        """Wait until a checkpoint of ``step`` or later is in place."""
        end = time.monotonic() + 300
        while all(int(path.name[5:]) < step for path in self.folder.glob("checkpoints/step-*")):
            assert time.monotonic() < end and all(one.poll() is None for one in self.launchers), self.printed()
            time.sleep(0.005)

    def wait(self, timeout: float) -> list[int]:
        """Wait for the launchers, which fail if they leave a process behind; returns their exit statuses."""
        return [launcher.wait(timeout) for launcher in self.launchers]


@pytest.fixture
def job(data, whole, tmp_path):
    with Nodes() as nodes:
        job = Job(nodes, data, tmp_path / "run")
        job.start()
        yield job


def assert_same(folder: Path, whole: Path) -> None:
    assert history(folder) == history(whole)
    assert record(folder).metrics == record(whole).metrics
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.mark.slow
def test_killed_processes_are_restarted(job, whole):
    """First the second node's, then that of the main process."""
    for number, step in ((1, 10), (0, 40)):
        job.wait_for_step(step)
        worker(job.launchers[number]).kill()
    assert job.wait(600) == [0, 0], job.printed()
    assert job.printed().count("resuming from") == 4, job.printed()  # twice on each node
    assert_same(job.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True])
def test_cut_network_ends_processes_within_the_timeout(job, whole, for_good):
    """They are restarted if the nodes are connected again; if not, the launchers end, and can be started again."""
    job.wait_for_step(20)
    workers = [worker(launcher) for launcher in job.launchers]
    job.nodes.connect(False)
    end = time.monotonic() + TIMEOUT + SLACK
    while any(map(runs, workers)):
        assert time.monotonic() < end, job.printed()
        time.sleep(0.1)
    assert job.printed().count("has not answered within ddp_timeout") == 2, job.printed()
    if for_good:
        job.nodes.give_up_early()
        assert 0 not in job.wait(8 * TIMEOUT + SLACK), job.printed()
        assert "left behind" not in job.printed()
    job.nodes.connect(True)
    if for_good:
        job.start()
    assert job.wait(600) == [0, 0], job.printed()
    assert "resuming from" in job.printed()
    assert_same(job.folder, whole)
