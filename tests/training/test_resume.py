"""Stop a run anywhere, start it again with the same command: nothing differs from a run that was never stopped."""

import pytest
from training_helpers import arguments, history, start

DROPOUT = {"dropout": 0.2, "attention_dropout": 0.1}


def uninterrupted(folder, fields=DROPOUT, **knobs):
    code, report = start(arguments(folder, **knobs), fields)
    assert code == 0
    return report["weights"], history(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and history of a run of 24 steps, about 2.5 epochs, that was left alone."""
    return uninterrupted(tmp_path_factory.mktemp("whole") / "run", num_steps=24, ema_decay=0.9)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again(tmp_path, whole, workers):
    args = arguments(tmp_path / "run", num_steps=24, ema_decay=0.9, num_workers=workers)
    for steps in (7, 9):
        code, report = start(args, DROPOUT, events={steps: "SIGKILL"})
        assert (code, report) == (-9, None)
    code, report = start(args, DROPOUT)
    assert code == 0
    assert history(tmp_path / "run") == whole[1]
    assert report["weights"] == whole[0]
