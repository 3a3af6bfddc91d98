"""Verdict on a case: handled well, unclear or bad."""

import re
from pathlib import Path

from .rows import Row
from .runner import Result

VERDICTS = ("handled well", "unclear", "bad")


def prepared(row: Row, folder: Path) -> Path:
    """The case's folder with the row's files in it."""
    (folder / "in").mkdir()
    if row.files is not None:
        row.files(folder / "in")
    return folder


def verdict(row: Row, result: Result) -> tuple[str, str]:
    """One of `VERDICTS`, and the reason.

    bad: accepted, killed by a signal or a limit, or files were written, changed or lost. unclear: rejected, but not
    with one line of hf-tfm that names the argument or file and its value. Valid rows are bad if rejected.
    """
    if row.error is None:
        return ("handled well", "") if result.status == 0 else ("bad", f"refused a valid input: {result.ours}")
    if result.status == 0:
        return "bad", "accepted"
    if result.status < 0:
        return "bad", f"killed by signal {-result.status}: over the memory or time limit"
    if result.changed:
        return "bad", f"files changed: {', '.join(result.changed[:5])}"
    if "Traceback" in result.stderr or len(result.ours) != 1:
        return "unclear", f"{len(result.ours)} lines of hf-tfm on standard error, or a traceback"
    if not re.search(row.error, result.ours[0]):
        return "unclear", f"the line does not match {row.error!r}: {result.ours[0]}"
    return "handled well", ""
