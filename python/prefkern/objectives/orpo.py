"""Odds ratios of preference pairs, without a reference: one value per pair."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.reduce import masked_mean, widen


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x < 0; near 0, where ``e^x`` rounds to 1, log1p would have an infinite gradient to mask."""
    near = x > -math.log(2.0)
    by_expm1 = torch.log(-torch.expm1(x))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -math.log(2.0), x)))
    return torch.where(near, by_expm1, by_log1p)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``log [odds(chosen) / odds(rejected)]`` of mean log-probabilities, ``odds = p / (1 - p)``.

    An average above ``-eps / 2`` (0 for a fully masked row), whose probability rounds to 1, is held there without a
    gradient: the odds, infinite at 0, stay finite.
    """
    chosen, rejected = widen(chosen), widen(rejected)
    ceiling = -torch.finfo(chosen.dtype).eps / 2
    chosen, rejected = chosen.clamp(max=ceiling), rejected.clamp(max=ceiling)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@objective("pair")
def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-ls(log_odds)`` per pair."""
    return -F.logsigmoid(log_odds_ratio(chosen, rejected))


@torch.no_grad()
def odds_metrics(chosen: Tensor, rejected: Tensor, nll: Tensor, penalty: Tensor, beta: float) -> dict[str, Tensor]:
    """Means over the pairs under TRL's names; the rewards are ``beta`` times the average log-probabilities."""
    chosen, rejected = widen(chosen), widen(rejected)
    per_pair = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": beta * chosen - beta * rejected,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "log_odds_ratio": -penalty,
        "log_odds_chosen": log_odds_ratio(chosen, rejected),
        "nll_loss": nll,
    }
    return {name: masked_mean(value, None) for name, value in per_pair.items()}
