"""Preference pairs without a reference: CPO, SimPO and AlphaPO: the losses of ``preference`` on other rewards.

The reward of a completion is its log-probability, or with AlphaPO a power of its probability; SimPO asks for a margin.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.preference import PAIR_LOSSES, PairLoss, PairOptions, Pairs
from prefkern.losses.reduce import widen

CPOLossType = Literal["sigmoid", "hinge", "ipo", "simpo"]
CPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PAIR_LOSSES["sigmoid"],
    "hinge": PAIR_LOSSES["hinge"],
    "ipo": PAIR_LOSSES["ipo"],
    "simpo": PAIR_LOSSES["sigmoid"],
}
EXPONENT_LIMIT = 80.0


class CPOOptions(NamedTuple):
    loss_type: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0


def reward(logps: Tensor, alpha: float) -> Tensor:
    """``lp``, or AlphaPO's ``(1 - p^-alpha) / alpha``, which tends to it at alpha = 0; ``p^-alpha`` is held at e^80,
    without a gradient beyond."""
    logps = widen(logps)
    return logps if alpha == 0.0 else -torch.expm1((-alpha * logps).clamp(max=EXPONENT_LIMIT)) / alpha


@objective("pair")
def cpo(chosen: Tensor, rejected: Tensor, options: CPOOptions) -> Tensor:
    """The pair loss of ``x = r_c - r_r``; simpo is the sigmoid of ``x - gamma / beta``, ipo has lengths of 1."""
    chosen, rejected = reward(chosen, options.alpha), reward(rejected, options.alpha)
    if options.loss_type == "simpo":
        chosen = chosen - options.simpo_gamma / options.beta
    one = torch.ones_like(chosen)
    loss = CPO_LOSSES[options.loss_type].function
    return loss(Pairs(chosen, rejected, one, one), PairOptions(options.beta, options.label_smoothing))
