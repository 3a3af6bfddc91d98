"""Dropout: how often, how strongly, the same in the backward pass, and drawn from torch's generator."""

import pytest
import torch

from hf_tfm.models.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_zeros_come_at_the_rate_and_the_mean_stays(rate, dtype):
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 1003, dtype=dtype), rate).float()  # no multiple of four elements
    assert (found == 0).float().mean().item() == pytest.approx(rate, abs=3e-3)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=4e-3)
    assert found.double().mean().item() == pytest.approx(1.0, abs=4e-3), "3 deviations of the worst rate"


def test_elements_are_dropped_one_by_one():
    """Neighbours, which share a random number, do not share their fate."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(100_000, 8), 0.3) > 0).double()
    assert torch.corrcoef(kept.T).sub(torch.eye(8)).abs().max() < 0.02


def test_the_gradient_goes_where_the_value_went():
    x = torch.full((64, 33), 2.0, requires_grad=True)
    found = dropout(x, 0.4)
    found.sum().backward()
    assert torch.equal(x.grad * 2.0, found)


def test_a_seed_repeats_it_and_evaluation_turns_it_off():
    module, x = Dropout(0.5), torch.randn(7, 5)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(module(x), first)
    assert module.eval()(x) is x and Dropout(0.0)(x) is x
