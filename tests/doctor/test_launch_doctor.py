"""`hf-tfm doctor launch`: two processes that fit, and reports with one planted fault each."""

import json
from types import SimpleNamespace

import pytest
from processes import run_ranks
from recipe_helpers import command_line, write_data

from hf_tfm.doctor import launch
from hf_tfm.doctor.findings import findings_of
from hf_tfm.tasks.translation import TranslationTask

HEALTHY = {
    **{"host": "a", "device": "cuda:0", "gpu": "H200", "versions": {"torch": "2.14"}, "code": "1f", "arguments": "2e"},
    **{"reduced": True, "reduce_seconds": 0.01, "output_seen": True, "output_error": None, "output_place": "/runs"},
    **{"output_free": 10**12, "cache_free": 10**12, "data_error": None, "data": "3d", "data_seconds": 1.0},
    **{"step_error": None, "step_seconds": 0.1, "parameters": 10**9, "used": 2 * 10**10, "memory": 10**11},
    "host_memory": 10**12,
}


def case(changes: dict, args: dict) -> launch.Case:
    """Three processes, of which the last has ``changes``."""
    ranks = [{**HEALTHY, "device": f"cuda:{i}"} for i in range(3)]
    ranks[2].update(changes)
    options = {
        "lr_scheduler_type": "cosine",
        "batch_size": 6,
        "micro_batch_size": 1,
        "ema_decay": 0.0,
        "fsdp": False,
        **args,
    }
    resolved = SimpleNamespace(learning_rate=0.1, warmup=lambda steps: 2)
    accelerator = SimpleNamespace(
        num_processes=3, state=SimpleNamespace(backend="nccl"), distributed_type=SimpleNamespace(value="MULTI_GPU")
    )
    made = launch.Case(SimpleNamespace(**options), accelerator, 0.5, ranks, None, resolved, 10, 20)
    return made


@pytest.mark.parametrize(
    ("changes", "args", "check", "level", "message"),
    [
        ({}, {}, None, "ok", ""),
        ({"device": "cuda:1"}, {}, "world_size", "failed", "several processes share cuda:1 of a"),
        ({"host": "b"}, {}, "world_size", "warning", "2 on a, 1 on b"),
        ({"versions": {"torch": "2.11"}}, {}, "versions", "failed", "rank 2 on a has torch 2.11, others have 2.14"),
        ({"code": "ff"}, {}, "code", "failed", "code: rank 2 on a has ff, others have 1f"),
        ({"arguments": "ff"}, {}, "code", "failed", "arguments: rank 2 on a has ff"),
        ({"reduced": False}, {}, "collective", "failed", "rank 2 on a received a wrong sum"),
        ({"output_seen": False}, {}, "output", "warning", "/runs of a is not visible on a"),
        ({"data_error": "no folder"}, {}, "data", "failed", "rank 2 on a: no folder"),
        ({"data": "ff"}, {}, "data", "failed", "fingerprints differ: rank 2 on a has ff"),
        ({}, {"batch_size": 2}, "batch", "warning", "1 have nothing to do"),
        ({}, {"batch_size": 7}, "batch", "warning", "the shares differ"),
        ({"cache_free": 10**6}, {}, "disk", "warning", "1 MB are free for"),
        ({"memory": 10**10}, {}, "memory", "failed", "16.0 GB of states for each process"),
        ({"used": 95 * 10**9}, {}, "memory", "warning", "95.0 GB in use"),
        ({"step_error": "out of memory"}, {}, "duration", "failed", "rank 2 on a: out of memory"),
        ({"step_seconds": 0.5}, {}, "duration", "warning", "rank 2 on a is the slowest"),
    ],
)
def test_planted_fault_is_found(changes, args, check, level, message):
    made = case(changes, args)
    found = [one for each in (*launch.OF_PROCESSES, *launch.OF_THE_RUN) for one in findings_of(each, made)]
    wrong = [one for one in found if one.level != "ok"]
    assert [(one.check, one.level) for one in wrong] == ([(check, level)] if check else [])
    assert message in (wrong[0].message if wrong else "")


@pytest.mark.parametrize(
    ("gpus", "sharded", "shared", "ema_decay", "bytes_of_host", "level"),
    [
        (True, False, True, 0.0, 13.4e9, "ok"),  # 12 GB, the copy of one process
        (True, False, True, 0.0, 13.2e9, "warning"),
        (True, False, True, 0.0, 11.9e9, "failed"),
        (True, False, True, 0.9, 13.4e9, "failed"),  # 16 GB with an average of the weights
        (True, True, True, 0.0, 13.4e9, "ok"),  # three processes copy a third each
        (True, True, False, 0.0, 11.9e9, "failed"),  # all are gathered on the main process
        (False, False, True, 0.0, 80.1e9, "ok"),  # beside the 3 x 20 GB in use
        (False, False, True, 0.0, 79.9e9, "warning"),
        (False, False, True, 0.0, 59.9e9, "failed"),  # beside the 3 x 16 GB of states
    ],
)
def test_host_holds_the_copy_of_a_checkpoint(gpus, sharded, shared, ema_decay, bytes_of_host, level):
    made = case({}, {"ema_decay": ema_decay})
    made.accelerator.distributed_type.value = "FSDP" if sharded else "MULTI_GPU"
    for report in made.ranks:
        report |= {"host_memory": bytes_of_host, "output_seen": shared}
        if not gpus:
            report |= {"gpu": None, "device": "cpu", "memory": bytes_of_host}
    found = launch.memory(made)
    assert found.level == level and "for the copy while a checkpoint is written" in found.message


def test_sharding_that_accelerate_ignores_is_found(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "ACCELERATE_USE_FSDP is set, but accelerate trains with MULTI_GPU" in launch.strategy(case({}, {})).message


def check_report(folder, printed: str, processes: int) -> None:
    lines = printed.splitlines()
    assert lines[-1] == "failed: nothing; warnings: 0" and sum("world_size" in line for line in lines) == 1
    content = json.loads((folder / "report.json").read_text())
    found = {row["check"]: row["message"] for row in content["findings"]}
    assert found.keys() == {one.__name__ for one in (*launch.OF_PROCESSES, *launch.OF_THE_RUN)}
    assert found["world_size"].startswith(f"{processes} connected") and "for 20 steps" in found["duration"]
    assert sorted(path.name for path in folder.iterdir()) == ["data", "report.json"], (
        "the doctor leaves nothing behind"
    )


def test_one_process(tmp_path, capsys):
    words = command_line(write_data(tmp_path / "data"), tmp_path / "run", max_steps=20)
    assert launch.main(["--json", str(tmp_path / "report.json"), "translation_train", *words]) == 0
    check_report(tmp_path, capsys.readouterr().out, 1)


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_two_processes(tmp_path, fsdp):
    words = command_line(write_data(tmp_path / "data"), tmp_path / "run", max_steps=20, fsdp=fsdp)
    own = ("--json", str(tmp_path / "report.json"))
    done = run_ranks("-m", "hf_tfm.cli", "doctor", "launch", *own, "translation_train", *words)
    check_report(tmp_path, done.stdout, 2)


def test_missing_data_is_one_line_and_a_status(tmp_path, capsys, monkeypatch):
    def unreadable(self):
        raise OSError("/data is not mounted")

    monkeypatch.setattr(TranslationTask, "load_splits", unreadable)
    assert launch.main(["translation_train", *command_line(tmp_path, tmp_path / "run")]) == 1
    printed = capsys.readouterr()
    assert "failed: data; warnings: 0" in printed.out
    (line,) = [line for line in printed.err.splitlines() if line.startswith("hf-tfm")]
    assert line.startswith("hf-tfm doctor launch: data: rank 0 on ") and line.endswith("/data is not mounted")
