"""What other systems compute advantages with, written from their formulas in the torch operations that they use."""

import torch
from torch import Tensor


def trl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The PPO trainer of TRL 1.12: one step for each position, all rows at once."""
    last: Tensor | float = 0.0
    steps = []
    width = rewards.shape[1]
    for t in reversed(range(width)):
        following = values[:, t + 1] if t < width - 1 else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = delta + gamma * lam * last
        steps.append(last)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


def verl_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """verl's GAE: value and advantage are carried over masked positions; then the advantages are whitened."""
    following: Tensor | float = 0.0
    last: Tensor | float = 0.0
    steps = []
    for t in reversed(range(rewards.shape[1])):
        scored = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        stepped = delta + gamma * lam * last
        following = values[:, t] * scored + (1 - scored) * following
        last = stepped * scored + (1 - scored) * last
        steps.append(last)
    advantages = torch.stack(steps[::-1], dim=1)
    return verl_whiten(advantages, mask), advantages + values


def verl_whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / (count + 1e-8)
    variance = ((x - mean) ** 2 * mask).sum() / (count + 1e-8) * (count / (count - 1))
    return (x - mean) * torch.rsqrt(variance + 1e-8)
