"""State of local data files, and a cache of prepared rows that is valid until a file changes.

files -> path, size and times of each -> key -> folder of prepared rows in the cache of `datasets`

`datasets` identifies the prepared rows of a local folder only by the folder's name and its README if the README has
``configs``, and an extracted archive by its path, so other or changed files would yield stale rows. Here every set of
files has its own cache folder, named by the state of all files.
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
except ImportError:  # not available on Windows: there, entries are removed only after a long time without use
    fcntl = None

ROOT = ".hf-tfm"  # inside datasets' cache folder; names of data sets do not begin with a dot, so this cannot collide
# File of an entry; its mtime is the time of last use, and processes that read the entry hold a lock on it.
USED = "used"
SPARE_SECONDS = 3600  # unused time after which an older state of the same source is removed
KEPT_SECONDS = 30 * 24 * 3600  # unused time after which any other entry is removed
_held: dict[Path, Any] = {}  # open lock files of the entries this process reads


def file_state(path: str | os.PathLike) -> tuple[str, str, int, int, int]:
    """Return absolute path, resolved path, size in bytes, mtime and ctime in ns.

    ctime also reveals a file whose content changed although its size and mtime were restored.

    Raises:
        OSError: if the file does not exist.
    """
    state = os.stat(path)
    return os.path.abspath(path), os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def state_key(files: Iterable[str | os.PathLike], *also: Any) -> str:
    """Return a hash of 64 hex digits of the state of files in order and of any other values.

    Args:
        also: values that are JSON-serialisable or have a distinctive ``str``.

    Raises:
        OSError: if a file is missing.
    """
    states = [file_state(file) for file in files]
    return hashlib.sha256(json.dumps([states, also], default=str).encode()).hexdigest()


@functools.cache
def package_key() -> str:
    """Return a hash of `datasets`' version and the code of this folder; code changes thus invalidate prepared rows."""
    digest = hashlib.sha256(datasets.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_entry(source: str, key: str) -> Path:
    """Return the cache folder for one state of a source; unused older states are removed.

    Args:
        source: identifies the source, for example the path of a folder.
        key: hash from `state_key`.
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
    """Mark an entry as used now, and as being read by this process until it ends."""
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
    """Remove entries that no process reads: older states of the source of ``keep``, and entries unused for long."""
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
        except OSError:  # another process reads it, or is removing it too
            continue
