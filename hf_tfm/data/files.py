"""Local files named by annotations: paths must stay inside the data set, and only regular files are read.

name in an annotation -> `inside` the data set's folder, by its text -> `read_bytes`, if it is a regular file

A path is judged by its text, after "." and ".." are resolved. Symbolic links are followed wherever they lead, because
data sets are commonly stored behind them; their target must be a regular file, never a device, pipe or folder.
"""

import itertools
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import datasets
from huggingface_hub import constants

BASE_PATHS = 100
MAX_BYTES = 2**32  # of one file; COCO's largest annotation file has about 0.5 GB, that of Objects365 about 3 GB


def inside(root: str | Path, name: str, source: str, folder: str | Path | None = None) -> str:
    """Return the normalised path of a file named by an annotation.

    Args:
        root: folder of the data set, which the path must not leave; this also applies to absolute paths.
        name: the path as written in the annotation; backslashes are separators unless a file has that exact name.
        source: name of the annotation in error messages.
        folder: folder that ``name`` is relative to; default: ``root``.

    Raises:
        ValueError: if the path leaves the data set.
    """
    path, root = joined(folder or root, name), os.path.abspath(root)
    if not is_within(path, root):
        raise ValueError(f'{source} names "{name}", which is outside the data set\'s folder {root}')
    return path


def joined(folder: str | Path, name: str) -> str:
    """Join a folder and a name to a normalised absolute path; see `inside` for backslashes."""
    folder = os.path.abspath(folder)
    if "\\" in name and not os.path.isfile(os.path.join(folder, name)):
        name = name.replace("\\", "/")
    return os.path.normpath(os.path.join(folder, name))


def is_within(path: str, root: str) -> bool:
    """Return whether a normalised absolute path is below a folder, judged by its text."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file of at most `MAX_BYTES` for reading.

    Raises:
        OSError: if it is missing, unreadable, not a regular file or too large.
    """
    # Non-blocking, because opening a pipe that has no writer would block forever.
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: SIM115
    state = os.fstat(file.fileno())
    if stat.S_ISREG(state.st_mode) and state.st_size <= MAX_BYTES:
        return file
    file.close()
    told = f"has {state.st_size:,} bytes, the limit is {MAX_BYTES:,}"
    raise OSError(f"{path} {told if stat.S_ISREG(state.st_mode) else 'is not a regular file'}")


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """Return the content of a UTF-8 text file, with or without a byte order mark.

    Raises:
        ValueError: if it cannot be read or is not UTF-8; the message names the file.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def data_roots(dataset: str, data_files: Any = None) -> list[str]:
    """Return the folders that image paths of a data set may be in: its own folders and the download caches.

    Args:
        dataset: as for `load_splits`.
        data_files: a path or pattern, a list of them, or a dict of either by split.
    """
    caches = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    given = data_files.values() if isinstance(data_files, Mapping) else [data_files or []]
    named = [one for several in given for one in ([several] if isinstance(several, str) else several)]
    own = [os.path.dirname(one if os.path.exists(one) else one.partition("*")[0]) for one in named]
    if os.path.isdir(dataset):
        own.append(dataset)
    elif os.path.isfile(dataset):
        own.append(os.path.dirname(dataset))
    return [os.path.abspath(path) for path in (*own, *caches) if "://" not in str(path)]


def path_of(url: str) -> str | None:
    """Return the local path of a path or URL, for an archive member that of the archive; None if it is not local."""
    last = url.rsplit("::", 1)[-1]
    if "://" not in last:
        return last
    parts = urlsplit(last)
    return unquote(parts.path) if parts.scheme in ("file", "local") else None


def anchored(paths: Sequence[str | None], roots: Sequence[str], source: str) -> list[str | None]:
    """Make paths absolute, relative to the first of ``roots`` or to the working directory (see `base_of`).

    Args:
        roots: see `data_roots`.
        source: name of the paths' origin in error messages.

    Raises:
        ValueError: if a path is in none of the folders.
    """
    base = base_of(paths, roots)
    return [anchored_path(path, base, roots, f"{source}, row {row}") for row, path in enumerate(paths)]


def base_of(paths: Iterable[str | None], roots: Sequence[str]) -> str:
    """Return the base folder of relative paths: the first of ``roots``, or the working directory.

    The first existing file among the first `BASE_PATHS` relative paths decides.
    """
    bases = [roots[0], os.getcwd()] if roots else [os.getcwd()]
    relative = (path for path in paths if path and "://" not in path and not os.path.isabs(path))
    near = itertools.islice(relative, BASE_PATHS)
    return next((base for path in near for base in bases if os.path.exists(joined(base, path))), bases[0])


def anchored_path(path: str | None, base: str, roots: Sequence[str], source: str) -> str | None:
    """Make a path absolute; URLs and None are returned unchanged.

    Args:
        base: see `base_of`.

    Raises:
        ValueError: if it is in none of the folders.
    """
    local = path_of(path) if path else None
    if local is None:
        return path
    absolute = joined(base, local)
    if not any(is_within(absolute, root) for root in roots):
        where = f"the data set's folder {roots[0]}" if roots else "the data set"
        raise ValueError(f'{source} names "{path}", which is outside {where}')
    return absolute if local == path else path
