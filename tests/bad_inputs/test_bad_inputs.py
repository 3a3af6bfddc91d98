"""Each row of the table, run as a command: exit status, one error line, no files written or lost, within limits."""

import re

import pytest

from .rows import ROWS
from .runner import Server
from .verdicts import prepared, verdict


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def test_the_table_is_large_and_names_are_unique():
    assert len({row.id for row in ROWS}) == len(ROWS) >= 150
    recipes = {word for row in ROWS for word in re.findall(r"^run (\w+)", row.command)}
    commands = {row.command.split()[0] for row in ROWS}
    assert len(recipes) >= 13 and commands >= {"run", "evaluate", "convert", "push", "show", "doctor", "quickstart"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_input(row, server, tmp_path):
    result = server.run(row.arguments(prepared(row, tmp_path), server.home / "models"), tmp_path)
    found, reason = verdict(row, result)
    assert found == "handled well", f"{reason}\n{row.command}\n{result.stderr[-3000:]}"
