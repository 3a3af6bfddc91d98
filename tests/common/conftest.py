"""Report where our classes and the native ones have different outcomes in the same common test."""

from collections import defaultdict

OUTCOMES: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report):
    """Record the outcome of a test of a class "Ours..." or "Native..."."""
    *_, group, name = report.nodeid.split("::")
    side = next((side for side in ("Ours", "Native") if group.startswith(side)), None)
    if side and (report.when == "call" or report.outcome != "passed"):
        ended = OUTCOMES[f"{group.removeprefix(side)} {name}"]
        if ended.get(side) != "failed":  # a failed subtest is not overwritten by the end of its test
            ended[side] = report.outcome


def pytest_terminal_summary(terminalreporter):
    """Print the table of differences, and the number of outcomes for each kind."""
    for side in ("Ours", "Native"):
        ended = [by_side[side] for by_side in OUTCOMES.values() if side in by_side]
        if ended:
            counts = ", ".join(f"{ended.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
            terminalreporter.write_line(f"{side}: {counts}")
    for test, by_side in sorted(OUTCOMES.items()):
        if len(by_side) == 2 and by_side["Ours"] != by_side["Native"]:
            terminalreporter.write_line(f"{test}: ours {by_side['Ours']}, native {by_side['Native']}")
