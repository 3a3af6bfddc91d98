"""Advantages and losses against values computed by hand, and against the formulae of trl 1.16."""

import math

import pytest
import torch

from hf_tfm.reinforcement.objectives import (
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_token_rewards_put_the_reward_on_the_last_token_of_each_completion():
    log_probs, reference = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 9.0]]), torch.full((2, 3), -1.5)
    found = token_rewards(torch.tensor([2.0, -1.0]), log_probs, reference, MASK, 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.05, 2.15], [-0.05, -1.05, 0.0]]))


def test_generalized_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 3.0, 99.0]])
    values = torch.tensor([[1.0, 0.5, 0.25], [2.0, 1.0, 99.0]])
    advantages, returns = generalized_advantages(rewards, values, MASK, discount=0.9, gae_lambda=0.5)
    last = 2.0 - 0.25
    middle = 1.0 + 0.9 * 0.25 - 0.5 + 0.45 * last
    first = 0.0 + 0.9 * 0.5 - 1.0 + 0.45 * middle
    short = 1.0 + 0.9 * 1.0 - 2.0 + 0.45 * 2.0
    torch.testing.assert_close(advantages, torch.tensor([[first, middle, last], [short, 2.0, 0.0]]))
    torch.testing.assert_close(returns, advantages + values * MASK)


def test_without_discount_advantages_are_the_rewards_to_come_minus_the_value():
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    advantages, _ = generalized_advantages(rewards, values, MASK, 1.0, 1.0)
    to_come = (rewards * MASK).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_come - values) * MASK)


def test_leave_one_out_advantages_equal_those_of_trl():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    groups = rewards.view(-1, 3)
    baselines = (groups.sum(1, keepdim=True) - groups) / 2  # rloo_trainer.py
    torch.testing.assert_close(leave_one_out_advantages(rewards, 3), (groups - baselines).flatten())
    assert leave_one_out_advantages(rewards, 3)[0] == 1.0 - (2.0 + 6.0) / 2


def test_group_advantages_equal_those_of_trl():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    groups = rewards.view(-1, 3)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, 3), ((groups - mean) / (std + 1e-4)).flatten())
    torch.testing.assert_close(group_advantages(rewards, 3, scale=False), (groups - mean).flatten())
    assert group_advantages(rewards, 3)[3:].eq(0).all()  # equal rewards teach nothing


def test_whiten_ignores_padding():
    values = torch.tensor([[1.0, 3.0, 5.0], [7.0, 4.0, 99.0]])
    found = whiten(values, MASK)
    kept = found[MASK == 1]
    assert kept.mean() == pytest.approx(0.0, abs=1e-6) and kept.var(correction=0) == pytest.approx(1.0, abs=1e-5)
    assert found[1, 2] == 0.0
    assert whiten(values, MASK, centre=False)[MASK == 1].mean() == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # gains of more than 1 + 0.2 are not rewarded
        (1.5, -2.0, 3.0, False),  # but losses are
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),
    ],
)
def test_policy_loss_is_clipped_where_it_would_gain(ratio, advantage, loss, clipped):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found, is_clipped = policy_loss(log_ratio, torch.tensor([advantage]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and is_clipped.item() is clipped
    assert (log_ratio.grad == 0).item() is clipped


def test_value_loss_takes_the_larger_of_both_errors():
    values, old, returns = torch.tensor([1.0, 1.1]), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])
    # The first value is clipped to 0.2, farther from its return; the second lies within the range.
    torch.testing.assert_close(value_loss(values, old, returns, 0.2), torch.tensor([0.5 * 1.8**2, 0.5 * 1.1**2]))


def test_kl_estimate_is_unbiased_and_never_negative():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    found = kl_estimate(policy.log(), reference.log())
    assert (found >= 0).all() and kl_estimate(policy.log(), policy.log()).eq(0).all()
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * found).sum(), exact)
