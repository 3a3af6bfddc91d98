"""Other packages add a model family and a task, as in docs/add_a_family.md and docs/add_a_task.md.

The code blocks of a page become modules of a package with an entry point. The first command, which trains, is
killed and repeated; then all commands run in order.
"""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import processes
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRIVER = """
import sys
from hf_tfm.cli import main
import json
for argv in json.loads(sys.argv[1]):
    print("$", *argv, flush=True)
    try:
        main(argv)
    except SystemExit as end:
        if end.code:
            raise
"""


class Page:
    """A page as an installed package.

    Args:
        name: name of the page.
        folder: folder of its modules and runs.
    """

    def __init__(self, name: str, folder: Path):
        self.folder, text = folder, (ROOT / "docs" / f"{name}.md").read_text()
        self.commands: list[list[str]] = []
        for section in re.split(r"^## ", text, flags=re.MULTILINE):
            file = re.match(r".*`(\w+\.py)`", section)
            for language, block in BLOCK.findall(section):
                if language == "python" and file:
                    (folder / file[1]).write_text(block)
                elif language == "toml":
                    group = re.search(r'entry-points\."([\w.]+)"\]\n(.*)', block)
                    info = folder / "toy-1.0.dist-info"
                    info.mkdir()
                    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
                    (info / "entry_points.txt").write_text(f"[{group[1]}]\n{group[2].replace(chr(34), '')}\n")
                elif language == "bash":
                    words = block.replace("\\\n", " ").replace("DATA", str(folder / "data")).splitlines()
                    self.commands += [shlex.split(line)[1:] for line in words]

    def start(self, *commands: list[str]) -> processes.ForkedProcess:
        """Start a process that executes some commands."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)])}
        # hf_tfm reads the entry points while it is imported.
        words = ("-c", DRIVER, json.dumps(commands))
        return processes.start(*words, environment=environment, cwd=self.folder, server="libraries")

    def killed(self, command: list[str]) -> None:
        """Execute a training command, and kill it after its first checkpoint."""
        process = self.start(command)
        checkpoints = self.folder / command[command.index("--output_dir") + 1] / "checkpoints"
        while process.poll() is None and not list(checkpoints.glob("step-*")):
            time.sleep(0.01)
        process.kill()
        processes.finish(process, expected=-signal.SIGKILL)

    def output(self, *commands: list[str]) -> str:
        """Execute commands; returns their output."""
        return processes.finish(self.start(*commands), timeout=300)

    def results(self, run: str) -> dict:
        return json.loads((self.folder / "runs" / run / "results.json").read_text())

    def score(self, run: str, name: str = "accuracy") -> float:
        return [row["value"] for row in self.results(run)["metrics"] if row["name"] == name][-1]


def moved(command: list[str], folder: str) -> list[str]:
    """The same command with another output_dir."""
    index = command.index("--output_dir") + 1
    return [*command[:index], folder, *command[index + 1 :]]


def test_family_of_another_package(tmp_path):
    page = Page("add_a_family", tmp_path)
    train, evaluate, distill, convert = page.commands
    page.killed(train)
    output = page.output(train, moved(train, "runs/whole"), [*evaluate, "--output", "scores.json"], distill, convert)
    assert "resuming from" in output
    weights = [load_file(tmp_path / "runs" / run / "model.safetensors") for run in ("toy", "whole")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert page.results("toy")["model_type"] == "toy" and page.score("toy") > 0.5
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"][0]["name"] == "accuracy" and scores["metrics"][0]["value"] == page.score("toy")
    assert page.results("toy-student")["distillation"]["teacher"] == "runs/toy" and page.score("toy-student") > 0.3
    certificate = json.loads((tmp_path / "runs" / "toy-plain" / "parity_certificate.json").read_text())
    assert certificate["differences"]["logits"] < 1e-5


def test_task_of_another_package(tmp_path):
    page = Page("add_a_task", tmp_path)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 256), ("validation", 64)):
        rows = [{"vector": [i % 7, i % 5, i % 3, i % 2], "label": int(i % 7 > i % 5)} for i in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, evaluate, distill = page.commands
    saving = [*train, "--save_steps", "5", "--eval_steps", "20"]
    page.killed(saving)
    output = page.output(saving, moved(saving, "runs/whole"), [*evaluate, "--output", "scores.json"], distill)
    assert "resuming from" in output
    weights = [load_file(tmp_path / "runs" / run / "model.safetensors") for run in ("vector", "whole")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert page.score("vector") > 0.8
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"] == [
        {"name": "accuracy", "value": page.score("vector"), "signature": None, "split": "validation"}
    ]
    assert scores["vectors"] == 64 and "vectors/s" in output
    student = page.results("vector-student")
    assert student["distillation"]["teacher"] == "runs/vector" and page.score("vector-student") > 0.7
    assert [row["model"] for row in student["costs"]] == ["teacher", "student"]
