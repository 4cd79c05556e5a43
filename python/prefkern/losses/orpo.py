"""Odds-ratio preference optimisation on average log-probabilities."""

from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.reduce import reduce_rows, widen
from prefkern.objectives.orpo import odds_metrics, odds_ratio
from prefkern.types import LossOutput, Reduction


def orpo_loss(
    chosen_avg_logps: Tensor,
    rejected_avg_logps: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    metrics: bool = True,
) -> LossOutput:
    """Odds-ratio preference optimisation, without a reference model, https://arxiv.org/abs/2403.07691.

    ``NLL(chosen) - beta ls(log_odds)`` per pair, ``log_odds = (a_c - a_r) - (log(1 - e^a_c) - log(1 - e^a_r))``, a the
    mean log-probability of the scored tokens. An average of exactly 0 (a fully masked sequence, or one of certainty)
    stays finite, and has no gradient there.

    Args:
        chosen_avg_logps, rejected_avg_logps: means over scored tokens (``pair_logps(..., average=True)``), ``[B]``.
        chosen_nll: the negative log-likelihood of the chosen: a scalar (TRL: the mean over all non-padding tokens of
            the batch, prompts included), or one value per pair ``[B]``.
        beta: weight of the odds ratio, not negative.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]``; a scalar ``chosen_nll`` counts in every pair.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, means over the batch: ``rewards/chosen``
        (``beta a``), ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, ``log_odds_ratio`` (``ls(log_odds)``), ``log_odds_chosen``, ``nll_loss``. An empty batch
        gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "orpo_loss"
    beta = check_options(where, beta, reduction)
    inputs.rows(where, chosen_avg_logps=chosen_avg_logps, rejected_avg_logps=rejected_avg_logps)
    inputs.required(where, chosen_nll=chosen_nll)
    inputs.likelihood(where, chosen_nll, chosen_avg_logps)
    penalties = odds_ratio(chosen_avg_logps, rejected_avg_logps)
    losses = widen(chosen_nll) + beta * penalties
    shown = odds_metrics(chosen_avg_logps, rejected_avg_logps, chosen_nll, penalties, beta) if metrics else {}
    return LossOutput(reduce_rows(losses, reduction), shown)


def check_options(where: str, beta: float, reduction: str) -> float:
    check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    return check.number(where, "beta", beta, low=0.0)
