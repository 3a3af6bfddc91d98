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
from pathlib import Path

import psutil
import pytest
from processes import ForkedProcess, finish
from recipe_helpers import history, record, start_process

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HF_TFM_SOAK_KILLS", "2"))
SEED = int(os.environ.get("HF_TFM_SOAK_SEED", "0"))
KINDS = ("SIGKILL", "SIGTERM", "full disk", "killed loader worker", "truncated newest checkpoint")
COMMON = {"dataloader_num_workers": 1, "eval_steps": 7, "save_steps": 3, "logging_steps": 4, "progress": "false"}
SCENES = {
    "shortest_side": 64,
    "longest_side": 64,
    "augmentation": "{scales: [64], max_size: 64, crop: 0.0, flip: 0.5}",
}
RUNS = {
    "translation_train": {
        **{"max_steps": 30, "warmup_steps": 5, "batch_tokens": 256, "vocab_size": 300, "metrics": "[exact_match]"},
        "model": "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, dropout: 0.1}",
    },
    "mae_pretrain": {
        **{"max_steps": 30, "num_train_epochs": "null", "warmup_epochs": "null", "warmup_steps": 5, "batch_size": 16},
        "model": "{num_hidden_layers: 1, decoder_num_hidden_layers: 1, hidden_dropout_prob: 0.1}",
    },
    "detection_train": {
        **{"max_steps": 20, "warmup_steps": 5, "batch_size": 4, "max_train_samples": 8, "num_pictures": 1, **SCENES},
        "model": "{encoder_layers: 1, decoder_layers: 1}",
    },
}


def start(recipe: str, folder: Path) -> ForkedProcess:
    options = {**COMMON, **RUNS[recipe], "output_dir": folder}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return start_process("-m", "hf_tfm.cli", "run", recipe, "--config", "quickstart", *argv)


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
    started = time.monotonic()
    finish(start(recipe, tmp_path / "whole"), timeout=600)
    duration = time.monotonic() - started
    counts: Counter[str] = Counter()
    steps: list[int] = []
    rounds = 0
    while sum(counts.values()) < KILLS:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        while True:
            process = start(recipe, folder)
            left = KILLS - sum(counts.values())
            kind = min(KINDS, key=lambda kind: (counts[kind], draw.random()))
            end = time.monotonic() + draw.uniform(0, duration)
            while left and time.monotonic() < end and process.poll() is None:
                time.sleep(0.005)
            if left and process.poll() is None:
                interrupt(process, kind, folder, draw)
            status = process.wait(600)
            printed = process.output()
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
