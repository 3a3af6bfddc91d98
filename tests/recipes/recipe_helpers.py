"""Shared helpers of the recipe tests: small data on disk, a tiny model, and ways to start a recipe."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import processes
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset

from hf_tfm.data.number_words import spell
from hf_tfm.hub.results import RunRecord
from hf_tfm.training import TrainingArguments

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "translation_train.py"
TINY = "{hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_encoder_layers: 1, num_decoder_layers: 1}"


def write_data(folder: Path, changes: dict[int, dict[str, str]] | None = None) -> Path:
    """Write number words as parquet: 90 training, 15 validation and 10 test rows; ``changes`` replaces rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [spell(37 * i + 1) for i in range(115)]
    for number, row in (changes or {}).items():
        rows[number] = row
    for split, part in {"train": rows[:90], "validation": rows[90:105], "test": rows[105:]}.items():
        Dataset.from_list(part).to_parquet(str(folder / f"{split}.parquet"))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Number words\n")
    return folder


def command_line(data: Path, output_dir: Path, **options) -> list[str]:
    """Command-line arguments of a short run."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "max_steps": 2,
        "batch_tokens": 400,
        "max_length": 100,
        "vocab_size": 300,
        "warmup_steps": 2,
        "test_splits": "[test]",
        "num_beams": 2,
        "progress": "false",
        **({} if "model_name_or_path" in options else {"model": TINY}),
        **options,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def fresh_state() -> None:
    """Reset accelerate's state of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_recipe(*argv: str) -> int:
    """Run the recipe in this process; returns its exit status."""
    fresh_state()
    return runpy.run_path(str(RECIPE))["main"](list(argv))


def record(folder: Path) -> RunRecord:
    """The validated content of results.json."""
    return RunRecord.load(folder)


def arguments_of(recipe: Path) -> type[TrainingArguments]:
    """The dataclass of a recipe's arguments."""
    module = runpy.run_path(str(recipe))
    if task_class := getattr(module["main"], "task_class", None):
        return task_class.Arguments
    kinds = [kind for kind in module.values() if isinstance(kind, type)]
    (own,) = [k for k in kinds if issubclass(k, TrainingArguments) and k.__module__ == "<run_path>"]
    return own


def environment(**changes: str) -> dict[str, str]:
    """Environment of child processes: one thread, no accelerator."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1", **changes}


def start_process(*command: str, server: str = "package", **changes: str) -> processes.ForkedProcess:
    """Start a Python command line, "-m module ..." or "file ...", in the repository root.

    Args:
        server: see `processes.start`.
        changes: to the environment.
    """
    return processes.start(*command, environment=environment(**changes), cwd=ROOT, server=server)


def start_launcher(*command: str) -> subprocess.Popen:
    """Start a Python command line as a new process: a launcher, which starts others."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish_launcher(process: subprocess.Popen) -> str:
    """Wait for the successful end of a launcher; returns its output."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-4000:]
    return output


def history(folder: Path) -> list[dict]:
    """The rows of history.jsonl without timing values."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("items_per_second", "seconds")} for row in rows]
