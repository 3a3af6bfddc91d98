"""The table of planted faults, written from the tests that plant them: python tests/doctor/fault_table.py."""

from pathlib import Path

from test_data_faults import FAULTS as DATA_FAULTS
from test_planted_faults import FAULTS
from test_planted_knobs import KNOB_FAULTS

FILE = Path(__file__).with_name("README.md")
HEAD = """# Faults that the doctor finds

`python tests/doctor/fault_table.py` writes this page from the tests, each of which plants one fault in healthy data or
knobs. What is found names the check, a sample where there is one, and a remedy.

What it cannot find: boxes that belong to other images (a model learns eight of those by heart as well), objects that
nobody marked, and names that are wrong in every split alike.

| planted | check | verdict | it says |
| --- | --- | --- | --- |
"""
OF_DATA = """

`hf-tfm doctor data` finds these in data sets of other tasks:

| planted | task | check | verdict | it says |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The page."""
    data = [(name, check, level, said) for name, (_, check, level, _, said) in FAULTS.items()]
    knobs = [(name, check, level, said) for name, (_, check, level, said) in KNOB_FAULTS.items()]
    rows = [f"| {name} | `{check}` | {level} | ... {said} ... |" for name, check, level, said in data + knobs]
    others = [
        f"| {name} | {task.replace('_', ' ')} | `{check}` | {level} | ... {said} ... |"
        for name, (task, _, _, check, level, _, said) in DATA_FAULTS.items()
        if level != "ok"
    ]
    return HEAD + "\n".join(rows) + OF_DATA + "\n".join(others) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
