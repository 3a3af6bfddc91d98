"""The output folder of a run: valid locations, locking, claiming, identity and overwriting.

Place: the folder must belong to the run alone. Refused are "", the root, the home and the working directory (or a
    folder that contains them), an existing file, a dangling link, and a non-empty folder without run.json, which no
    run created. It must neither be nor contain anything the run reads, nor lie inside its data set.
Lock: the main process holds ``.lock`` from before it reads data until the run ends. The file names host, process id,
    start and command, which the error for a second run in the folder repeats. The lock belongs to the process (POSIX
    record lock), so a killed run releases it. The locks of a network file system may not reach other hosts, so the
    holder also changes the time of the file every `BEAT` seconds: a run on another host takes the lock over when that
    time has not changed for `SILENCE` seconds. A holder that finds its lock taken over (its machine was suspended, or
    cut off from the disk) ends at once, because it no longer owns the folder.
Claim: files created before training (tokenizer, image processor) are kept in ``.new``. run.json is written, and
    ``.new`` moved into place, right before training. A run that fails earlier leaves the folder as it was, or removes
    the folder it created.
Identity: run.json records what determines the weights: task, arguments, and the data for training and for selecting
    the best weights. Data that is only scored is excluded. The same identity resumes the run; a different one is
    refused, unless the run in the folder has saved nothing yet, or ``overwrite_output_dir`` is set.
Overwriting: deletes the files that a run writes (`hub.saved_files.WRITTEN`), and run.json last, so that the folder is
    still a run's folder after an interrupted deletion. Links are removed, not followed. All other files are kept and
    reported.
"""

import errno
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from ..data.source import EMBEDDED
from ..hub.saved_files import RESULTS, RUN, WEIGHTS, WRITTEN
from ..options import renamed
from ..values import shown
from ..writing import LOCK, NEW, explain_write_errors, others, sync, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

EMBEDDED_SETS = (*EMBEDDED, "number-parity")  # data sets that are no folders
BEAT, SILENCE = 10.0, 60.0  # seconds, see Lock
INPUTS = (
    *("model_name_or_path", "teacher", "tokenizer", "reward_model", "reference_model"),
    *("dataset_name", "data_files", "more_texts", "pretraining_texts", "validation_texts", "cache"),
)


def check_location(folder: str, argument: str = "output_dir") -> None:
    """Refuse a path that is not, and cannot become, a folder of the run alone; checks paths, not contents.

    Raises:
        ValueError: the message names the argument and the problem.
    """
    path = Path(folder)
    if not folder.strip():
        raise ValueError(f'{argument} must name a folder, got "{folder}"')
    if "\0" in folder:
        raise ValueError(f"{argument} must not contain a null character, got {folder!r}")
    real = real_path(path)
    for name, place in (("the working directory", Path.cwd), ("the home directory", Path.home)):
        try:
            kept = real_path(place())
        except (OSError, RuntimeError):  # it was deleted, or is unknown
            continue
        if kept == real:
            raise ValueError(f'{argument} "{folder}" is {name}: choose a folder of its own')
        if kept.is_relative_to(real):
            raise ValueError(f'{argument} "{folder}" contains {name}, {kept}: choose a folder of its own')
    if real == Path(real.anchor):
        raise ValueError(f'{argument} "{folder}" is the root of the file system: choose a folder of its own')
    if path.is_symlink() and not path.exists():
        raise ValueError(f'{argument} "{folder}" is a symbolic link to {os.readlink(path)}, which does not exist')
    if path.exists() and not path.is_dir():
        raise ValueError(f'{argument} "{folder}" is a file: choose a folder')
    if file := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f'{argument} "{folder}" lies below "{file}", which is a file: choose a folder')


def check_inputs(args: Any, argv: Sequence[str] = (), argument: str = "output_dir") -> None:
    """Refuse an output folder that contains an input of the run, or lies inside its data set.

    Args:
        args: arguments of the recipe; those in `INPUTS` are checked, and the files of ``--config`` in ``argv``.
        argument: name of the argument that sets the folder.

    Raises:
        ValueError: the message names the input.
    """
    folder = Path(getattr(args, argument))
    for name, value in [*inputs(args), *configs(argv)]:
        if name == argument:
            continue
        for path in possible_paths(value):
            if any(inside(place, folder) for place in (path, *links(path))):
                raise ValueError(
                    f'{argument} "{folder}" is or holds {name} "{value}", which the run reads: choose another '
                    f"{argument}"
                )
            if name.endswith("dataset_name") and path.is_dir() and inside(folder, path):
                raise ValueError(
                    f'{argument} "{folder}" lies inside {name} "{value}", where the files of the run would become '
                    f"data: choose another {argument}"
                )


def inputs(args: Any) -> Iterator[tuple[str, str]]:
    """Yield (argument, value) of everything that may be a local input path."""
    for name in INPUTS:
        for argument, value in strings(name, getattr(args, name, None)):
            if not (argument.endswith("dataset_name") and value in EMBEDDED_SETS):
                yield argument, value


def strings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings in an argument's value."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(name, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(name, item)
    elif value is not None:  # options of a further data set
        for inner in ("dataset_name", "data_files"):
            yield from strings(f"{name}.{inner}", getattr(value, inner, None))


def configs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the files passed as ``--config``, which may also name presets."""
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--config" and os.path.isfile(value):
            yield "--config", value


def possible_paths(value: str) -> list[Path]:
    """Return the local files or folders that a value names, directly or as a glob pattern."""
    if not value or "\0" in value:
        return []
    path = Path(value)
    if os.path.lexists(path):
        return [path]
    if any(sign in value for sign in "*?["):
        relative = path.relative_to(path.anchor) if path.is_absolute() else path
        with suppress(ValueError, OSError):
            return list(Path(path.anchor or ".").glob(str(relative)))
    return []


def links(path: Path) -> list[Path]:
    """Return the symbolic links in an input folder, such as those in a snapshot of the Hub's cache."""
    if not path.is_dir():
        return []
    with suppress(OSError), os.scandir(path) as entries:
        return [Path(entry.path) for entry in entries if entry.is_symlink()]
    return []


def inside(path: Path, folder: Path) -> bool:
    """Return True if a path is a folder or lies in it, by its own name or after resolving links."""
    inners, outers = ((named_path(place), real_path(place)) for place in (path, folder))
    if any(place.is_relative_to(outer) for place in inners for outer in outers):
        return True
    if not folder.exists():
        return False
    with suppress(OSError):  # the same folder under two names: mounts, case-insensitive file systems
        return any(os.path.samefile(place, folder) for place in (real_path(path), *real_path(path).parents))
    return False


def named_path(path: Path) -> Path:
    """Return the absolute path without resolving links."""
    return Path(os.path.abspath(path))


def real_path(path: Path) -> Path:
    """Return the absolute path with links resolved."""
    return Path(os.path.realpath(path))


class InUse(ValueError):
    """The folder is in use by another process."""


class Lock:
    """Exclusive write access of one process to a folder.

    Args:
        folder: created if missing, and removed again if it stays empty.
        argument: name of the argument that sets the folder, for the error.
    """

    held: ClassVar[set[str]] = set()  # held by this process, within which record locks have no effect

    def __init__(self, folder: Path, argument: str = "output_dir"):
        self.folder, self.argument, self.path = folder, argument, folder / LOCK
        self.handle: int | None = None
        self.made: list[Path] = []
        self.released, self.beating = threading.Event(), threading.Lock()

    def take(self, command: str = "") -> None:
        """Lock the folder for this process.

        Waits up to `SILENCE` seconds for a sign of life of a holder on another host.

        Raises:
            InUse: another process holds the lock.
            WriteError: the folder cannot be written.
        """
        self.key = os.path.realpath(self.path)
        if self.key in Lock.held:
            raise self.refusal({"host": socket.gethostname(), "pid": os.getpid()})
        with explain_write_errors(self.folder):
            self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                while True:
                    handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                    try:
                        self.check(handle)
                    except BaseException:
                        os.close(handle)
                        raise
                    with suppress(FileNotFoundError):  # the previous holder has just deleted the file
                        if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                            break
                    os.close(handle)
            except BaseException:
                self.remove_made()
                raise
        self.handle, self.pid = handle, os.getpid()
        Lock.held.add(self.key)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.holder = {"host": socket.gethostname(), "pid": self.pid, "started": started, "command": command}
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(self.holder) + "\n").encode(), 0)
        threading.Thread(target=self.beat, args=(handle,), daemon=True).start()

    def beat(self, handle: int) -> None:
        """Show that the holder lives until it releases the lock, and end it if another process has taken the lock."""
        while not self.released.wait(BEAT):
            # Not by opening the file: closing it would release the record lock of this process.
            with self.beating, suppress(OSError):
                if self.released.is_set():
                    return
                os.utime(handle)
                if (holder := read_holder(handle)) and holder != self.holder:
                    print(
                        f'{self.argument} "{self.folder}" was taken over by process {holder.get("pid")} on host '
                        f"{holder.get('host')}, because this one gave no sign of life for {SILENCE:.0f} s: it ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def check(self, handle: int) -> None:
        """Lock an open file, or refuse.

        Raises:
            InUse: see `take`.
        """
        locks = self.lock_file(handle)
        holder = read_holder(handle)
        if holder.get("host", socket.gethostname()) != socket.gethostname():
            if not self.silent(handle, holder):
                raise self.refusal(holder, certain=False)
            self.lock_file(handle)
        elif not locks and alive(holder.get("pid")):
            raise self.refusal(holder, certain=False)

    def lock_file(self, handle: int) -> bool:
        """Take the record lock of an open file; return False if the file system has none.

        Raises:
            InUse: another process holds it.
        """
        if fcntl is None:
            return False
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self.refusal(read_holder(handle)) from None
            return False
        return True

    def silent(self, handle: int, holder: dict[str, Any]) -> bool:
        """Return True if a holder on another host gives no sign of life for `SILENCE` seconds, on the disk's clock.

        The record lock is released.
        """
        first, start = os.fstat(handle).st_mtime_ns, time.monotonic()
        with tempfile.TemporaryFile(dir=self.folder) as now:
            age = (os.fstat(now.fileno()).st_mtime_ns - first) / 1e9
        if age < SILENCE:
            log.warning(
                "%s is held by a process on host %s: waiting up to %.0f s for a sign of life",
                self.path,
                holder["host"],
                SILENCE - age,
            )
        while age + time.monotonic() - start < SILENCE:
            time.sleep(SILENCE / 30)
            again = os.open(self.path, os.O_RDONLY)  # on NFS, opening the file reads its time from the server
            changed = os.fstat(again).st_mtime_ns != first
            os.close(again)
            if changed:
                return False
        return True

    def refusal(self, holder: dict[str, Any], certain: bool = True) -> InUse:
        """Create the error that names the holder."""
        since = f" since {holder['started']}" if holder.get("started") else ""
        command = f" ({holder['command']})" if holder.get("command") else ""
        remedy = "wait until it ends, or choose another folder"
        if not certain:
            remedy += f"; if it no longer runs, delete {self.path}"
        return InUse(
            f'{self.argument} "{self.folder}" is in use by process {holder.get("pid", "unknown")} on host '
            f"{holder.get('host', 'unknown')}{since}{command}: {remedy}"
        )

    def release(self) -> None:
        """Release the lock; remove the folder if the lock created it and it is empty."""
        if self.handle is None or self.pid != os.getpid():
            return
        with self.beating:
            self.released.set()
            with suppress(OSError):
                self.path.unlink()
            with suppress(OSError):
                os.close(self.handle)
        self.handle = None
        Lock.held.discard(self.key)
        self.remove_made()

    def remove_made(self) -> None:
        """Remove the folders that were created, if they are empty."""
        with suppress(OSError):
            for path in self.made:
                path.rmdir()


def read_holder(handle: int) -> dict[str, Any]:
    """Return the content of a lock file; {} if it is empty or damaged."""
    try:
        holder = json.loads(os.pread(handle, 65536, 0))
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def alive(pid: Any) -> bool:
    """Return True if another process with this id runs on this host."""
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return pid != os.getpid()


class RunFolder:
    """State of an output folder, from free to claimed; used by the main process only, while it holds the lock.

    Args:
        path: the folder.
        identity: what determines the weights of the run; JSON values.
        overwrite: allows deletion of another run in the folder.
        ignored: names in an older run's identity that no longer count.
        defaults: values of arguments that an older run's version did not have.

    Attributes:
        holds_run: True if the folder already holds this run.

    Raises:
        ValueError: the folder holds another run, or files but no run.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        overwrite: bool = False,
        ignored: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.holds_run = False
        if self.run_file.is_file():
            changed = changes(self.run_file, self.identity, ignored, json.loads(json.dumps(defaults or {})))
            self.holds_run = not changed
            if changed and not overwrite and saved_anything(path):
                raise ValueError(
                    f"output_dir {path} holds another run ({'; '.join(changed[:5])}): choose another folder, or set "
                    "overwrite_output_dir to delete that run"
                )
        elif found := others(path):
            # Not even with overwrite_output_dir: these files were not created by a run.
            raise ValueError(
                f"output_dir {path} is not empty and holds no run ({', '.join(found[:3])}"
                f"{', ...' * (len(found) > 3)}): choose another folder"
            )
        with explain_write_errors(path):
            shutil.rmtree(path / NEW, ignore_errors=True)  # left by a killed run

    @property
    def run_file(self) -> Path:
        return self.path / RUN

    def part(self, name: str) -> Path:
        """Return the path of a part of the run: in the folder itself for a resumed run, otherwise in ``.new``."""
        return kept if self.holds_run and (kept := self.path / name).is_dir() else self.path / NEW / name

    def claim(self) -> list[str]:
        """Claim the folder for this run.

        Returns:
            Names of files that are kept although another run was deleted.

        Raises:
            WriteError: the folder cannot be written; claimed or not, it is still recognised as a run's folder.
        """
        left = []
        with explain_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.holds_run:
                if self.run_file.is_file():
                    left = delete_run(self.path)
                write_text(self.run_file, json.dumps({"identity": self.identity}, indent=2, ensure_ascii=False) + "\n")
            if (new := self.path / NEW).is_dir():
                for part in new.iterdir():
                    if (self.path / part.name).is_dir():
                        place_new(part, self.path / part.name)
                    else:
                        part.rename(self.path / part.name)
                new.rmdir()
            sync(self.path)
        self.holds_run = True
        return left

    def give_up(self) -> None:
        """Remove what was created for a run that was never claimed."""
        shutil.rmtree(self.path / NEW, ignore_errors=True)


def saved_anything(folder: Path) -> bool:
    """Return True if a run has saved a checkpoint, weights or results."""
    return (folder / RESULTS).exists() or any(
        not path.name.startswith(".")
        for pattern in ("*.safetensors", "checkpoints/*step-*")
        for path in folder.glob(pattern)
    )


def changes(
    run_file: Path, identity: dict[str, Any], ignored: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Describe the differences between an identity and that in run.json.

    Args:
        defaults: values of arguments that an earlier version, which wrote the file, did not have.
        ignored: names that do not count if only the file has them; likewise for data, splits that only the file has.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(run_file.read_text(encoding="utf-8"))
        held = content.get("identity") if isinstance(content, dict) else None
        if not isinstance(held, dict):
            raise ValueError(f'a mapping "identity" is expected, got {shown(content)}')
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{run_file} does not describe a run (it is damaged: {error}): choose another output_dir"
        ) from error
    held = {**{name: value for name, value in (defaults or {}).items() if name in identity}, **renamed(held)}
    names = sorted((held.keys() - set(ignored)) | identity.keys())
    theirs, ours = held.get("data"), identity.get("data")
    if isinstance(theirs, dict) and isinstance(ours, dict):
        held["data"] = {split: value for split, value in theirs.items() if split in ours}
    return [
        f"{name}: {held.get(name)!r} there, {identity.get(name)!r} now"
        for name in names
        if held.get(name) != identity.get(name)
    ]


def delete_run(folder: Path) -> list[str]:
    """Delete the files of a run, run.json last.

    Returns:
        Names of what is kept, because no run wrote it.
    """
    folders = set()
    for pattern in WRITTEN:
        for path in list(matches(folder, pattern.split("/"))):
            path.unlink()
            folders |= {parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)}
    folders |= {folder / name for name in ("checkpoints", "predictions", "tokenizer", "processor")}
    for path in sorted(folders, key=lambda path: -len(path.parts)):
        with suppress(OSError):  # not empty, or missing
            path.rmdir()
    (folder / RUN).unlink()
    return others(folder)


def matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield files that match a pattern given as one part per level; links are yielded and not followed."""
    for path in sorted(folder.iterdir()):
        if not fnmatchcase(path.name, parts[0]):
            continue
        if path.is_symlink() or (path.is_file() and len(parts) == 1):
            yield path
        elif path.is_dir() and len(parts) > 1:
            yield from matches(path, parts[1:])


def place_new(part: Path, folder: Path) -> None:
    """Move the files of a complete new model into a folder, each atomically.

    Weights of an older save that the new one does not contain, such as a different number of shards, are deleted.
    """
    with explain_write_errors(folder):
        names = [path.name for path in sorted(part.iterdir())]
        for name in names:
            if (part / name).is_file():
                sync(part / name)
        for name in names:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.rmtree(folder / name)
            (part / name).replace(folder / name)
        for pattern in WEIGHTS:
            for path in folder.glob(pattern):
                if path.name not in names:
                    path.unlink()
        part.rmdir()
        sync(folder)
