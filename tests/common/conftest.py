"""Prints where our classes and the native ones end differently in the same common test."""

from collections import defaultdict

OUTCOMES: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report):
    """Note the outcome of a test of a class "Ours..." or "Native..."."""
    *_, group, name = report.nodeid.split("::")
    side = next((side for side in ("Ours", "Native") if group.startswith(side)), None)
    if side and (report.when == "call" or report.outcome != "passed"):
        ended = OUTCOMES[f"{group.removeprefix(side)} {name}"]
        if ended.get(side) != "failed":  # a subtest that failed is not forgotten when its test ends
            ended[side] = report.outcome


def pytest_terminal_summary(terminalreporter):
    """The table, and how many tests ended how on either side."""
    for side in ("Ours", "Native"):
        ended = [by_side[side] for by_side in OUTCOMES.values() if side in by_side]
        if ended:
            counts = ", ".join(f"{ended.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
            terminalreporter.write_line(f"{side}: {counts}")
    for test, by_side in sorted(OUTCOMES.items()):
        if len(by_side) == 2 and by_side["Ours"] != by_side["Native"]:
            terminalreporter.write_line(f"{test}: ours {by_side['Ours']}, native {by_side['Native']}")
