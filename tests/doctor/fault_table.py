"""Generate the table of planted faults from the tests that plant them: python tests/doctor/fault_table.py."""

from pathlib import Path

from test_data_faults import FAULTS as DATA_FAULTS
from test_planted_arguments import ARGUMENT_FAULTS
from test_planted_faults import FAULTS

FILE = Path(__file__).with_name("README.md")
HEAD = """# Faults that the doctor finds

`python tests/doctor/fault_table.py` generates this page from the tests, each of which plants one fault in healthy data
or arguments. A finding names the check, a sample if there is one, and a remedy.

The doctor cannot find boxes that belong to other images (a model overfits eight of those just as well), objects
without an annotation, and class names that are wrong in all splits.

| planted | check | level | message |
| --- | --- | --- | --- |
"""
OF_DATA = """

`hf-tfm doctor data` finds these faults in data sets of other tasks:

| planted | task | check | level | message |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The content of the page."""
    data = [(name, check, level, message) for name, (_, check, level, _, message) in FAULTS.items()]
    arguments = [(name, check, level, message) for name, (_, check, level, message) in ARGUMENT_FAULTS.items()]
    rows = [f"| {name} | `{check}` | {level} | ... {text} ... |" for name, check, level, text in data + arguments]
    others = [
        f"| {name} | {task.replace('_', ' ')} | `{check}` | {level} | ... {message} ... |"
        for name, (task, _, _, check, level, _, message) in DATA_FAULTS.items()
        if level != "ok"
    ]
    return HEAD + "\n".join(rows) + OF_DATA + "\n".join(others) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
