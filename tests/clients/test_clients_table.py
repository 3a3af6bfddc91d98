"""The table of clients distinguishes failures, reasons and cells without a test."""

from clients_table import table


def test_cells():
    rows = {
        ("loader", "pkg 1.0", "-"): [("bert", False, "works"), ("bert", False, "works"), ("gpt", False, "no package")],
        ("loader", "pkg 1.0", "not text"): [("vit", False, "works"), ("vit", True, "fails: a|b")],
        ("adapter", "pkg 1.0", "-"): [("gpt", False, "works"), ("gpt", False, "known limit")],
    }
    lines = table(rows, ("bert", "gpt", "vit", "mae")).splitlines()
    assert lines[-2:] == [
        "| adapter | pkg 1.0 | - | works | - | - |",
        "| loader | pkg 1.0 | works | no package | fails: a/b | not text |",
    ]
    assert "| client | package | bert | gpt | vit | mae |" in lines
