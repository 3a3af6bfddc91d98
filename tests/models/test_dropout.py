"""Dropout: rate, scale, the same mask in the backward pass, and torch's random generator."""

import pytest
import torch

from hf_tfm.models.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_rate_and_mean(rate, dtype):
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 1003, dtype=dtype), rate).float()  # not a multiple of four elements
    assert (found == 0).float().mean().item() == pytest.approx(rate, abs=3e-3)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=4e-3)
    assert found.double().mean().item() == pytest.approx(1.0, abs=4e-3), "3 standard deviations"


def test_elements_are_dropped_independently():
    """Adjacent elements, which share a random number, are dropped independently."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(100_000, 8), 0.3) > 0).double()
    assert torch.corrcoef(kept.T).sub(torch.eye(8)).abs().max() < 0.02


def test_gradient_uses_the_forward_mask():
    x = torch.full((64, 33), 2.0, requires_grad=True)
    found = dropout(x, 0.4)
    found.sum().backward()
    assert torch.equal(x.grad * 2.0, found)


def test_seed_reproduces_the_mask_and_evaluation_disables_it():
    module, x = Dropout(0.5), torch.randn(7, 5)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(module(x), first)
    assert module.eval()(x) is x and Dropout(0.0)(x) is x
