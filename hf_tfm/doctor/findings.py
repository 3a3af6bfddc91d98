"""Findings of checks, reported as a line with a sample and a remedy, and as JSON.

check(split, case) -> Finding | several -> named by `findings_of` -> lines of a table, rows of a JSON file
"""

import inspect
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

WIDTH = 112  # characters per line of the table
MARGIN = 30  # characters before a message
SHOWN = 160  # characters shown of a row


@dataclass(frozen=True)
class Sample:
    """Location of a finding in an image.

    Args:
        image_id: id of the image.
        split: name of its split.
        box: four numbers as stored.
        file: path of the image; None if the data set stores its bytes.
    """

    image_id: int
    split: str
    box: tuple[float, ...] | None = None
    file: str | None = None

    def __str__(self) -> str:
        parts = [f"image {self.image_id} of {self.split}"]
        if self.box is not None:
            parts.append(f"box [{', '.join(f'{value:g}' for value in self.box)}]")
        return ", ".join(parts + ([self.file] if self.file else []))


@dataclass(frozen=True)
class RowSample:
    """A row of a text or image data set.

    Args:
        split: name of the split.
        row: index, from 0.
        content: its texts and label.
        file: path of its image; None without one.
    """

    split: str
    row: int
    content: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        content = textwrap.shorten(self.content, SHOWN, placeholder=" ...") if self.content else None
        return ", ".join(filter(None, [f"row {self.row} of {self.split}", content, self.file]))


@dataclass(frozen=True)
class Finding:
    """Result of a check; created by `ok`, `warning`, `failed` and `skipped`.

    Args:
        level: severity.
        message: the measured numbers, and their limit.
        sample: first occurrence.
        remedy: suggested action.
        check, split: name of the check, and the split it examined; set by `findings_of`.
    """

    level: Literal["ok", "warning", "failed", "skipped"]
    message: str
    sample: Sample | RowSample | None = None
    remedy: str | None = None
    check: str = ""
    split: str | None = None

    def lines(self) -> Iterator[str]:
        """Yield the finding's lines of the table."""
        told = [(f"{self.split}: " if self.split else "") + self.message]
        told += [f"{name}: {value}" for name, value in (("sample", self.sample), ("remedy", self.remedy)) if value]
        margin = f"{self.level:<8} {self.check:<{MARGIN - 10}} "
        for text in told:
            for line in textwrap.wrap(text, WIDTH - MARGIN, break_long_words=False, break_on_hyphens=False):
                yield (margin + line).rstrip()
                margin = " " * MARGIN


def ok(message: str) -> Finding:
    """Create a finding without a problem."""
    return Finding("ok", message)


def warning(message: str, remedy: str, sample: Sample | RowSample | None = None) -> Finding:
    """Create a finding of something that may be intended."""
    return Finding("warning", message, sample, remedy)


def failed(message: str, remedy: str, sample: Sample | RowSample | None = None) -> Finding:
    """Create a finding of something that will spoil the run."""
    return Finding("failed", message, sample, remedy)


def skipped(message: str) -> Finding:
    """Create a finding of something that could not be examined."""
    return Finding("skipped", message)


def graded(bad: bool, *told: Any) -> Finding:
    """Return `failed` if ``bad``, otherwise `warning`."""
    return failed(*told) if bad else warning(*told)


def findings_of(check: Callable[..., Any], *examined: Any, split: str | None = None) -> Iterator[Finding]:
    """Run a check and attach its name to its findings; a check that finds nothing is `ok`."""
    found = check(*examined)
    fine = inspect.getdoc(check).partition(";")[0].splitlines()[0].rstrip(".")  # the healthy condition
    for finding in [found] if isinstance(found, Finding) else list(found) or [ok(fine)]:
        yield replace(finding, check=check.__name__, split=split)


def condensed(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Merge the findings of a check for all splits into one, if they are all `ok` or all `skipped`."""
    for _, group in itertools.groupby(findings, key=lambda finding: finding.check):
        several = list(group)
        level = several[0].level
        alike = level in ("ok", "skipped") and all(finding.level == level for finding in several)
        if len(several) > 1 and several[0].split and alike:
            others = ", ".join(finding.split for finding in several[1:])
            yield replace(several[0], message=f"{several[0].message}; {others} as well")
        else:
            yield from several


def save(findings: Iterable[Finding], file: str, examined: dict[str, Any]) -> None:
    """Write a report as JSON: ``examined``, ``failed`` (names of checks) and ``findings``."""
    rows = [asdict(finding) for finding in findings]
    for row in rows:
        if row["sample"] and row["sample"].get("box"):  # JSON has no NaN
            row["sample"]["box"] = [value if math.isfinite(value) else None for value in row["sample"]["box"]]
    names = list(dict.fromkeys(row["check"] for row in rows if row["level"] == "failed"))
    content = {"examined": examined, "failed": names, "findings": rows}
    Path(file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
