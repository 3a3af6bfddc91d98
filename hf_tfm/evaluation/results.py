"""What evaluations of several kinds of models share: checks of options, and the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from ..data.images import fingerprint
from ..hub.results import collect_versions

PRECISIONS = ("no", "bf16")


def check_options(precision: str, output: str | None, **counts: int | None) -> None:
    """Refuse what cannot be meant, before anything is loaded.

    Args:
        counts: by name, each at least 1 or None.

    Raises:
        ValueError: the precision is not known, or a number is too small.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "no" or "bf16", got "{precision}"')
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if output and not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output}: there is no folder {Path(output).parent}")


def metric(name: str, value: float, split: str) -> dict[str, Any]:
    """A row of results."""
    return {"name": name, "value": value, "signature": None, "split": split}


def describe(
    model: str,
    dataset: str,
    split: str,
    rows: datasets.Dataset,
    metrics: list[dict[str, Any]],
    fingerprint: Callable[[datasets.Dataset], str] = fingerprint,
) -> dict[str, Any]:
    """What every result begins with; ``fingerprint`` is that of this kind of rows."""
    found = {"model": model, "dataset": dataset, "split": split, "fingerprint": fingerprint(rows), "rows": len(rows)}
    return {**found, "metrics": metrics, "versions": collect_versions()}


def write(result: dict[str, Any], output: str) -> None:
    """A result as a JSON file."""
    Path(output).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
