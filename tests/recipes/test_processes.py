"""The recipe as a script, by hf-tfm run, accelerate and torchrun: killed, stopped and resumed."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import finish, run_ranks
from recipe_helpers import (
    ROOT,
    command_line,
    finish_launcher,
    history,
    record,
    run_recipe,
    start_launcher,
    start_process,
    write_data,
)
from safetensors.torch import load_file
from server import TOKEN, HubServer

from hf_tfm.cli import main

OPTIONS = {
    "max_steps": 60,
    "save_steps": 5,
    "eval_steps": 20,
    "logging_steps": 7,
    "learning_rate": 0.01,
    "dataloader_num_workers": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run in this process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(*command_line(data, folder, **OPTIONS))
    return folder


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until a run has saved a checkpoint of ``step`` or later."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(int(path.name[5:]) >= step for path in (folder / "checkpoints").glob("step-*")):
            return
        time.sleep(0.005)
    raise TimeoutError(f"no checkpoint of step {step} in {folder}")


def test_killed_stopped_and_resumed_with_three_launchers(data, whole, tmp_path):
    argv = command_line(data, tmp_path / "run", **OPTIONS)
    script = str(ROOT / "recipes" / "translation_train.py")

    process = start_process(script, *argv)
    wait_for_step(tmp_path / "run", 10)
    process.kill()
    finish(process, expected=-signal.SIGKILL)
    assert not (tmp_path / "run" / "results.json").exists()

    process = start_process("-m", "hf_tfm.cli", "run", "translation_train", *argv)
    wait_for_step(tmp_path / "run", 30)
    os.killpg(process.pid, signal.SIGTERM)
    printed = finish(process, expected=0)
    assert "resuming from" in printed
    assert "asked to stop: state saved at step" in printed and "run the same command to resume" in printed
    assert not (tmp_path / "run" / "results.json").exists()

    config = str(ROOT / "recipes" / "launch" / "cpu.yaml")
    process = start_process("-m", "accelerate.commands.launch", "--config_file", config, script, *argv)
    assert "resuming from" in finish(process)
    assert history(tmp_path / "run") == history(whole)
    assert record(tmp_path / "run").metrics == record(whole).metrics
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("launcher", ["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes(data, tmp_path, launcher):
    """They train like one process, write one folder, and translate the test set together."""
    options = {**OPTIONS, "max_steps": 20, "eval_steps": 5, "adam_epsilon": 1e-4}
    argv = command_line(data, tmp_path / "run", **options)
    run_recipe(*command_line(data, tmp_path / "one", **options))
    command = ("-m", "hf_tfm.cli", "run", "translation_train")
    if launcher == "torchrun":  # a quarter of a minute of imports
        words = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
        printed = finish_launcher(start_launcher(*words, *command, *argv))
    else:
        printed = run_ranks(*command, *argv).stdout
    results, alone = record(tmp_path / "run"), record(tmp_path / "one")
    assert printed.count("  test   bleu ") == 1  # only one process prints
    assert results.hardware["count"] == 2
    assert results.command.startswith("python -m torch.distributed.run --nproc_per_node 2 -m hf_tfm.cli run ")
    assert results.training["steps"] == 20 and results.training["epochs"] == alone.training["epochs"]
    losses = [
        [row["evaluation"]["loss"] for row in history(tmp_path / name) if "evaluation" in row]
        for name in ("run", "one")
    ]
    # Each process draws its own dropout masks, so losses are similar but not equal.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert [row["name"] for row in results.metrics] == [row["name"] for row in alone.metrics]


def run_on_own_disk(folder: Path, argv: list[str]) -> None:
    os.chdir(folder / f"host{os.environ['RANK']}")
    sys.exit(main(["run", "translation_train", *argv]))


def test_output_folder_of_the_main_process_alone(data, tmp_path):
    """Two machines that share the data, but not the output folder."""
    for rank in (0, 1):
        (tmp_path / f"host{rank}").mkdir()
    for steps in (6, 12):  # a new run, and a resumed one
        options = {"warmup_steps": 2, "lr_scheduler_type": "constant", "max_steps": steps}
        run_ranks(run_on_own_disk, tmp_path, command_line(data, "run", **options))
    assert record(tmp_path / "host0" / "run").training["steps"] == 12
    assert not list((tmp_path / "host1").iterdir())


# In a separate process, because huggingface_hub reads its settings when it is imported.
HUB_RUN = """
import sys
from huggingface_hub import HfApi
from recipe_helpers import run_recipe

data, *argv = sys.argv[1:]
api = HfApi()
api.create_repo("user/numbers", repo_type="dataset")
commit = api.upload_folder(repo_id="user/numbers", repo_type="dataset", folder_path=data)
assert run_recipe(*argv) == 0
print(commit.oid)
"""


def test_hub_data_has_its_commit_and_licence(data, tmp_path):
    argv = [str(data), *command_line("user/numbers", tmp_path / "run")]
    with HubServer() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        process = start_process("-c", HUB_RUN, *argv, server="torch", **variables, HF_HUB_DISABLE_XET="1")
        commit = finish(process).splitlines()[-1]
    found = record(tmp_path / "run").data
    assert (found["path"], found["revision"], found["license"]) == ("user/numbers", commit, "cc0-1.0")
    assert found["rows"]["train"] == 90
    assert commit in (tmp_path / "run" / "README.md").read_text()
