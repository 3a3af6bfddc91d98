"""Run command lines of hf-tfm, within resource limits, in forks of one process that has imported everything.

line of JSON {argv, folder} on standard input -> fork, limits, `hf_tfm.cli.main` -> line of JSON {status, seconds, ...}

A fork takes milliseconds, while a new process takes ten seconds for its imports, so a case costs little more than its
own work. Run as a program, this file is the server; `Server` is its client.
"""

import gc
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 * 2**30  # limit of a case's data segment in bytes, imports included
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
        self.process.stdin.write(json.dumps({"argv": argv, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        after = tree(folder)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        out, err = (Path(answer[name]).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Result(answer["status"], out, err, changed, answer["seconds"])

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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    import inputs

    def build() -> int:
        inputs.save_models(home / "models")
        return 0

    if fork_and_wait(build, home, home / "build.out", home / "build.err", CPU_SECONDS)[0]:
        raise SystemExit((home / "build.err").read_text())
    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would otherwise copy the memory of everything imported
    print("ready", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        case = json.loads(line)
        out, err = (home / f"case-{number}.{name}" for name in ("out", "err"))

        def work(argv=case["argv"]) -> int:
            from hf_tfm.cli import main

            main(argv)
            return 0

        status, used = fork_and_wait(work, Path(case["folder"]), out, err, seconds)
        answer = {"status": status, "seconds": used, "stdout": str(out), "stderr": str(err)}
        print(json.dumps(answer), file=answers, flush=True)


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


def fork_and_wait(work, folder: Path, out: Path, err: Path, seconds: int) -> tuple[int, float]:
    """Run a function in a fork within the limits; returns its exit status, or its negative signal, and CPU seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            for path, number in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = work()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # data loader workers left behind by the case
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
