"""Run command lines of hf-tfm, within resource limits, in forks of one process that has imported everything.

line of JSON {argv, folder, stdout, stderr} on standard input -> limits, `hf_tfm.cli.main` -> line of JSON {status,
seconds}

A fork takes some 0.1 s with the pages it copies, and a new process takes ten seconds for its imports. A fork whose
command was refused and left no state behind (see `state`) runs the next command too, so a case costs little more than
its own work. Run as a program, this file is the server; `Server` is its client.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 * 2**30  # limit of a case's data segment in bytes, imports included
CASES = 50  # limit of one fork
DONE = 77  # exit status of a fork that has answered all cases it has read
CPU_SECONDS, WALL_SECONDS = 60, 240  # wall-clock limit of a case; on a busy machine it runs out before the CPU limit


@dataclass
class Result:
    """Result of a case.

    Args:
        status: exit status; if negative, the signal that killed it.
        stdout, stderr: text.
        changed: files of the case's folder that were written, changed or lost.
        seconds: CPU time.
    """

    status: int
    stdout: str
    stderr: str
    changed: list[str]
    seconds: float

    @property
    def ours(self) -> list[str]:
        """Lines of standard error written by hf-tfm."""
        return [line for line in self.stderr.splitlines() if line.startswith("hf-tfm")]


def tree(folder: Path) -> dict[str, str]:
    """Content of every file below a folder, and empty folders, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):  # for example a pipe or a device
            found[name] = "special"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Server:
    """The forking process; one per test session.

    Args:
        home: folder for caches of datasets and the Hub, and for the models of `inputs.MODELS`.
        package: root folder of the checkout that holds hf_tfm; default, this repository.
        seconds: limit of CPU time per case.
    """

    def __init__(self, home: Path, package: Path | None = None, seconds: int = CPU_SECONDS):
        here = Path(__file__).resolve()
        root = package or here.parents[2]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_TFM")},
            **{
                "PYTHONPATH": str(root),
                "HF_HOME": str(home / "hf"),
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
            },
            **{"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"},
            **{"MPLBACKEND": "agg", "TOKEN": "", "COLUMNS": "200"},
        }
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, str(here), str(home), str(seconds)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
        )
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("the server for invalid inputs did not start")

    def run(self, argv: list[str], folder: Path) -> Result:
        """Run a command line in a folder."""
        before = tree(folder)
        outputs = {name: str(self.home / f"case.{name}") for name in ("stdout", "stderr")}
        self.process.stdin.write(json.dumps({"argv": argv, "folder": str(folder), **outputs}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        after = tree(folder)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        texts = {name: Path(path).read_text(errors="replace") for name, path in outputs.items()}
        return Result(**answer, **texts, changed=changed)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def warm_up() -> None:
    """Parse a few command lines, so that forks find what their libraries import and cache at first use."""
    from hf_tfm.cli import main

    recipes = Path(__file__).resolve().parents[2] / "recipes"
    for argv in (
        ["--help"],
        *(["run", path.stem, "--help"] for path in sorted(recipes.glob("*.py"))),
        ["evaluate", "no/where", "--dataset_name", "digits"],
    ):
        with (
            open(os.devnull, "w") as nothing,
            redirect_stdout(nothing),
            redirect_stderr(nothing),
            suppress(SystemExit),
        ):
            main(argv)


def serve(home: Path, seconds: int) -> None:
    """Read cases from standard input until it ends."""
    cases, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()  # until all that a collection would look at is frozen
    prepare()
    import inputs

    def build() -> int:
        os.chdir(home)
        inputs.save_models(home / "models")
        return DONE

    if fork_and_wait(build)[0] != DONE:
        raise SystemExit("the models could not be saved")
    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would otherwise copy the memory of everything imported
    gc.enable()
    print("ready", file=answers, flush=True)
    while case := read(cases):
        status, used = fork_and_wait(lambda case=case: run_cases(case, cases, answers, seconds))
        if status != DONE:
            print(json.dumps({"status": status, "seconds": used}), file=answers, flush=True)


def read(file: int) -> dict | None:
    """The next line of JSON, read without a buffer because forks read on where others stopped; None at the end."""
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(file, 2**16)):
            return None
        line += part
    return json.loads(line)


def run_cases(case: dict, cases: int, answers, seconds: int) -> int:
    """Run a case, and those that follow as long as they leave no state behind; in a fork.

    Args:
        case: the first.
        cases, answers: file descriptor of the others, and file of the answers.
        seconds: limit of CPU time per case.

    Returns:
        `DONE`, if it is not killed in a case.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    first = state()
    for number in range(CASES):
        os.chdir(case["folder"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(case[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
            os.close(file)
        signal.alarm(WALL_SECONDS)
        before = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(before) + seconds, hard))
        status = run_case(case["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        signal.alarm(0)
        answer = {"status": status, "seconds": time.process_time() - before}
        print(json.dumps(answer), file=answers, flush=True)
        if status == 0 or state() != first or number == CASES - 1 or (case := read(cases)) is None:
            break
    return DONE


def run_case(argv: list[str]) -> int:
    """Exit status of a command line."""
    from hf_tfm.cli import main

    try:
        main(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def state() -> tuple:
    """State of this process that one command could leave to the next."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import are_deterministic_algorithms_enabled, get_default_dtype

    return (
        dict(os.environ),
        [bool(kind._shared_state) for kind in (AcceleratorState, GradientState, PartialState)],
        (threading.active_count(), bool(multiprocessing.active_children())),
        (get_default_dtype(), are_deterministic_algorithms_enabled()),
    )


def prepare() -> None:
    """Import everything that commands import, before any fork."""
    import importlib

    for name in (
        *("torch", "transformers", "datasets", "accelerate", "timm", "tokenizers", "matplotlib.pyplot", "sklearn"),
        *("hf_tfm.cli", "hf_tfm.tasks.evaluation", "hf_tfm.tasks.panoptic_segmentation", "hf_tfm.training.trainer"),
        *("hf_tfm.tasks.language_modeling", "hf_tfm.tasks.images", "hf_tfm.doctor.detection"),
        *("hf_tfm.tasks.distillation", "hf_tfm.conversion", "hf_tfm.viz.images"),
    ):
        importlib.import_module(name)


def fork_and_wait(work: Callable[[], int]) -> tuple[int, float]:
    """Run a function in a fork; returns its exit status, or its negative signal, and CPU seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status, usage = os.wait4(pid, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # data loader workers left behind by the case
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
