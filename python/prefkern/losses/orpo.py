"""Odds-ratio preference optimisation, on average log-probabilities and on hidden states."""

from functools import partial
from typing import Annotated, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.head.inputs import Head, HeadOptions
from prefkern.losses import inputs
from prefkern.losses.cross_entropy import ChosenLikelihood
from prefkern.losses.linear import sequence_form
from prefkern.losses.objective import objective
from prefkern.losses.reduce import log1mexp, masked_mean, reduce_rows, widen
from prefkern.losses.sequences import pair_logps
from prefkern.options import at_least, read, takes
from prefkern.types import LossOutput, Reduction, TokenStats


class ORPO(NamedTuple):
    """The options of `orpo_loss`, complete."""

    beta: Annotated[float, at_least(0.0)] = 0.1
    reduction: Reduction = "mean"
    metrics: bool = True


class ORPOOptions(TypedDict, total=False):
    """The keywords of `orpo_loss` that are no tensors."""

    beta: float
    reduction: Reduction
    metrics: bool


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


@takes(ORPO)
def orpo_loss(
    chosen_avg_logps: Tensor, rejected_avg_logps: Tensor, chosen_nll: Tensor, **options: Unpack[ORPOOptions]
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
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name; on the CPU, an average above 0,
            as likelihoods with the sign of a loss are.
    """
    where = "orpo_loss"
    orpo = read(where, options, ORPO)
    inputs.rows(where, chosen_avg_logps=chosen_avg_logps, rejected_avg_logps=rejected_avg_logps)
    inputs.required(where, chosen_nll=chosen_nll)
    inputs.likelihood(where, chosen_nll, chosen_avg_logps)
    inputs.log_probabilities(where, chosen_avg_logps=chosen_avg_logps, rejected_avg_logps=rejected_avg_logps)
    penalties = odds_ratio(chosen_avg_logps, rejected_avg_logps)
    losses = widen(chosen_nll) + orpo.beta * penalties
    shown = odds_metrics(chosen_avg_logps, rejected_avg_logps, chosen_nll, penalties, orpo.beta) if orpo.metrics else {}
    return LossOutput(reduce_rows(losses, orpo.reduction), shown)


class LinearORPOOptions(ORPOOptions, HeadOptions, total=False):
    """The keywords of `linear_orpo_loss` on the loss and the head."""


@takes(ORPO, Head)
def linear_orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearORPOOptions],
) -> LossOutput:
    """``orpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    The negative log-likelihood is the mean over the tokens of all chosen rows that are scored in ``nll_targets``; pairs
    and likelihood come from one pass of the head. See ``orpo_loss`` for the formulas, https://arxiv.org/abs/2403.07691,
    and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``): the completions; ``ignore_index`` is not scored.
        nll_targets: shaped like ``targets``, by default the same. TRL scores prompts here too: ``shift_labels`` of the
            unmasked chosen rows. Its rejected rows are not read; in chosen rows it must equal ``targets`` wherever
            both are scored (checked on the CPU; NaN at that token on an accelerator).
        beta, reduction, metrics: as in ``orpo_loss``.
        num_scored: counts a chosen token once that is scored in ``targets`` or in ``nll_targets``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``orpo_loss``, and means over the tokens of ``targets``:
        ``entropy``, ``logits/chosen``, ``logits/rejected`` (TRL's are over all positions, padding included),
        ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows; what the parts refuse, by name.
    """
    where = "linear_orpo_loss"
    orpo, head = read(where, options, ORPO, Head)
    inputs.check_pairs(where, targets, cu_seqlens)
    chosen, scored = inputs.first_half(targets, cu_seqlens), targets != head.ignore_index
    likelihood = ChosenLikelihood(where, targets, nll_targets, chosen, head.ignore_index)
    rows = partial(pair_logps, mask=scored, cu_seqlens=cu_seqlens, average=True)

    def loss(stats: TokenStats) -> LossOutput:
        return orpo_loss(*rows(stats.logps)[:2], likelihood.nll(stats.logps), **orpo._asdict())

    form = partial(sequence_form, where, hidden, weight, likelihood.targets, head, loss)
    return form(chosen=chosen, metrics=orpo.metrics, scored=scored)


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
