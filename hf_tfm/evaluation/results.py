"""What evaluations of several kinds of models share: checks of options, and the result."""

from collections.abc import Callable
from typing import Any

import datasets

from ..data.images import fingerprint
from ..hub.results import collect_versions
from ..writing import check_png as check_png
from ..writing import require_writable, write_json

write = write_json
PRECISIONS = ("no", "bf16")


# The largest values of options that set how much is computed at once, or how often.
MOST = {
    **{
        "batch_size": 2**16,
        "batch_tokens": 2**24,
        "num_beams": 1024,
        "iterations": 1000,
        "dataloader_num_workers": 256,
    },
    **{"seed": 2**32 - 1},
}
LEAST = {"dataloader_num_workers": 0, "max_bad_images": 0, "seed": 0}


def check_options(mixed_precision: str, output: str | None, **counts: int | None) -> None:
    """Refuse options that are out of range, before anything is loaded.

    Args:
        counts: by name, each None or from 1 (`LEAST`) to `MOST`.

    Raises:
        ValueError: mixed_precision is not known, or a number is out of range.
        OSError: ``output`` cannot be written.
    """
    if mixed_precision not in PRECISIONS:
        raise ValueError(f'mixed_precision must be "no" or "bf16", got "{mixed_precision}"')
    for name, value in counts.items():
        if value is None:
            continue
        if value < (least := LEAST.get(name, 1)):
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value > (most := MOST.get(name, value)):
            raise ValueError(f"{name} must be at most {most:,}, got {value:,}")
    if output:
        require_writable("output", output)


def metric(name: str, value: float, split: str) -> dict[str, Any]:
    """A row of results."""
    return {"name": name, "value": value, "signature": None, "split": split}


def describe(
    model: str,
    dataset_name: str,
    split: str,
    rows: datasets.Dataset,
    metrics: list[dict[str, Any]],
    fingerprint: Callable[[datasets.Dataset], str] = fingerprint,
) -> dict[str, Any]:
    """What every result begins with; ``fingerprint`` is that of this kind of rows."""
    found = {
        "model": model,
        "dataset": dataset_name,
        "split": split,
        "fingerprint": fingerprint(rows),
        "rows": len(rows),
    }
    return {**found, "metrics": metrics, "versions": collect_versions()}
