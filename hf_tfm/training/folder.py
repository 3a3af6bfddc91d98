"""The folder of a run: whose it is, what is written there and how, and what a failed write says.

<output_dir>/run.json        what the run is; another run is refused this folder
<output_dir>/history.jsonl   one line a log or evaluation
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..hub.results import HISTORY, RUN


class WriteError(OSError):
    """A file could not be written; the message says where, how much room there is, and what is still there."""


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a failed write below ``path`` into a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e6
        raise WriteError(
            f"could not write {path} ({error}); {free:.0f} MB are free there. Earlier checkpoints are untouched: make "
            "room or mend the permissions, then run the same command to go on"
        ) from error


def sync(path: Path) -> None:
    """Have the system put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whole."""
    with explain_write_errors(path):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)


def claim(output_dir: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Make ``output_dir`` this run's own; one process calls it, before anything is trained.

    Args:
        identity: what makes a run itself: model, data, and the knobs that change its numbers. JSON values.
        overwrite: delete another run that is there.

    Returns:
        Whether this very run was begun here before.

    Raises:
        ValueError: the folder holds another run, or other files.
        WriteError: the folder cannot be written.
    """
    identity = json.loads(json.dumps(identity))
    run_file = output_dir / RUN
    if run_file.is_file():
        changed = changes(run_file, identity)
        if not changed:
            return True
        if not overwrite:
            raise ValueError(
                f"output_dir {output_dir} holds another run ({'; '.join(changed[:5])}): choose another folder, or set "
                "overwrite_output_dir to delete that run"
            )
        empty(output_dir)
    elif output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        # Not even with overwrite: what is there was not made by a run.
        raise ValueError(f"output_dir {output_dir} is not empty and holds no run: choose another folder")
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_file, json.dumps({"identity": identity}, indent=2, ensure_ascii=False) + "\n")
    return False


def changes(run_file: Path, identity: dict[str, Any]) -> list[str]:
    """What of an identity is not as the file has it, in words.

    Raises:
        ValueError: the file is not one that `claim` wrote.
    """
    try:
        held = json.loads(run_file.read_text(encoding="utf-8"))["identity"]
        names = sorted(held.keys() | identity.keys())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run_file} does not describe a run ({error}): choose another output_dir") from error
    return [
        f"{name}: {held.get(name)!r} there, {identity.get(name)!r} now"
        for name in names
        if held.get(name) != identity.get(name)
    ]


def empty(output_dir: Path) -> None:
    """Delete what a run's folder holds, its description last: cut off, it is still known as a run's.

    Raises:
        ValueError: this process works in the folder, which then holds more than the run.
    """
    if Path.cwd().is_relative_to(output_dir.resolve()):
        raise ValueError(f"overwrite_output_dir would delete the working directory: output_dir is {output_dir}")
    with explain_write_errors(output_dir):
        for path in sorted(output_dir.iterdir(), key=lambda path: path.name == RUN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def require_room(output_dir: Path, model: nn.Module, checkpoints: int, ema: bool) -> None:
    """Refuse to go on with a run whose checkpoints the disk cannot hold: weights, two moments, and the average.

    Args:
        checkpoints: number of those still to be written before old ones are deleted.

    Raises:
        OSError: with the room needed and the room there is.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) * (4 if ema else 3) * checkpoints
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OSError(
            f"{checkpoints} checkpoints take about {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free for "
            f"output_dir {output_dir}: make room, or lower keep_checkpoints or average_checkpoints"
        )


class History:
    """The rows of history.jsonl; going back to an earlier step forgets what came after it."""

    def __init__(self, output_dir: Path, step: int = 0):
        self.path = output_dir / HISTORY
        rows = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # cut off in the middle of a line by a kill
                if row["step"] <= step:
                    rows.append(row)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        with explain_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
