"""Local data files: their state on disk, and prepared rows that are kept until a file changes.

files -> path, size and times of each -> key -> folder of prepared rows in the cache of `datasets`

`datasets` names the prepared rows of a local folder by its last name and its README alone when the README has
``configs``, and an extracted archive by its path, so other or changed files would give old rows. Here every set of
files has a folder of its own, named by the state of all of them.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

try:
    import fcntl
except ImportError:  # Windows has none: there, only entries that have not been used for long are removed
    fcntl = None

ROOT = ".hf-tfm"  # in datasets' cache folder; no data set's name begins with a dot, so no other rows are kept there
# File of an entry; its mtime is the time of last use, and processes that read the entry hold a lock on it.
USED = "used"
SPARE_SECONDS = 3600  # an older state of the same source is removed after so long without use
KEPT_SECONDS = 30 * 24 * 3600  # any other entry, after so long
_held: dict[Path, Any] = {}  # open lock files of the entries this process reads


def file_state(path: str | os.PathLike) -> tuple[str, str, int, int, int]:
    """Path as given, resolved path, size in bytes, and times of the last change of content and of status in ns.

    The time of status (ctime) also tells of a file whose content changed while its size and mtime were put back.

    Raises:
        OSError: there is no such file.
    """
    state = os.stat(path)
    return os.path.abspath(path), os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def state_key(files: Iterable[str | os.PathLike], *also: Any) -> str:
    """64 hexadecimal digits that change with the state of any of the files, their order, or what else is given.

    Args:
        also: values that JSON can write, or whose ``str`` tells them apart.

    Raises:
        OSError: a file is missing.
    """
    states = [file_state(file) for file in files]
    return hashlib.sha256(json.dumps([states, also], default=str).encode()).hexdigest()


@functools.cache
def package_key() -> str:
    """A hash of `datasets`' version and the code of this folder: rows that other code prepared are prepared again."""
    digest = hashlib.sha256(datasets.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_entry(source: str, key: str) -> Path:
    """The folder in which the rows of a state of a source are kept; older states that nobody reads are removed.

    Args:
        source: tells sources apart, say the path of a folder.
        key: of `state_key`.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / ROOT
    entry = root / hashlib.sha256(source.encode()).hexdigest()[:16] / key[:32]
    if entry in _held and (entry / USED).exists():
        return entry
    fresh = not entry.is_dir()
    hold(entry)
    if fresh:
        remove_unused(root, keep=entry)
    return entry


def hold(entry: Path) -> None:
    """Mark an entry as used now, and as read by this process until it ends."""
    while True:
        entry.mkdir(parents=True, exist_ok=True)
        file = open(entry / USED, "a")  # noqa: SIM115 held open until the process ends
        os.utime(entry / USED)
        if fcntl is None:
            break
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            if os.fstat(file.fileno()).st_ino == os.stat(entry / USED).st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # another process removed the entry in between
    _held[entry] = file


def remove_unused(root: Path, keep: Path) -> None:
    """Remove entries that no process reads: earlier states of the source of ``keep``, and what is long unused."""
    for mark in root.glob(f"*/*/{USED}"):
        entry = mark.parent
        try:
            age = time.time() - mark.stat().st_mtime
            limit = SPARE_SECONDS if entry.parent == keep.parent and fcntl else KEPT_SECONDS
            if entry == keep or age < limit:
                continue
            if fcntl is None:
                shutil.rmtree(entry)
                continue
            with open(mark, "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry)
        except OSError:  # another process reads it, or removes it too
            continue
