"""Runs that are interrupted at random until they end, each equal to the undisturbed run, byte by byte.

`make soak` interrupts every recipe 50 times, `make soak KILLS=5` five times; both print what happened.
"""

import json
import os
import random
import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
import recipe_helpers
import scene_recipes
import vision_recipes
from processes import ForkedProcess, finish
from recipe_helpers import history, record, start_process

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HF_TFM_SOAK_KILLS", "2"))
SEED = int(os.environ.get("HF_TFM_SOAK_SEED", "0"))
KINDS = ("SIGKILL", "SIGTERM", "full disk", "killed loader worker", "truncated newest checkpoint")
COMMON = {"max_steps": 30, "eval_steps": 7, "save_steps": 3, "logging_steps": 4, "dataloader_num_workers": 1}
ENCODER = vision_recipes.ENCODER.replace("hidden_layers: 2", "hidden_layers: 1")
# recipe -> writer of its data, its command line, and options
RUNS = {
    "translation_train": (
        recipe_helpers.write_data,
        recipe_helpers.command_line,
        {"batch_tokens": 256, "model": recipe_helpers.TINY.replace("}", ", dropout: 0.1}")},
    ),
    "mae_pretrain": (
        vision_recipes.write_images,
        partial(vision_recipes.command_line, "mae_pretrain"),
        {"model": f"{{{ENCODER}, {vision_recipes.DECODER}, hidden_dropout_prob: 0.1}}"},
    ),
    "detection_train": (
        lambda folder: scene_recipes.write_hub(folder, scene_recipes.scenes()),
        scene_recipes.command_line,
        {"max_steps": 20, "model": f"{{{scene_recipes.MODEL}, dropout: 0.1}}"},
    ),
}


def start(recipe: str, data: Path, folder: Path) -> ForkedProcess:
    _, command_line, options = RUNS[recipe]
    return start_process("-m", "hf_tfm.cli", "run", recipe, *command_line(data, folder, **{**COMMON, **options}))


def complete(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def interrupt(process: ForkedProcess, kind: str, folder: Path, draw: random.Random) -> None:
    """Do harm of a kind to a running process."""
    if kind == "SIGTERM":  # a cluster sends it to the workers as well
        os.killpg(process.pid, signal.SIGTERM)
    elif kind == "full disk":  # larger files cannot be written
        limit = draw.choice([0, 1, 1000, 10_000, 100_000])
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    elif kind == "killed loader worker":
        while process.poll() is None:
            if workers := psutil.Process(process.pid).children():
                draw.choice(workers).kill()
                return
            time.sleep(0.001)
    else:
        process.kill()


def truncate_newest(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(complete(folder)[-1].iterdir()))
    os.truncate(file, draw.randrange(file.stat().st_size))


def contents(folder: Path) -> dict[str, bytes]:
    """The weights of the model, and weights and optimizer states of the checkpoints that are not damaged."""
    files = [path for path in folder.rglob("*.safetensors") if "damaged-" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("recipe", list(RUNS))
def test_interrupted_runs_equal_the_undisturbed_one(tmp_path, capsys, recipe):
    draw = random.Random(f"{recipe} {SEED}")
    RUNS[recipe][0](data := tmp_path / "data")
    finish(start_process("-c", ""))  # the server of the processes has imported all
    started = time.monotonic()
    finish(start(recipe, data, tmp_path / "whole"), timeout=600)
    duration = time.monotonic() - started
    counts: Counter[str] = Counter()
    steps: list[int] = []
    rounds = 0
    while sum(counts.values()) < KILLS:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        while True:
            process = start(recipe, data, folder)
            left = KILLS - sum(counts.values())
            kind = min(KINDS, key=lambda kind: (counts[kind], draw.random()))
            end = time.monotonic() + draw.uniform(0, 0.8 * duration)
            while left and time.monotonic() < end and process.poll() is None:
                time.sleep(0.005)
            if left and process.poll() is None:
                interrupt(process, kind, folder, draw)
            status = process.wait(600)
            printed = process.output()
            if kind != "killed loader worker":  # multiprocessing's thread for shared memory may print one
                assert "Traceback" not in printed, printed[-4000:]
            if (folder / "results.json").is_file() and status == 0:
                break
            if kind == "SIGTERM":
                # The default handler is in place while libraries are imported.
                assert status in (0, -signal.SIGTERM), printed[-4000:]
            elif kind in ("full disk", "killed loader worker"):
                assert status == 1, printed[-4000:]
            else:
                assert status == -signal.SIGKILL, printed[-4000:]
            if kind == "truncated newest checkpoint":
                if len(complete(folder)) < 2:
                    kind = "SIGKILL"
                else:
                    truncate_newest(folder, draw)
            counts[kind] += 1
            steps.append(int(complete(folder)[-1].name[5:]) if complete(folder) else 0)
        assert history(folder) == history(tmp_path / "whole")
        assert record(folder).metrics == record(tmp_path / "whole").metrics
        assert contents(folder) == contents(tmp_path / "whole")
    with capsys.disabled():
        report = {
            "interruptions": dict(counts),
            "runs, all equal to the undisturbed one": rounds,
            "last checkpoints at the interruptions": dict(sorted(Counter(steps).items())),
        }
        print(f"\n{recipe}: {json.dumps(report)}")
