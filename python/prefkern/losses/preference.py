"""Preference pairs: the table of pair losses, each one function of the pairs and one row.

To add a loss of a pair, write its function with its declared coupling and its row in ``PAIR_LOSSES``: what it reads,
the range of its label smoothing, and its value for `EXAMPLE`, worked out by hand. Its name in ``DPOLossType`` lets type
checkers know it. Everything else (checks, messages, tests, the reference page) follows from the row.
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern import check
from prefkern.losses.objective import Objective, objective
from prefkern.losses.reduce import divide, masked_mean, widen

DPOLossType = Literal["sigmoid", "hinge", "ipo", "robust"]


class Pairs(NamedTuple):
    """``chosen = lp_theta(y_c) - lp_ref(y_c)`` and ``rejected``, each ``[B]``; the scored lengths, or None."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None


class PairOptions(Protocol):
    """The options that the functions of pairs read."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...


class PairLoss(NamedTuple):
    """A row of the table: a function of pairs and what it reads."""

    function: Objective[[Pairs, PairOptions], Tensor]
    expected: tuple[float, float]
    """Its values for `EXAMPLE`."""
    smoothing: tuple[float, float] | None = None
    """The range of its label smoothing, the upper end excluded; None: it has none."""
    needs_lengths: bool = False
    source: str = "https://arxiv.org/abs/2305.18290"


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


@objective("pair")
def robust(pairs: Pairs, options: PairOptions) -> Tensor:
    """``[-(1 - e) ls(beta d) + e ls(-beta d)] / (1 - 2 e)``, unbiased where a share e of the labels is flipped."""
    x, e = options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing
    return (e * F.logsigmoid(-x) - (1.0 - e) * F.logsigmoid(x)) / (1.0 - 2.0 * e)


EXAMPLE = Pairs(torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.4]), torch.tensor([2, 4]), torch.tensor([5, 2]))
EXAMPLE_BETA, EXAMPLE_SMOOTHING = 0.5, 0.1
"""Two pairs, and the options with which every row states its values (smoothing 0 where a loss has none)."""

PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, (0.55301525, 0.89824895), smoothing=(0.0, 0.5)),
    "hinge": PairLoss(hinge, (0.6, 1.45), source="https://arxiv.org/abs/2305.10425"),
    "ipo": PairLoss(ipo, (0.2916, 1.755625), needs_lengths=True, source="https://arxiv.org/abs/2310.12036"),
    "robust": PairLoss(
        robust, (0.46301525, 0.99949895), smoothing=(0.0, 0.5), source="https://arxiv.org/abs/2403.00409"
    ),
}


def check_pair_options(
    where: str, loss_type: str, label_smoothing: float, family: dict[str, PairLoss] = PAIR_LOSSES
) -> None:
    """Checks that the loss is one of its family and reads the smoothing that it is given."""
    check.one_of(where, "loss_type", loss_type, tuple(family))
    smoothing = family[loss_type].smoothing
    if smoothing is not None:
        low, high = smoothing
        check.number(where, "label_smoothing", label_smoothing, low=low, high=high, open_high=True)
    elif label_smoothing != 0.0:
        used = " or ".join(repr(name) for name, loss in family.items() if loss.smoothing is not None)
        check.fail(where, f"label_smoothing is for loss_type={used}; {loss_type!r} has none, got {label_smoothing!r}")


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
