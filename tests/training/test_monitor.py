"""Training output: rows in history.jsonl, trackers, and the terminal."""

import importlib.util
import json
import time

import pytest
import torch
from training_helpers import arguments, fresh_accelerator, pairs, run_training, start, tiny_loader, tiny_model

from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import TokenBatchArguments, train
from hf_tfm.training.checkpoint import Progress, checkpoints
from hf_tfm.training.monitor import Monitor
from hf_tfm.training.run import Run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def monitor(folder, progress=None, **options):
    args = arguments(folder, **options)
    return Monitor(fresh_accelerator(args), args, 10, progress or Progress(), "target tokens")


def numbers(*values):
    return [torch.tensor(value) for value in values]


def test_row_holds_means_without_skipped_steps(tmp_path):
    it = monitor(tmp_path)
    for loss, norm, items in ((4.0, 1.0, 10), (float("nan"), float("nan"), 20), (2.0, 3.0, 30)):
        it.progress.step += 1
        it.add(dict(zip(("token", "length"), numbers(loss, loss / 2), strict=True)), *numbers(norm, items))
    it.log(0.5)
    (row,) = rows_of(tmp_path)
    assert row.pop("items_per_second") > 0 and row.pop("seconds") >= 0
    assert row == {
        "step": 3,
        "epoch": 0,
        "loss": 4.5,
        "loss/token": 3.0,
        "loss/length": 1.5,
        "learning_rate": 0.5,
        "gradient_norm": 2.0,
        "skipped": 1,
    }
    it.record()
    assert (it.progress.items, it.progress.skipped, it.progress.streak) == (40, 1, 0)
    it.add({"token": torch.tensor(6.0)}, *numbers(1.0, 10))
    it.log(0.5)
    assert rows_of(tmp_path)[1]["loss"] == 6.0  # start of a new logging window


def test_speed_counts_training_time_only(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 50.0, 53.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    it = monitor(tmp_path)  # 0
    it.progress.step = 1
    with it.paused():  # 2, then an evaluation until 50
        pass
    it.add({"token": torch.tensor(1.0)}, *numbers(1.0, 100))
    it.log(0.1)  # 53
    assert it.progress.seconds == 5.0
    assert rows_of(tmp_path)[0]["items_per_second"] == pytest.approx(20.0)
    assert rows_of(tmp_path)[0]["seconds"] == 5.0


def test_logging_window_is_restored_exactly(tmp_path):
    it = monitor(tmp_path)
    for loss in (8.248904705047607, 0.1):
        it.add({"token": torch.tensor(loss, dtype=torch.float64)}, *numbers(1.0, 10))
    it.record()
    progress = Progress(**json.loads(json.dumps(vars(it.progress))))
    again = monitor(tmp_path, progress)
    assert {name: value.item() for name, value in again.window.items()} == it.progress.window


def test_history_of_a_run(tmp_path):
    args = arguments(tmp_path / "run", logging_steps=5, eval_steps=4)
    result, _ = run_training(args)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 12]
    assert [row["step"] for row in rows if "evaluation" in row] == [4, 8, 12]
    assert [row["learning_rate"] for row in rows if row["step"] == 12 and "loss" in row] == [
        pytest.approx(args.learning_rate * (4 / 12) ** 0.5)
    ]
    assert result.epochs == 1.5  # of 8 steps each


def test_logging_steps_beyond_the_end_log_the_last_step(tmp_path):
    run_training(arguments(tmp_path / "run", logging_steps=1000, max_steps=3, warmup_steps=1))
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == [3]


def test_epoch_counts_passes_over_the_data(tmp_path):
    args = arguments(tmp_path / "run")
    accelerator, model = fresh_accelerator(args), tiny_model()
    task = TranslationTask.for_model(model)
    loader = tiny_loader(pairs(), task, args, accelerator)
    steps = [loader.steps_per_epoch(epoch) for epoch in range(3)]
    args.max_steps = steps[0] + steps[1] + steps[2] // 2
    result = train(accelerator, task, model, loader, args, args.max_steps, 99, lambda _: {"loss": 1.0})
    assert result.epochs == pytest.approx(2 + (steps[2] // 2) / steps[2])


def test_without_progress_lines_replace_the_bar(tmp_path, capsys):
    run_training(arguments(tmp_path / "run"))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("step 3 of 12: loss ")
    assert "target tokens/s, 0:00:0" in printed.out  # speed and remaining time
    assert "step 5: loss 4.155 (best)" in printed.out


def test_with_progress_the_bar_replaces_log_lines(tmp_path, capsys):
    args = arguments(tmp_path / "run")
    args.progress = True
    run_training(args)
    printed = capsys.readouterr()
    assert "train: 100%" in printed.err and "12/12" in printed.err and "target tokens/s" in printed.err
    assert "of 12: loss" not in printed.out
    assert "step 5: loss 4.155 (best)" in printed.out


def test_resumed_progress_bar_starts_at_its_step(tmp_path, capsys):
    run_training(arguments(tmp_path / "run"), events={6: "SIGTERM"})
    capsys.readouterr()
    args = arguments(tmp_path / "run")
    args.progress = True
    run_training(args)
    assert "7/12" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_receives_the_history_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = TokenBatchArguments(**{**vars(arguments(tmp_path / "run")), "report_to": ["tensorboard"]})
    accelerator = fresh_accelerator(args)
    run = Run(accelerator, args, "recipe", [])
    run.open(args, "translation", {"path": "x", "fingerprint": {"train": "x"}})
    run.claim(tiny_model())
    run_training(args, accelerator=accelerator)
    accelerator.end_training()
    # The numeric suffix counts the files of this process; the first holds the scalars.
    file = min((tmp_path / "run").rglob("*tfevents*"), key=lambda path: int(path.suffix[1:]))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    rows = rows_of(tmp_path / "run")
    for row in rows:
        row |= {f"evaluation/{name}": value for name, value in row.pop("evaluation", {}).items()}
    for name in ("loss", "learning_rate", "evaluation/loss"):
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected)


def test_trackers_receive_run_name_and_arguments(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: True)
        args = arguments(tmp_path / "run", report_to=["wandb", "tensorboard"], run_name="first try")
    accelerator = fresh_accelerator(arguments(tmp_path / "run"))
    started = {}
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, **given: started.update(given, project=project))
    run = Run(accelerator, args, "recipe", [])
    run.open(args, "translation", {"path": "x", "fingerprint": {"train": "x"}})
    run.claim(tiny_model())
    assert started["project"] == "hf-tfm"
    assert started["init_kwargs"] == {"wandb": {"name": "first try"}}
    assert started["config"]["learning_rate"] == args.learning_rate


def test_missing_tracker_package_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to: trackio is not installed"):
        arguments(".", report_to=["trackio"])


def test_history_write_error_ends_the_run(tmp_path):
    code, report = start(arguments(tmp_path / "run", logging_steps=1), file_limit=300)
    assert code == 3
    assert report["error"].startswith("WriteError: could not write") and "history.jsonl" in report["error"]
    assert checkpoints(tmp_path / "run") == []
