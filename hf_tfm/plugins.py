"""Model families and tasks of other packages, found through entry points."""

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

FAMILIES, TASKS = "hf_tfm.families", "hf_tfm.tasks"  # groups of entry points


def plugin_names(group: str) -> list[str]:
    """Return the names of the plug-ins of a group, without importing them."""
    return sorted({point.name for point in entry_points(group=group)})


def load_plugins(group: str) -> Iterator[tuple[str, Any]]:
    """Yield name and object of the plug-ins of a group.

    A plug-in that cannot be imported is reported on standard error and skipped.
    """
    for point in entry_points(group=group):
        try:
            found = point.load()
        except Exception as error:  # the other package may raise anything
            print(f"hf-tfm: the plug-in {point.name} ({point.value}) cannot be loaded: {error}", file=sys.stderr)
            continue
        yield point.name, found
