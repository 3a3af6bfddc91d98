"""Local files that annotations name: paths that stay inside the data set, and reads of regular files alone.

name in an annotation -> `inside` the data set's folder, by its text -> `read_bytes`, if it is a regular file

A path is judged by its text, after "." and ".." are taken out. Symbolic links are followed wherever they lead, because
data sets are commonly stored behind them; their target must be a regular file, never a device, pipe or folder.
"""

import os
import stat
from pathlib import Path, PurePosixPath

MAX_BYTES = 2**32  # of one file; COCO's largest annotations have half a gigabyte, Objects365's three


def inside(root: str | Path, name: str, source: str, folder: str | Path | None = None) -> str:
    """The path of a file that an annotation names, normalised.

    Args:
        root: folder of the data set, which the path must not leave. An absolute path has to lie in it as well.
        name: as written in the annotation; backslashes separate folders unless a file is called so.
        source: the annotation in errors.
        folder: that ``name`` is relative to; default, ``root``.

    Raises:
        ValueError: the path leaves the data set.
    """
    path, root = joined(folder or root, name), os.path.abspath(root)
    if not is_within(path, root):
        raise ValueError(f'{source} names "{name}", which is outside the data set\'s folder {root}')
    return path


def joined(folder: str | Path, name: str) -> str:
    """A name relative to a folder as a normalised absolute path; see `inside` for backslashes."""
    folder = os.path.abspath(folder)
    if "\\" in name and not os.path.isfile(os.path.join(folder, name)):
        name = name.replace("\\", "/")
    return os.path.normpath(os.path.join(folder, name))


def is_within(path: str, root: str) -> bool:
    """Whether a normalised absolute path lies below a folder, by its text."""
    return PurePosixPath(path) != PurePosixPath(root) and PurePosixPath(path).is_relative_to(root)


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`.

    Raises:
        OSError: it is missing, cannot be read, or is no regular file.
        ValueError: it is too large.
    """
    # Opened without waiting, or a pipe that nobody writes to would block here for ever.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError(f"{path} is not a regular file")
        if state.st_size > MAX_BYTES:
            raise ValueError(f"{path} has {state.st_size:,} bytes, the limit is {MAX_BYTES:,}")
        return file.read(MAX_BYTES + 1)


def read_text(path: str | Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, or is not UTF-8; the error names the file.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
