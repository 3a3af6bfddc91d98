"""max_minutes: a run ends in time, evaluated and saved, and may be continued."""

import pytest
import torch
from training_helpers import arguments, history, run_training

from hf_tfm.training.checkpoint import checkpoints


def test_run_ends_when_the_time_is_up(tmp_path):
    args = arguments(tmp_path, max_steps=12, max_minutes=1e-9, final_weights="last")
    result, _ = run_training(args)
    assert (result.progress.step, result.stopped, result.progress.pending) == (1, False, False)
    assert [row["step"] for row in history(tmp_path) if "evaluation" in row] == [1]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]


def test_later_limit_continues_the_run_as_if_it_had_not_ended(tmp_path):
    shared = {"max_steps": 7, "final_weights": "last"}
    _, expected = run_training(arguments(tmp_path / "whole", **shared))
    run_training(arguments(tmp_path / "parts", max_minutes=1e-9, **shared))
    again, _ = run_training(arguments(tmp_path / "parts", max_minutes=1e-9, **shared))
    assert again.progress.step == 1, "the time is still up"
    result, model = run_training(arguments(tmp_path / "parts", max_minutes=60.0, **shared))
    assert result.progress.step == 7
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_minutes must be above 0, got 0"):
        arguments(tmp_path, max_minutes=0.0)
