"""The loss of reward models: Bradley-Terry on the scores of preference pairs."""

from typing import Annotated, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.losses import inputs
from prefkern.losses.objective import objective
from prefkern.losses.preference import lead
from prefkern.losses.reduce import masked_mean, reduce_rows, widen
from prefkern.options import at_least, read, takes
from prefkern.types import LossOutput, Reduction


class Reward(NamedTuple):
    """The options of `reward_loss`, complete."""

    center_coefficient: Annotated[float, at_least(0.0)] = 0.0
    reduction: Reduction = "mean"
    metrics: bool = True


class RewardOptions(TypedDict, total=False):
    """The keywords of `reward_loss` that are no tensors."""

    center_coefficient: float
    reduction: Reduction
    metrics: bool


@objective("pair")
def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coefficient: float) -> Tensor:
    """``-ls(r_c - r_r - margin) + center (r_c + r_r)^2`` per pair."""
    losses = -F.logsigmoid(lead(chosen - rejected, margin))
    return losses + center_coefficient * (chosen + rejected).square() if center_coefficient else losses


@takes(Reward)
def reward_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: Tensor | None = None, **options: Unpack[RewardOptions]
) -> LossOutput:
    """The Bradley-Terry loss of a reward model, https://arxiv.org/abs/2203.02155, as TRL's ``RewardTrainer`` has it.

    ``-ls(r_c - r_r - margin) + center_coefficient (r_c + r_r)^2`` per pair. Without a margin the first term is
    ``log(1 + e^(r_r - r_c))``, as it is also written. The second holds the rewards, of which only the difference is
    learned, near 0, https://arxiv.org/abs/2312.09244.

    Args:
        chosen_rewards, rejected_rewards: the model's scores, each ``[B]``.
        margin: by how much the chosen should lead, ``[B]``, https://arxiv.org/abs/2307.09288; no gradient reaches it.
        center_coefficient: TRL's ``center_rewards_coefficient``, not negative.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]``.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics: ``accuracy`` and ``margin``, means over
        the pairs; ``min_reward``, ``mean_reward``, ``max_reward``, over both sides (0 for an empty batch). An empty
        batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "reward_loss"
    reward = read(where, options, Reward)
    named = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    inputs.rows(where, **named, optional={"margin": margin})
    chosen, rejected = widen(chosen_rewards), widen(rejected_rewards)
    held = None if margin is None else widen(margin).detach()
    losses = bradley_terry(chosen, rejected, held, reward.center_coefficient)
    return LossOutput(reduce_rows(losses, reward.reduction), reward_metrics(chosen, rejected) if reward.metrics else {})


@torch.no_grad()
def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Means over the pairs and extremes over both sides, under TRL's names."""
    every = torch.cat([chosen, rejected])
    least, largest = every.aminmax() if every.numel() else (every.sum(), every.sum())
    return {
        "accuracy": masked_mean(chosen > rejected, None),
        "margin": masked_mean(chosen - rejected, None),
        "min_reward": least,
        "mean_reward": masked_mean(every, None),
        "max_reward": largest,
    }
