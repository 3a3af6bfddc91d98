"""The number of CPU threads of a run."""

import pytest
import torch
from torch import nn

from hf_tfm.training.threads import SMALL_MODEL, VARIABLES, limit_threads, threads_restored

CPU = torch.device("cpu")
SMALL, LARGE = nn.Linear(8, 8), nn.Linear(SMALL_MODEL // 8, 8)


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, with no thread count set in the environment."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with threads_restored():
        torch.set_num_threads(2)
        yield monkeypatch


def test_small_model_uses_one_thread(two_threads):
    with threads_restored():
        assert limit_threads(SMALL, CPU) and torch.get_num_threads() == 1
        assert not limit_threads(SMALL, CPU), "there is nothing to change any more"
    assert torch.get_num_threads() == 2


def test_large_model_and_other_devices_keep_their_threads(two_threads):
    assert not limit_threads(LARGE, CPU)
    assert not limit_threads(SMALL, torch.device("cuda"))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("variable", VARIABLES)
def test_environment_takes_precedence(variable, two_threads):
    two_threads.setenv(variable, "2")
    assert not limit_threads(SMALL, CPU) and torch.get_num_threads() == 2
