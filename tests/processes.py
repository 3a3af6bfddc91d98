"""Start Python functions and command lines in forks of servers that have imported the libraries once.

A new process imports torch, transformers and hf_tfm in six to ten seconds; a fork has them in milliseconds. A test
process starts up to three servers, each when it is first needed and each a fork of the one before:

    torch       everything that reads no HF_* variable while it is imported; for processes with their own HF_HOME
                or HF_ENDPOINT
    libraries   also transformers, datasets, accelerate and timm, but not hf_tfm; for processes without the package or
                with plug-ins, which are found when hf_tfm is imported
    package     also hf_tfm; the default

A fork is the leader of a session of its own, so signals can be sent to it and to its children. Its environment, its
working directory, its import path and its standard streams are those a new process would have; variables that were
read by an import cannot be changed, which `start` checks. The end of the tests, or of their process, ends all.
"""

import atexit
import importlib
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVERS = {
    "torch": (
        *("torch", "torch._dynamo", "torch.distributed.tensor", "torchvision.transforms.v2", "numpy", "pandas"),
        *("pyarrow.dataset", "PIL.Image", "scipy.optimize", "sklearn.metrics", "matplotlib.pyplot", "jinja2"),
        *("aiohttp", "dill", "yaml", "psutil", "sacrebleu", "jsonargparse"),
    ),
    "libraries": (
        *("transformers.modeling_utils", "transformers.generation", "transformers.trainer", "accelerate", "datasets"),
        *("evaluate", "timm", "tokenizers", "faster_coco_eval", "torch.utils.tensorboard"),
    ),
    "package": (
        *("hf_tfm.cli", "hf_tfm.tasks.evaluation", "hf_tfm.tasks.panoptic_segmentation", "hf_tfm.training.trainer"),
        *("hf_tfm.tasks.language_modeling", "hf_tfm.tasks.images", "hf_tfm.doctor.detection"),
        *("hf_tfm.tasks.distillation", "hf_tfm.conversion", "hf_tfm.viz.images"),
    ),
}
# Beginnings of the names of variables that the modules of a server read while they are imported.
READ_AT_IMPORT = {"torch": ("MKL_", "MPL"), "libraries": ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_")}
READ_AT_RUN_TIME = ("HF_TFM_", "HF_TOKEN")
THREADS = "OMP_NUM_THREADS"
ENVIRONMENT = {**os.environ, THREADS: "1"}  # of the servers; tests may change that of this process


@dataclass
class Output:
    """Output of processes that ended successfully."""

    stdout: str
    stderr: str


class ForkedProcess:
    """A running or ended process, with the methods of `subprocess.Popen` that tests use.

    Args:
        connection: to its server, which sends the process id and, after its end, its exit status.
        stdout, stderr: files that receive its output; one file for both if they are equal.
    """

    def __init__(self, connection: Connection, stdout: Path, stderr: Path):
        self.connection, self.stdout, self.stderr = connection, stdout, stderr
        self.returncode: int | None = None
        self.pid: int = connection.recv()

    def poll(self) -> int | None:
        """Exit status, the negative number of the signal that ended it, or None while it runs."""
        if self.returncode is None and self.connection.poll():
            self.returncode = self.connection.recv()
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end; returns the exit status.

        Raises:
            TimeoutError: after ``timeout`` seconds; the process and its children are killed.
        """
        if self.returncode is None and not self.connection.poll(timeout):
            self.end()
            raise TimeoutError(f"the process did not end within {timeout} s\n{self.output()[-4000:]}")
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill this process alone."""
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and its children if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.returncode = self.connection.recv()

    def output(self) -> str:
        """Text of both streams until now."""
        return "".join(path.read_text(errors="replace") for path in dict.fromkeys((self.stdout, self.stderr)))


def start(
    work: Callable[..., Any] | str,
    *args: Any,
    environment: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    server: str = "package",
    merge: bool = True,
) -> ForkedProcess:
    """Start a process.

    Args:
        work: a function of a module that can be imported, called with ``args``; or the first word of a command line of
            Python: "-m", "-c" or a file, as after "python".
        environment: of the process; by default that of this one.
        cwd: working directory.
        server: key of `SERVERS`.
        merge: write standard error to the file of standard output.

    Raises:
        ValueError: the environment differs from the server's in a variable that an import has read.
    """
    environment = dict(os.environ if environment is None else environment)
    names = list(SERVERS)[: list(SERVERS).index(server) + 1]
    fixed = tuple(prefix for name in names for prefix in READ_AT_IMPORT.get(name, ()))
    for name in environment.keys() | ENVIRONMENT.keys():
        if name.startswith(fixed) and not name.startswith(READ_AT_RUN_TIME):
            own, given = ENVIRONMENT.get(name), environment.get(name)
            if own != given:
                raise ValueError(
                    f"the server {server!r} has read {name}={own!r}, got {given!r}: choose an earlier one"
                )
    folder = Path(tempfile.mkdtemp(dir=server_of("torch").folder))
    stdout, stderr = folder / "stdout", folder / ("stdout" if merge else "stderr")
    stdout.touch()
    stderr.touch()
    request = {
        "work": pickle.dumps((work, args)),
        "environment": environment,
        "cwd": str(cwd or Path.cwd()),
        "path": sys.path if callable(work) else None,
        "stdout": str(stdout),
        "stderr": str(stderr),
    }
    return ForkedProcess(server_of(server).send(request), stdout, stderr)


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of this process without the variables of the Hugging Face libraries, then changed."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **changes}


def finish(process: ForkedProcess, expected: int = 0, timeout: float = 200) -> str:
    """Wait for the end of a process and check its exit status; returns its output."""
    status = process.wait(timeout)
    assert status == expected, f"exit status {status}\n{process.output()[-4000:]}"
    return process.output()


def run_ranks(
    work: Callable[..., Any] | str,
    *args: Any,
    world_size: int = 2,
    environment: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float = 240,
) -> Output:
    """Run the ranks of a process group on this machine, with the variables that torch.distributed.run sets.

    Args:
        work, args, environment, cwd: as in `start`.
        timeout: seconds until all ranks are killed.

    Returns:
        The output of all ranks, that of rank 0 first.

    Raises:
        AssertionError: a rank failed; the others are killed.
    """
    from torch.distributed import TCPStore

    # Kept here, as by the agent of torch.distributed.run, so that its port is never free for another process.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **(os.environ if environment is None else environment),
        **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "ROLE_WORLD_SIZE": str(world_size)},
        **{"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "ROLE_NAME": "default"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none"},
        **{THREADS: "1", "ACCELERATE_USE_CPU": "true"},
    }
    ranks: list[ForkedProcess] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in map(str, range(world_size)):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
            ranks.append(start(work, *args, environment=own, cwd=cwd, merge=False))
        running = list(ranks)
        while running:
            for ended in wait([rank.connection for rank in running], timeout=max(0, deadline - time.monotonic())):
                status = next(rank for rank in running if rank.connection is ended).poll()
                running = [rank for rank in running if rank.connection is not ended]
                assert status == 0, f"exit status {status}\n{shown(ranks)}"
            assert time.monotonic() < deadline or not running, f"not done within {timeout} s\n{shown(ranks)}"
    finally:
        for rank in ranks:
            rank.end()
    return Output(*("".join(getattr(rank, name).read_text() for rank in ranks) for name in ("stdout", "stderr")))


def shown(ranks: list[ForkedProcess]) -> str:
    """The end of the output of every rank."""
    return "\n".join(f"rank {number}:\n{rank.output()[-3000:]}" for number, rank in enumerate(ranks))


class Server:
    """Client of a server.

    Args:
        name: key of `SERVERS`.
        base: the server it is a fork of; None for the first, which is a new process.
    """

    def __init__(self, name: str, base: "Server | None"):
        self.folder = base.folder if base else Path(tempfile.mkdtemp(prefix="hf-tfm-forks-"))
        self.address, log = str(self.folder / name), self.folder / "log"
        request = {"serve": self.address, "modules": SERVERS[name]}
        if base:
            self.connection = base.send(request)
        else:
            self.log = log.open("w")
            self.connection, other = Pipe()
            # Its standard input stays open as long as this process lives.
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                env={key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
                pass_fds=[other.fileno()],
            )
            other.close()
            self.connection.send(request)
        try:
            self.connection.recv()  # all is imported
        except (EOFError, ConnectionError):
            printed = log.read_text()[-4000:]
            if not base:
                self.close()
            raise RuntimeError(f"the server {name!r} did not start\n{printed}") from None

    def send(self, request: dict[str, Any]) -> Connection:
        connection = Client(self.address, "AF_UNIX")
        connection.send(request)
        return connection

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


RUNNING: dict[str, Server] = {}  # servers of this process; those after the first end with it


def server_of(name: str) -> Server:
    """The server of a name, started together with those before it if it does not run yet."""
    if name not in RUNNING:
        before = list(SERVERS)[: list(SERVERS).index(name)]
        RUNNING[name] = Server(name, server_of(before[-1]) if before else None)
    return RUNNING[name]


def close() -> None:
    """End the servers and their forks."""
    if "torch" in RUNNING:
        RUNNING["torch"].close()
    RUNNING.clear()


# --- the servers


def serve(address: str, modules: list[str], ready: Connection, site: list[str]) -> None:
    """Import modules, then fork for every request until the end of standard input.

    Args:
        address: path of the socket.
        ready: receives True after the imports.
        site: import path of a new process, without the folder of its script and without PYTHONPATH.
    """
    import gc

    sys.path[:] = [str(ROOT), *site]
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks need not look at these objects again
    gc.enable()
    os.fsync = lambda file: None  # a file that a killed process has written is there for others without it
    listener = Listener(address, "AF_UNIX", backlog=64)
    ready.send(True)
    children: dict[int, Connection] = {}
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    socket = listener._listener._socket  # multiprocessing has no public way to wait for it and for others
    while True:
        found = wait([socket, read, 0])
        if read in found:
            with suppress(BlockingIOError):
                os.read(read, 4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # children it left behind, such as workers of a data loader
                with children.pop(pid) as connection, suppress(OSError):
                    connection.send(os.waitstatus_to_exitcode(status))
        if 0 in found:
            for pid in children:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # a server in a fork leads no group, and ends as this one does
            for pid in children:
                os.waitpid(pid, 0)
            return
        if socket in found:
            connection = listener.accept()
            request = connection.recv()
            if pid := os.fork():
                children[pid] = connection
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (*children.values(), listener._listener._socket):
                other.close()
            os.close(read)
            os.close(write)
            if "serve" in request:
                with suppress(OSError):
                    serve_fork(request, connection, site)
                os._exit(1)
            run(request, connection, site)


def serve_fork(request: dict[str, Any], connection: Connection, site: list[str]) -> None:
    """Serve in a fork of another server."""
    try:
        serve(request["serve"], request["modules"], connection, site)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def run(request: dict[str, Any], connection: Connection, site: list[str]) -> None:
    """Execute the work of a request in this fork, and end it as the interpreter would."""
    os.setsid()
    connection.send(os.getpid())
    connection.close()
    status = 1
    try:
        prepare(request, site)
        work, args = pickle.loads(request["work"])
        if callable(work):
            work(*args)
        else:
            execute([work, *map(str, args)])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    with suppress(BaseException):
        threading._shutdown()
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def prepare(request: dict[str, Any], site: list[str]) -> None:
    """Give this fork the streams, the environment, the folder and the random numbers of a new process."""
    # The stream objects stay, because handlers of log messages hold them; the files below them are changed.
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout.reconfigure(write_through=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = request["path"] or [*given, *site]
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()  # Python's own generator is seeded by os.fork
    if (threads := int(os.environ.get(THREADS, 1))) != 1:
        sys.modules["torch"].set_num_threads(threads)


def execute(words: list[str]) -> None:
    """Execute a command line of Python."""
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    first = Connection(int(sys.argv[1]))
    given: dict[str, Any] = first.recv()
    serve(given["serve"], given["modules"], first, sys.path[1:])
    shutil.rmtree(Path(given["serve"]).parent, ignore_errors=True)  # should the test process have been killed
    os._exit(0)
