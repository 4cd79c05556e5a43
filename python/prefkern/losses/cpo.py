"""Contrastive preference optimisation (CPO, SimPO, AlphaPO), on sequence log-probabilities and on hidden states.

Pairs without a reference: the losses of ``preference`` on other rewards. The reward of a completion is its
log-probability, or with AlphaPO a power of its probability; SimPO asks for a margin.
"""

from functools import partial
from typing import Annotated, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions
from prefkern.losses import inputs
from prefkern.losses.cross_entropy import ChosenLikelihood
from prefkern.losses.linear import sequence_form
from prefkern.losses.links import EXPONENT_LIMIT
from prefkern.losses.objective import objective
from prefkern.losses.pair_checks import check_loss_types
from prefkern.losses.preference import PAIR_LOSSES, PairLoss, PairOptions, Pairs, pair_metrics
from prefkern.losses.reduce import masked_mean, reduce_rows, widen
from prefkern.losses.sequences import pair_logps
from prefkern.options import FINITE, above, at_least, read, takes
from prefkern.types import LossOutput, Reduction, TokenStats

CPOLossType = Literal["sigmoid", "hinge", "ipo", "simpo", "cpo_simpo"]
CPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PAIR_LOSSES["sigmoid"],
    "hinge": PAIR_LOSSES["hinge"],
    "ipo": PAIR_LOSSES["ipo"],
    "simpo": PAIR_LOSSES["sigmoid"],
    "cpo_simpo": PAIR_LOSSES["sigmoid"],
}
AVERAGED = ("ipo", "simpo", "cpo_simpo")
"""The losses of mean log-probabilities; the others are of sums."""


class CPO(NamedTuple):
    """The options of `cpo_loss`, complete."""

    beta: Annotated[float, above(0.0)] = 0.1
    loss_type: CPOLossType = "sigmoid"
    label_smoothing: Annotated[float, FINITE] = 0.0
    cpo_alpha: Annotated[float | None, at_least(0.0)] = None
    simpo_gamma: Annotated[float, at_least(0.0)] = 0.5
    alpha: Annotated[float, FINITE] = 0.0
    reduction: Reduction = "mean"
    metrics: bool = True

    def check(self, where: str) -> None:
        check_loss_types(where, self.loss_type, self.label_smoothing, CPO_LOSSES)
        if self.loss_type == "simpo" and self.cpo_alpha:
            check.fail(
                where,
                f"loss_type='simpo' has no likelihood to weigh, got cpo_alpha={self.cpo_alpha}: leave it out, or take "
                "loss_type='cpo_simpo' for both (TRL's simpo)",
            )

    @property
    def likelihood_weight(self) -> float:
        """``cpo_alpha``, or what it is by default: 1, and 0 for simpo."""
        if self.cpo_alpha is not None:
            return self.cpo_alpha
        return 0.0 if self.loss_type == "simpo" else 1.0


class CPOOptions(TypedDict, total=False):
    """The keywords of `cpo_loss` that are no tensors."""

    beta: float
    loss_type: CPOLossType
    label_smoothing: float
    cpo_alpha: float | None
    simpo_gamma: float
    alpha: float
    reduction: Reduction
    metrics: bool


def reward(logps: Tensor, alpha: float) -> Tensor:
    """``lp``, or AlphaPO's ``(1 - p^-alpha) / alpha``, which tends to it at alpha = 0; ``p^-alpha`` is held at e^80,
    without a gradient beyond."""
    logps = widen(logps)
    return logps if alpha == 0.0 else -torch.expm1((-alpha * logps).clamp(max=EXPONENT_LIMIT)) / alpha


@objective("pair")
def cpo(chosen: Tensor, rejected: Tensor, options: CPO) -> Tensor:
    """The pair loss of ``x = r_c - r_r``; simpo is the sigmoid of ``x - gamma / beta``, ipo has lengths of 1."""
    chosen, rejected = reward(chosen, options.alpha), reward(rejected, options.alpha)
    if options.loss_type in ("simpo", "cpo_simpo"):
        chosen = chosen - options.simpo_gamma / options.beta
    one = torch.ones_like(chosen)
    pair_options = PairOptions(options.beta, options.label_smoothing)
    return CPO_LOSSES[options.loss_type].function(Pairs(chosen, rejected, one, one), pair_options)


@takes(CPO)
def cpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_nll: Tensor | None = None, **options: Unpack[CPOOptions]
) -> LossOutput:
    """Contrastive preference optimisation (CPO, SimPO, AlphaPO), without a reference, https://arxiv.org/abs/2401.08417.

    The pair loss plus ``cpo_alpha NLL(chosen)``, with ``x = r_c - r_r`` of the rewards, e = label_smoothing, per pair::

        sigmoid     -(1 - e) ls(beta x) - e ls(-beta x)       r = lp, a sum over tokens
        hinge       relu(1 - beta x)                          r = lp, a sum
        ipo         (x - 1 / (2 beta))^2                      r = lp, a mean over tokens
        simpo       as sigmoid, of x - simpo_gamma / beta     r = lp, a mean; without the likelihood, as SimPO is
        cpo_simpo   the same                                  r = lp, a mean; with it: what TRL calls simpo

    SimPO is https://arxiv.org/abs/2405.14734, AlphaPO https://arxiv.org/abs/2501.03884.

    With ``alpha`` the reward is AlphaPO's ``(1 - p^-alpha) / alpha``, which is lp at alpha = 0; ``p^-alpha`` is held at
    e^80, without a gradient beyond.

    Args:
        chosen_logps, rejected_logps: sums over scored tokens (``pair_logps``), for ``ipo``, ``simpo`` and ``cpo_simpo``
            means (``average=True``), each ``[B]``.
        chosen_nll: the negative log-likelihood of the chosen: a scalar (TRL: the mean over the completion tokens of the
            batch), or one value per pair ``[B]``. Left out only with ``simpo`` or ``cpo_alpha=0``.
        beta: scale of the rewards, above 0.
        label_smoothing: the chance that a label is flipped, in [0, 1/2); for ``sigmoid``, ``simpo`` and ``cpo_simpo``.
        cpo_alpha: weight of the likelihood, not negative, by default 1; ``simpo`` has none.
        simpo_gamma: the margin of ``simpo`` and ``cpo_simpo``, not negative.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]``; a scalar ``chosen_nll`` counts in every pair.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, means over the batch: ``rewards/chosen``
        (``beta r``), ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, and ``nll_loss`` where it is given. An empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "cpo_loss"
    given = read(where, options, CPO)
    inputs.rows(where, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    if chosen_nll is None and given.likelihood_weight:
        check.fail(where, f"cpo_alpha={given.likelihood_weight} weighs chosen_nll, got None: pass it, or cpo_alpha=0")
    inputs.likelihood(where, chosen_nll, chosen_logps)
    losses = cpo(chosen_logps, rejected_logps, given)
    if chosen_nll is not None and given.likelihood_weight:
        losses = losses + given.likelihood_weight * widen(chosen_nll)
    shown: dict[str, Tensor] = {}
    if given.metrics:
        rewards = Pairs(reward(chosen_logps.detach(), given.alpha), reward(rejected_logps.detach(), given.alpha))
        shown = pair_metrics(rewards, chosen_logps, rejected_logps, given.beta)
        shown |= {} if chosen_nll is None else {"nll_loss": masked_mean(chosen_nll.detach(), None)}
    return LossOutput(reduce_rows(losses, given.reduction), shown)


class LinearCPOOptions(CPOOptions, HeadOptions, total=False):
    """The keywords of `linear_cpo_loss` on the loss and the head."""


@takes(CPO, Head)
def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearCPOOptions],
) -> LossOutput:
    """``cpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    The log-probabilities are sums over tokens, and means for ``ipo`` and the SimPO forms; the negative log-likelihood
    is the mean over the tokens of all chosen rows that are scored in ``nll_targets``, from the same pass of the head.
    See ``cpo_loss`` for the formulas, https://arxiv.org/abs/2401.08417, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``): the completions; ``ignore_index`` is not scored.
        nll_targets: shaped like ``targets``, by default the same, as in TRL; see ``linear_orpo_loss``.
        beta, ..., metrics: as in ``cpo_loss``.
        num_scored: counts a chosen token once that is scored in ``targets`` or in ``nll_targets``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``cpo_loss``, and means over the tokens of ``targets``:
        ``entropy``, ``logits/chosen``, ``logits/rejected`` (TRL's are over all positions, padding included),
        ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows; what the parts refuse, by name.
    """
    where = "linear_cpo_loss"
    cpo, head = read(where, options, CPO, Head)
    inputs.check_pairs(where, targets, cu_seqlens)
    chosen, scored = inputs.first_half(targets, cu_seqlens), targets != head.ignore_index
    likelihood = ChosenLikelihood(where, targets, nll_targets, chosen, head.ignore_index)
    rows = partial(pair_logps, mask=scored, cu_seqlens=cu_seqlens, average=cpo.loss_type in AVERAGED)

    def loss(stats: TokenStats) -> LossOutput:
        return cpo_loss(*rows(stats.logps)[:2], likelihood.nll(stats.logps), **cpo._asdict())

    form = partial(sequence_form, where, hidden, weight, likelihood.targets, head, loss)
    return form(chosen=chosen, metrics=cpo.metrics, scored=scored)
