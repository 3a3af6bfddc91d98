"""Atomic writes, with errors that give the path and the free disk space; checks of output files before a run."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK, NEW = ".lock", ".new"  # files of a run that is not claimed yet, see `training.run_folder`


class WriteError(OSError):
    """A file could not be written; the message gives the path, the free disk space and how to resume."""


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Convert a failed write below ``path`` to a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e6
        raise WriteError(
            f"could not write {path} ({error}); {free:.0f} MB are free there. Earlier checkpoints are intact: free "
            "space or correct the permissions, then run the same command to resume"
        ) from error


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with explain_write_errors(path):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)


def others(folder: Path) -> list[str]:
    """List the names in a folder, except those of an unclaimed run."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, NEW)) if folder.is_dir() else []


def require_writable(argument: str, file: str | Path) -> None:
    """Refuse a file that cannot be written, before its content is computed.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
        OSError: it cannot be written; the message names the argument.
    """
    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{argument} {file}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{argument} {file} is a folder: give the name of a file")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(f"{argument} {file} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def check_new_folder(folder: Path, prefix: str) -> Path:
    """Refuse a folder that cannot be created, or is not empty.

    Args:
        folder: value of the argument ``output_dir``.
        prefix: of the name of a temporary folder.

    Returns:
        The nearest existing folder, which is on the same disk: a folder in it can be moved into place atomically.

    Raises:
        FileExistsError: it is a file or a non-empty folder.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output_dir {folder} is not an empty folder: choose another one")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest, prefix=prefix).cleanup()
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written: {error.strerror}") from error
    return nearest


def place_folder(made: Path, folder: Path) -> None:
    """Move a finished folder into place; see `check_new_folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rmdir()
    made.rename(folder)


@contextmanager
def output_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """Yield a temporary folder, whose folder "model" takes its place at the end, unless there was an error.

    Args:
        folder: see `check_new_folder`.
        prefix: of the name of the temporary folder.

    Raises:
        OSError: see `check_new_folder`.
    """
    nearest = check_new_folder(folder, prefix)
    with tempfile.TemporaryDirectory(dir=nearest, prefix=prefix) as temporary:
        yield Path(temporary)
        place_folder(Path(temporary) / "model", folder)


def check_png(argument: str, file: str | None) -> None:
    """Refuse a picture whose name does not end in ".png", or that cannot be written.

    Raises:
        ValueError: it has another ending.
        OSError: see `require_writable`.
    """
    if file is None:
        return
    if Path(file).suffix != ".png":
        raise ValueError(f'{argument} must be a ".png" file, got "{file}"')
    if Path(file).absolute().parent.is_dir():  # a missing folder is created
        require_writable(argument, file)


def write_json(result: dict[str, Any], output: str) -> None:
    """Write a result as a JSON file."""
    Path(output).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
