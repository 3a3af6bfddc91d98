"""Advantages and losses of PPO, RLOO and GRPO, as functions of tensors.

rewards -> advantages -> clipped losses of the policy and of the value function

Shapes: B completions, those of a prompt next to each other; G completions per prompt; T tokens of the longest one. A
mask (B, T) is 1 for tokens of a completion and 0 for the padding after it.

Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347) as used by Stiennon et al. 2020 (arXiv:2009.01325) and Ouyang et
al. 2022 (arXiv:2203.02155); RLOO, Ahmadian et al. 2024 (arXiv:2402.14740); GRPO, Shao et al. 2024 (arXiv:2402.03300).
"""

import torch
from torch import Tensor

SMALLEST_STD = 1e-4  # added to the standard deviation of a group, as in trl


def token_rewards(rewards: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return rewards of tokens (B, T): the KL penalty of each, and the reward of a completion at its last token.

    The penalty is ``beta`` times the log ratio of policy and reference (Ouyang et al. 2022, equation 2).

    Args:
        rewards: (B,) of completions.
        log_probs, reference: (B, T) log-probabilities of the tokens, of the policy and of the reference.
    """
    found = -beta * (log_probs - reference) * mask
    last = mask.long().sum(1, keepdim=True) - 1  # (B, 1)
    return found.scatter_add(1, last, rewards[:, None].to(found.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) each (Schulman et al. 2016, arXiv:1506.02438); 0 at padding.

    Args:
        rewards: (B, T) of tokens; values: (B, T) estimates before each token. The value after the last token is 0.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    advantage = following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        error = rewards[:, t] + discount * following - values[:, t]
        advantage = (error + discount * gae_lambda * advantage) * mask[:, t]
        advantages[:, t], following = advantage, values[:, t]
    return advantages, advantages + values


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return rewards (B,) minus the mean reward of the other completions of the prompt."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) * (group_size / (group_size - 1))).flatten()


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Return rewards (B,) minus the mean reward of the prompt, divided by their standard deviation if ``scale``."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + SMALLEST_STD) if scale else centred).flatten()


def whiten(values: Tensor, mask: Tensor, centre: bool = True) -> Tensor:
    """Return values (B, T) scaled to variance 1 over all tokens, and shifted to mean 0 if ``centre``; 0 at padding."""
    count = mask.sum().clamp_min(1)
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if centre else whitened + mean) * mask


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return the clipped loss of each token, or completion, and whether it is clipped, which is where it is constant.

    Args:
        log_ratio: log-probability minus that at the time of sampling; any shape, also that of ``advantages``.
        clip: largest distance of the probability ratio from 1 that is rewarded.
    """
    ratio = log_ratio.exp()
    free, clipped = -ratio * advantages, -ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return torch.maximum(free, clipped), clipped > free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of each value, the larger one of that and of the value clipped around the old
    one; the formula of OpenAI's lm-human-preferences."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return exp(d) - d - 1 of the log ratio d of reference and policy: an unbiased estimate of the KL divergence that
    is never negative (GRPO, equation 4)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1.0
