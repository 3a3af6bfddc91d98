"""Collect outcomes by client and model family, and write them as a table: `--clients-table FILE`.

A test names its client with ``@pytest.mark.client(NAME, PACKAGE)``. Its family is that of the parameter ``name`` or
``family``, or is given as ``family="gpt"``. ``others="reason"`` fills the cells of families without a test.
"""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from clients_table import table
from every_class import FAMILIES
from head_cases import CASES

PROPERTY = "client"
OUTCOMES = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--clients-table", metavar="FILE", help="write works / why not by client and family")


def family_of(item: pytest.Item, marker: pytest.Mark) -> str:
    """Model family of a test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = marker.kwargs.get("family") or parameters.get("family") or parameters.get("name")
    if name in CASES:
        return CASES[name].model_class.config_class.model_type.removeprefix("tfm_")
    family = str(name).split("-")[0]
    if family not in FAMILIES:
        raise pytest.UsageError(f"{item.nodeid}: mark.client finds no family of {', '.join(FAMILIES)} in {name!r}")
    return family


def named(package: str) -> str:
    """Package and version; only the package if it is not installed and its tests are skipped."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("client"):
            client, package = marker.args
            row = (client, named(package), marker.kwargs.get("others", "-"))
            item.user_properties.append((PROPERTY, (*row, family_of(item, marker))))


def reason_of(report: pytest.TestReport) -> str:
    """Reason of a skip or an expected failure, or the last line of a failure."""
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return "fails: " + (crash.message if crash else str(report.longrepr)).strip().split("\n")[0]


def pytest_configure(config):
    config.stash[OUTCOMES] = defaultdict(list)
    config.pluginmanager.register(Collector(config), "clients-table")


class Collector:
    """Collects the outcomes of every report; with xdist, of the reports sent by the workers."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        for key, (*row, family) in (each for each in report.user_properties if each[0] == PROPERTY):
            assert key == PROPERTY
            if report.when == "call" or not report.passed:
                passed = report.passed and not hasattr(report, "wasxfail")
                outcome = "works" if passed else reason_of(report)
                self.config.stash[OUTCOMES][tuple(row)].append((family, report.failed, outcome))

    def pytest_sessionfinish(self):
        path = self.config.getoption("--clients-table", default=None)
        if path and not hasattr(self.config, "workerinput"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(table(self.config.stash[OUTCOMES], FAMILIES))
