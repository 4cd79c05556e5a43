"""Preference pairs with a reference: the DPO family, one value per pair.

A loss of the family is one function of ``Pairs`` and ``PairOptions``, its declared coupling, and a line in
``PAIR_LOSSES`` that says which options it reads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.losses.objective import Objective, objective
from prefkern.losses.reduce import divide, masked_mean, widen


class Pairs(NamedTuple):
    """``chosen = lp_theta(y_c) - lp_ref(y_c)`` and ``rejected``, each ``[B]``; the scored lengths, or None."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None


class PairOptions(NamedTuple):
    beta: float
    label_smoothing: float = 0.0


class PairLoss(NamedTuple):
    """An objective of the family and what it reads: the range of its label smoothing (low, high), lengths."""

    function: Objective[[Pairs, PairOptions], Tensor]
    smoothing: tuple[float, float] | None = None
    needs_lengths: bool = False


def log_ratios(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Policy minus reference, in float32 or wider; no gradient reaches the reference."""
    return widen(chosen) - widen(ref_chosen).detach(), widen(rejected) - widen(ref_rejected).detach()


@objective("pair")
def sigmoid(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-(1 - e) ls(beta d) - e ls(-beta d)``, d the difference of the log-ratios."""
    x = options.beta * (pairs.chosen - pairs.rejected)
    if options.label_smoothing == 0.0:
        return -F.logsigmoid(x)
    return -(1.0 - options.label_smoothing) * F.logsigmoid(x) - options.label_smoothing * F.logsigmoid(-x)


@objective("pair")
def hinge(pairs: Pairs, options: PairOptions) -> Tensor:
    """``relu(1 - beta d)``."""
    return torch.relu(1.0 - options.beta * (pairs.chosen - pairs.rejected))


@objective("pair")
def ipo(pairs: Pairs, options: PairOptions) -> Tensor:
    """``(D_c / n_c - D_r / n_r - 1 / (2 beta))^2``; a side of no tokens counts 0."""
    assert pairs.chosen_lengths is not None
    assert pairs.rejected_lengths is not None
    difference = divide(pairs.chosen, pairs.chosen_lengths) - divide(pairs.rejected, pairs.rejected_lengths)
    return (difference - 0.5 / options.beta).square()


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, smoothing=(0.0, 0.5)),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo, needs_lengths=True),
}


@torch.no_grad()
def pair_metrics(pairs: Pairs, chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> dict[str, Tensor]:
    """Rewards ``beta D`` and log-probabilities, each a mean over the pairs, under TRL's names."""
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return {name: masked_mean(value, None) for name, value in per_pair.items()}
