"""Generate the table of clients by model family from the outcomes of their tests."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

HEAD = """# Clients

Software that uses the models of this package, tested with tiny models of every family. "works" means that all tests of
the client passed for all tested classes of the family; other cells state why a test failed or was not run. The tests
are in `tests/clients/`; `make test-clients` writes this page with

    python -m pytest -n 0 -m "clients or slow or not slow" --clients-table docs/clients.md tests/clients

Last run with {}.

"""
SHARED = ("torch", "transformers", "accelerate")


def cell(outcomes: list[tuple[bool, str]], others: str) -> str:
    """Content of a cell from its (failed, text) pairs: failures; else "works" if a test passed; else the reasons."""
    if not outcomes:
        return others
    failures = [text for failed, text in outcomes if failed]
    reasons = list(dict.fromkeys(text for _, text in outcomes if text != "works"))
    if failures:
        return "; ".join(dict.fromkeys(failures))
    works = any(text == "works" for _, text in outcomes)
    return "works" if works else "; ".join(reasons)


def table(rows: Mapping[tuple[str, str, str], Sequence[tuple[str, bool, str]]], families: Sequence[str]) -> str:
    """A Markdown page.

    Args:
        rows: (client, package and version, text for families without a test) -> (family, failed, outcome) by test.
        families: the columns.
    """
    merged: dict[tuple[str, str], tuple[list, list]] = {}
    for (client, package, others), outcomes in rows.items():
        texts, found = merged.setdefault((client, package), ([], []))
        texts.append(others)
        found.extend(outcomes)
    lines = [f"| client | package | {' | '.join(families)} |", "| --- " * (len(families) + 2) + "|"]
    for (client, package), (texts, outcomes) in sorted(merged.items()):
        others = next((text for text in texts if text != "-"), "-")
        cells = [cell([each[1:] for each in outcomes if each[0] == family], others) for family in families]
        lines.append(f"| {' | '.join([client, package, *(text.replace('|', '/') for text in cells)])} |")
    versions = ", ".join(f"{name} {version(name)}" for name in SHARED)
    return HEAD.format(versions) + "\n".join(lines) + "\n"
