"""What other systems make of rewards, written from their formulas in the torch operations that they use."""

from collections import defaultdict

import torch
from torch import Tensor


def trl_groups(rewards: Tensor, size: int) -> Tensor:
    """TRL's GRPO trainer: consecutive groups of one size."""
    grouped = rewards.view(-1, size)
    mean = grouped.mean(dim=1).repeat_interleave(size)
    std = grouped.std(dim=1).repeat_interleave(size)
    return (rewards - mean) / (std + 1e-4)


def verl_groups(rewards: Tensor, ids: list[int]) -> Tensor:
    """verl's GRPO: a dict from ids of any order to rewards, with TRL's epsilon."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for row, group in enumerate(ids):
        found[group].append(rewards[row])
    means, stds = {}, {}
    for group, members in found.items():
        together = torch.stack(members)
        means[group], stds[group] = together.mean(), together.std()
    advantages = rewards.clone()
    for row, group in enumerate(ids):
        advantages[row] = (advantages[row] - means[group]) / (stds[group] + 1e-4)
    return advantages


def verl_returns(rewards: Tensor, gamma: float) -> Tensor:
    """verl's REINFORCE++: one step for each position, all rows at once."""
    returns = torch.zeros_like(rewards)
    running: Tensor | float = 0.0
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns
