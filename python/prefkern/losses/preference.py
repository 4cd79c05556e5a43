"""Preference pairs: the table of pair losses, each one function of the pairs and one row.

To add a loss of a pair, write its function with its declared coupling and its row in ``PAIR_LOSSES``: what it reads,
the range of its label smoothing, and its value for `EXAMPLE`, worked out by hand. Its name in ``DPOLossType`` lets type
checkers know it. Everything else (checks, messages, tests, the reference page) follows from the row.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.losses.objective import Objective, objective
from prefkern.losses.reduce import divide, masked_mean, widen
from prefkern.options import Range

DPOLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]


class Pairs(NamedTuple):
    """``chosen = g(lp_theta(y_c) - lp_ref(y_c))`` and ``rejected``, each ``[B]``, and what only some losses read."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    margin: Tensor | None = None
    """By how much the reward of the chosen should lead, ``[B]``."""
    policy_difference: Tensor | None = None
    """``lp_theta(y_c) - lp_theta(y_r)``, and the reference's."""
    ref_difference: Tensor | None = None
    chosen_nll: Tensor | None = None
    """The negative log-likelihood of the chosen: a scalar, or one value per pair."""


class PairOptions(NamedTuple):
    """The options that the functions of pairs read."""

    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


class PairLoss(NamedTuple):
    """A row of the table: a function of pairs and what it reads."""

    function: Objective[[Pairs, PairOptions], Tensor]
    expected: tuple[float, float]
    """Its values for `EXAMPLE`."""
    smoothing: Range | None = None
    """The range of its label smoothing; None: it has none."""
    needs_lengths: bool = False
    needs_likelihood: bool = False
    links: bool = False
    """Whether it takes the link of another f-divergence than reverse KL."""
    margin: bool = False
    """Whether it takes a margin per pair."""
    sorts: bool = False
    """Whether it compares sorted values, which are no longer those of their pairs."""
    source: str = "https://arxiv.org/abs/2305.18290"


def log_ratios(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Policy minus reference, in float32 or wider; no gradient reaches the reference."""
    return widen(chosen) - widen(ref_chosen).detach(), widen(rejected) - widen(ref_rejected).detach()


def reward_difference(pairs: Pairs, options: PairOptions) -> Tensor:
    """``beta d``, d the difference of the scores, less the margin: ``beta (d - margin / beta)``."""
    return lead(options.beta * (pairs.chosen - pairs.rejected), pairs.margin)


def lead(rewards: Tensor, margin: Tensor | None) -> Tensor:
    """The difference of two rewards beyond the margin."""
    return rewards if margin is None else rewards - margin


def smoothed(x: Tensor, smoothing: float) -> Tensor:
    """``-(1 - e) ls(x) - e ls(-x)``."""
    if smoothing == 0.0:
        return -F.logsigmoid(x)
    return -(1.0 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


@objective("pair")
def sigmoid(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-(1 - e) ls(beta d) - e ls(-beta d)``, d the difference of the log-ratios."""
    return smoothed(reward_difference(pairs, options), options.label_smoothing)


@objective("pair")
def hinge(pairs: Pairs, options: PairOptions) -> Tensor:
    """``relu(1 - beta d)``."""
    return torch.relu(1.0 - reward_difference(pairs, options))


@objective("pair")
def ipo(pairs: Pairs, options: PairOptions) -> Tensor:
    """``(D_c / n_c - D_r / n_r - 1 / (2 beta))^2``; a side of no tokens counts 0."""
    return (per_token_difference(pairs) - 0.5 / options.beta).square()


def per_token_difference(pairs: Pairs) -> Tensor:
    """``D_c / n_c - D_r / n_r``; a side of no tokens counts 0."""
    assert pairs.chosen_lengths is not None
    assert pairs.rejected_lengths is not None
    return divide(pairs.chosen, pairs.chosen_lengths) - divide(pairs.rejected, pairs.rejected_lengths)


@objective("pair")
def exo_pair(pairs: Pairs, options: PairOptions) -> Tensor:
    """``q_w (log q_w - log(1 - e)) + q_l (log q_l - log e)``, ``q_w = s(beta d)``, ``q_l = s(-beta d)``: the divergence
    of the policy's preference from the labels'."""
    x, e = reward_difference(pairs, options), options.label_smoothing
    won = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-e))
    return won + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(e))


@objective("sequence")
def nca_pair(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-ls(beta D_c) - ls(-beta D_c) / 2 - ls(-beta D_r) / 2``."""
    chosen, rejected = options.beta * pairs.chosen, options.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@objective("pair")
def robust(pairs: Pairs, options: PairOptions) -> Tensor:
    """``[-(1 - e) ls(beta d) + e ls(-beta d)] / (1 - 2 e)``, unbiased where a share e of the labels is flipped."""
    x, e = reward_difference(pairs, options), options.label_smoothing
    return (e * F.logsigmoid(-x) - (1.0 - e) * F.logsigmoid(x)) / (1.0 - 2.0 * e)


@objective("sequence")
def bco_pair(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-ls(beta D_c) - ls(-beta D_r)``."""
    return -F.logsigmoid(options.beta * pairs.chosen) - F.logsigmoid(-options.beta * pairs.rejected)


@objective("sequence")
def sppo_hard(pairs: Pairs, options: PairOptions) -> Tensor:
    """``(D_c - 1 / (2 beta))^2 + (D_r + 1 / (2 beta))^2``."""
    half = 0.5 / options.beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


@objective("batch")
def aot(pairs: Pairs, options: PairOptions) -> Tensor:
    """The sigmoid of ``sort(lp_c - lp_r) - sort(ref_c - ref_r)``, each sorted over the batch."""
    assert pairs.policy_difference is not None
    assert pairs.ref_difference is not None
    x = options.beta * (pairs.policy_difference.sort(dim=0).values - pairs.ref_difference.sort(dim=0).values)
    return smoothed(x, options.label_smoothing)


@objective("batch")
def aot_unpaired(pairs: Pairs, options: PairOptions) -> Tensor:
    """The sigmoid of ``sort(D_c) - sort(D_r)``, each sorted over the batch."""
    x = options.beta * (pairs.chosen.sort(dim=0).values - pairs.rejected.sort(dim=0).values)
    return smoothed(x, options.label_smoothing)


@objective("sequence")
def apo_zero(pairs: Pairs, options: PairOptions) -> Tensor:
    """``1 - s(beta D_c) + s(beta D_r)``, the first two as ``s(-beta D_c)``, which keeps its digits near 0."""
    return torch.sigmoid(-options.beta * pairs.chosen) + torch.sigmoid(options.beta * pairs.rejected)


@objective("pair")
def apo_down(pairs: Pairs, options: PairOptions) -> Tensor:
    """``s(beta D_c) + 1 - s(beta (D_c - D_r))``, the last two as ``s(-beta (D_c - D_r))``."""
    difference = pairs.chosen - pairs.rejected
    return torch.sigmoid(options.beta * pairs.chosen) + torch.sigmoid(-options.beta * difference)


@objective("pair")
def discopop(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-ls(u) (1 - w) + exp(-u) w``, ``u = beta d``, ``w = s(u / tau)``; the last term as ``exp(-u + ls(u / tau))``,
    finite at any u."""
    u = reward_difference(pairs, options)
    scaled = u / options.discopop_tau
    return torch.exp(F.logsigmoid(scaled) - u) - F.logsigmoid(u) * torch.sigmoid(-scaled)


@objective("pair")
def sigmoid_norm(pairs: Pairs, options: PairOptions) -> Tensor:
    """``-ls(beta (D_c / n_c - D_r / n_r))``; a side of no tokens counts 0."""
    return -F.logsigmoid(lead(options.beta * per_token_difference(pairs), pairs.margin))


@objective("token")
def sft(pairs: Pairs, options: PairOptions) -> Tensor:
    """The negative log-likelihood of the chosen, in every pair."""
    assert pairs.chosen_nll is not None
    return widen(pairs.chosen_nll).expand(pairs.chosen.shape)


EXAMPLE = Pairs(
    torch.tensor([1.0, -0.5]),
    torch.tensor([0.2, 0.4]),
    torch.tensor([2, 4]),
    torch.tensor([5, 2]),
    policy_difference=torch.tensor([1.1, 0.1]),
    ref_difference=torch.tensor([0.3, 1.0]),
    chosen_nll=torch.tensor(1.5),
)
EXAMPLE_BETA, EXAMPLE_SMOOTHING = 0.5, 0.1
"""Two pairs, and the options with which every row states its values (smoothing 0 where a loss has none)."""

HALF = Range(0.0, 0.5, open_high=True)
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, (0.55301525, 0.89824895), smoothing=HALF, links=True, margin=True),
    "hinge": PairLoss(hinge, (0.6, 1.45), links=True, margin=True, source="https://arxiv.org/abs/2305.10425"),
    "ipo": PairLoss(ipo, (0.2916, 1.755625), needs_lengths=True, links=True, source="https://arxiv.org/abs/2310.12036"),
    "exo_pair": PairLoss(
        exo_pair,
        (0.31359366, 0.77861076),
        smoothing=HALF._replace(open_low=True),
        links=True,
        margin=True,
        source="https://arxiv.org/abs/2402.00856",
    ),
    "nca_pair": PairLoss(nca_pair, (1.33331381, 1.51297856), source="https://arxiv.org/abs/2402.05369"),
    "robust": PairLoss(
        robust,
        (0.46301525, 0.99949895),
        smoothing=HALF,
        links=True,
        margin=True,
        source="https://arxiv.org/abs/2403.00409",
    ),
    "bco_pair": PairLoss(bco_pair, (1.21847364, 1.62407829), source="https://arxiv.org/abs/2404.04656"),
    "sppo_hard": PairLoss(sppo_hard, (1.44, 4.21), source="https://arxiv.org/abs/2405.00675"),
    "aot": PairLoss(
        aot, (0.73439666, 0.67345965), smoothing=HALF, sorts=True, source="https://arxiv.org/abs/2406.05882"
    ),
    "aot_unpaired": PairLoss(
        aot_unpaired, (0.84838216, 0.58435524), smoothing=HALF, sorts=True, source="https://arxiv.org/abs/2406.05882"
    ),
    "apo_zero": PairLoss(apo_zero, (0.90251986, 1.1120105), source="https://arxiv.org/abs/2408.06266"),
    "apo_down": PairLoss(apo_down, (1.02377167, 1.04846273), source="https://arxiv.org/abs/2408.06266"),
    "discopop": PairLoss(
        discopop, (0.67026729, 0.94332608), links=True, margin=True, source="https://arxiv.org/abs/2406.08414"
    ),
    "sigmoid_norm": PairLoss(
        sigmoid_norm,
        (0.58474516, 0.77769434),
        needs_lengths=True,
        links=True,
        margin=True,
        source="https://arxiv.org/abs/2411.15124",
    ),
    "sft": PairLoss(sft, (1.5, 1.5), needs_likelihood=True, links=True),
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
