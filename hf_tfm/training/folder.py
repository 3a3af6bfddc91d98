"""Writing to a run's folder: atomic writes, informative errors, and history.jsonl."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..hub.saved_files import HISTORY
from ..writing import explain_write_errors, write_text

log = logging.getLogger(__name__)


def require_room(output_dir: Path, model: nn.Module, checkpoints: int, ema: bool) -> None:
    """Refuse a run whose checkpoints (weights, two moments and the EMA) do not fit on the disk.

    Args:
        checkpoints: number of checkpoints still to be written before old ones are deleted.

    Raises:
        OSError: reports the space required and the space available.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) * (4 if ema else 3) * checkpoints
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OSError(
            f"{checkpoints} checkpoints take about {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free for "
            f"output_dir {output_dir}: make room, or lower save_total_limit or average_checkpoints"
        )


class History:
    """Rows of history.jsonl; rows after ``step`` are dropped, as are damaged lines.

    Args:
        pending: the evaluation of ``step`` will be repeated, so its row is dropped too.
    """

    def __init__(self, output_dir: Path, step: int = 0, pending: bool = False):
        self.path = output_dir / HISTORY
        rows, damaged = [], []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if row["step"] < step or (row["step"] == step and not (pending and "evaluation" in row)):
                    rows.append(row)
            except (ValueError, TypeError, KeyError):
                damaged.append(number)
        if set(damaged) - {len(lines)}:  # an interrupted write may have truncated the last line
            log.warning("%s: damaged lines are ignored: %s", self.path, ", ".join(map(str, damaged)))
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        with explain_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
