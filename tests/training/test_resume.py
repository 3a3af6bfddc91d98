"""A run that is stopped anywhere and restarted with the same command equals an uninterrupted run."""

import json
import random

import numpy as np
import pytest
import torch
from training_helpers import arguments, digest, history, run_training, start, tiny_model

from hf_tfm.training.checkpoint import checkpoints, full_weights, seed_micro_batch

DROPOUT = {"dropout": 0.2, "attention_dropout": 0.1}
STEPS = 24  # two and a half epochs of 9 or 10 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights, history and checkpoints of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, report = start(arguments(folder, max_steps=STEPS, ema_decay=0.9), DROPOUT)
    assert (code, report["step"]) == (0, STEPS)
    return report["weights"], history(folder), tensors(folder)


def tensors(folder):
    """Weights, moments and moving average of the last checkpoint, byte by byte."""
    return {path.name: path.read_bytes() for path in checkpoints(folder)[-1].glob("*.safetensors")}


def run_args(folder, **options):
    return arguments(folder, max_steps=STEPS, ema_decay=0.9, **options)


def assert_same(folder, report, whole):
    assert history(folder) == whole[1]
    assert report["weights"] == whole[0]
    assert tensors(folder) == whole[2]
    assert sorted(p.name[:5] for p in (folder / "checkpoints").iterdir()) == ["step-"] * 2


def test_uninterrupted_run_evaluates_and_logs(whole):
    assert [row["step"] for row in whole[1] if "evaluation" in row] == [5, 10, 15, 20, 24]
    assert [row["step"] for row in whole[1] if "loss" in row] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert {row["epoch"] for row in whole[1]} == {0, 1, 2}


@pytest.mark.parametrize(("workers", "seed"), [(0, 0), pytest.param(0, 1, marks=pytest.mark.slow), (2, 2)])
def test_killed_in_any_epoch(tmp_path, whole, workers, seed):
    draw = random.Random(seed)
    args = run_args(tmp_path / "run", dataloader_num_workers=workers)
    for step in (draw.randint(1, 7), draw.randint(20, 23)):  # in epoch 0 and in epoch 2
        assert start(args, DROPOUT, events={step: "SIGKILL"}) == (-9, None)
    code, report = start(args, DROPOUT)
    assert code == 0
    assert_same(tmp_path / "run", report, whole)


@pytest.mark.parametrize(
    ("kill_at", "left"),
    [
        (("hf_tfm.training.checkpoint.sync", 9), ".part-step-00000010"),  # before the second checkpoint is renamed
        (("shutil.rmtree", 5), ".old-step-00000005"),  # while the first is deleted
    ],
)
def test_killed_while_a_checkpoint_is_written_or_deleted(tmp_path, whole, kill_at, left):
    args = run_args(tmp_path / "run")
    assert start(args, DROPOUT, kill_at=kill_at) == (-9, None)
    assert (tmp_path / "run" / "checkpoints" / left).is_dir()
    code, report = start(args, DROPOUT)
    assert code == 0
    assert_same(tmp_path / "run", report, whole)


def test_half_written_files_are_not_picked_up(tmp_path, whole):
    folder = tmp_path / "run"
    args = run_args(folder)
    start(args, DROPOUT, events={12: "SIGKILL"})
    half = folder / "checkpoints" / ".part-step-00000015"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 100)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    assert [path.name for path in checkpoints(folder)] == ["step-00000005", "step-00000010"]
    code, report = start(args, DROPOUT)
    assert code == 0
    assert_same(folder, report, whole)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_sigterm_saves_and_exits_with_status_0(tmp_path, whole, workers):
    args = run_args(tmp_path / "run", dataloader_num_workers=workers)
    code, report = start(args, DROPOUT, events={12: "SIGTERM"})
    assert code == 0
    assert (report["stopped"], report["step"]) == (True, 13)  # the current step is finished
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000013"
    code, report = start(args, DROPOUT)
    assert (code, report["stopped"]) == (0, False)
    assert_same(tmp_path / "run", report, whole)


@pytest.mark.parametrize("evaluation", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_sigterm_interrupts_an_evaluation(tmp_path, whole, evaluation):
    """The evaluation is repeated when the run resumes, also after the last step."""
    args = run_args(tmp_path / "run")
    code, report = start(args, DROPOUT, stop_evaluation=evaluation)
    assert (code, report["stopped"], report["step"]) == (0, True, min(5 * evaluation, args.max_steps))
    assert sum("evaluation" in row for row in history(tmp_path / "run")) == evaluation - 1
    code, report = start(args, DROPOUT)
    assert (code, report["stopped"]) == (0, False)
    assert_same(tmp_path / "run", report, whole)


@pytest.mark.parametrize("evaluation", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_in_an_evaluation(tmp_path, whole, evaluation):
    """No step is lost, because the checkpoint was written meanwhile."""
    args = run_args(tmp_path / "run")
    assert start(args, DROPOUT, stop_evaluation=evaluation, stop_signal="SIGKILL") == (-9, None)
    assert int(checkpoints(tmp_path / "run")[-1].name[5:]) == 5 * evaluation
    _, report = start(args, DROPOUT)
    assert_same(tmp_path / "run", report, whole)


def test_checkpoints_before_evaluations_do_not_stay(tmp_path):
    """With save_steps, the checkpoint of an evaluation that is not the best yet is deleted by the next one."""
    options = {"max_steps": 12, "save_steps": 4, "eval_steps": 3, "learning_rate": 1e-9, "warmup_steps": 0}
    found = []
    for name, killed in (("whole", []), ("killed", [6, 9])):
        args = arguments(tmp_path / name, **options)
        for step in killed:  # in the second evaluation of a process; the first is repeated
            assert start(args, stop_evaluation=2, stop_signal="SIGKILL") == (-9, None)
            assert checkpoints(tmp_path / name)[-1].name == f"step-{step:08d}"
        assert start(args)[0] == 0
        assert [row["step"] for row in history(tmp_path / name) if "evaluation" in row] == [3, 6, 9, 12]
        found.append(sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()))
    assert found[0] == found[1]


def test_averaged_weights_do_not_depend_on_stops(tmp_path):
    options = {"final_weights": "average", "average_checkpoints": 3, "save_steps": 2, "save_total_limit": 1}
    reports = []
    for name, stops in (("whole", ()), ("stopped", (6, 8, 10))):
        args = arguments(tmp_path / name, **options)
        for step in stops:  # after steps 7, 9 and 11, between the scheduled checkpoints
            assert start(args, events={step: "SIGTERM"})[1]["stopped"]
        reports.append(start(args)[1])
        steps = [path.name[-2:] for path in checkpoints(tmp_path / name)]
        assert steps == ["08", "10", "12"]
    assert reports[0]["weights"] == reports[1]["weights"]


def test_ctrl_c_saves_nothing(tmp_path, whole):
    args = run_args(tmp_path / "run")
    code, report = start(args, DROPOUT, events={12: "SIGINT"})
    assert code not in (0, -9)
    assert report is None
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000010"
    _, report = start(args, DROPOUT)
    assert_same(tmp_path / "run", report, whole)


def test_mask_predict_resumes_with_the_same_masks(tmp_path):
    fields = {**DROPOUT, "decoding": "mask_predict"}
    reports = []
    for name, events in (("whole", {}), ("killed", {8: "SIGKILL"}), ("killed", {})):
        args = arguments(tmp_path / name, dataloader_num_workers=len(events))
        reports.append(start(args, fields, events=events)[1])
    assert reports[1] is None
    assert reports[2] == reports[0]
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def test_finished_run_is_unchanged(tmp_path):
    args = arguments(tmp_path / "run")
    _, first = run_training(args)
    rows = history(tmp_path / "run")
    result, again = run_training(args, events={step: "SIGKILL" for step in range(99)})  # no further step
    assert (result.progress.step, result.stopped) == (12, False)
    assert digest(full_weights(again)) == digest(full_weights(first))
    assert history(tmp_path / "run") == rows


def test_raising_max_steps_continues_a_finished_run(tmp_path):
    options = {"lr_scheduler_type": "constant", "final_weights": "last"}
    run_training(arguments(tmp_path / "longer", max_steps=10, **options))
    result, longer = run_training(arguments(tmp_path / "longer", max_steps=20, **options))
    _, whole = run_training(arguments(tmp_path / "whole", max_steps=20, **options))
    assert result.progress.step == 20
    assert digest(full_weights(longer)) == digest(full_weights(whole))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    run_training(arguments(tmp_path / "run", max_steps=5))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for fields in (
        {"hidden_size": 32},
        {"num_encoder_layers": 2},
        {"norm_first": False, "attention_score": "additive"},
    ):
        with pytest.raises(ValueError, match="does not match the model"):
            run_training(arguments(tmp_path / "run", max_steps=10), tiny_model(**fields))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_checkpoint_is_json_and_safetensors(tmp_path):
    run_training(arguments(tmp_path / "run", max_steps=5, ema_decay=0.9))
    (folder,) = checkpoints(tmp_path / "run")
    names = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "state.json").read_text())["progress"]["step"] == 5


def test_random_numbers_depend_on_seed_step_and_position_only():
    def draw(*key):
        seed_micro_batch(*key)
        return (torch.rand(2).tolist(), np.random.rand(), random.random())

    first = draw(0, 5, 0)
    torch.rand(100)
    assert draw(0, 5, 0) == first
    others = [draw(1, 5, 0), draw(0, 6, 0), draw(0, 5, 1)]
    assert all(mine != yours for other in others for mine, yours in zip(first, other, strict=True))


def test_comparison_detects_differences(whole, tmp_path):
    """Another seed, or no dropout, gives other weights, so the comparisons above can fail."""
    for options, fields in (({"seed": 1}, DROPOUT), ({}, {})):
        _, report = start(run_args(tmp_path / f"run{len(fields)}", **options), fields)
        assert report["weights"] != whole[0]
