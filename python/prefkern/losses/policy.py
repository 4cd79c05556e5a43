"""Clipped policy gradients: one value per token. The mask is applied to the inputs, before any exponential."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.reduce import divide, masked_mean, scored

KLEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0


class PolicyOptions(NamedTuple):
    """The ratio's interval ``[1 - low, 1 + high]``, and the dual clip's ceiling for negative advantages."""

    low: float
    high: float
    delta: float | None = None


def log_ratio(logps: Tensor, other: Tensor) -> Tensor:
    """``logps - other`` within +-20, where its exponential and that one's gradient are finite; no gradient beyond,
    nor to ``other``."""
    return (logps - other.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@objective("token")
def clipped_policy(logps: Tensor, old_logps: Tensor, advantages: Tensor, options: PolicyOptions) -> Tensor:
    """``-min(c1 A, c2 A)``, ``c1 = e^(lp - lp_old)``, ``c2 = clamp(c1, 1 - low, 1 + high)``; with delta, the first c1
    is ``min(c1, delta)``."""
    ratio = log_ratio(logps, old_logps).exp()
    clipped = ratio.clamp(1.0 - options.low, 1.0 + options.high)
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


@objective("token")
def kl_penalty(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates of ``KL(policy || reference)`` from a sample, ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``,
    k3 ``e^x - x - 1``."""
    minus_x = log_ratio(logps, ref_logps)
    if estimator == "k1":
        return minus_x
    if estimator == "k2":
        return minus_x.square() / 2
    return torch.expm1(-minus_x) + minus_x


@objective("token")
def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """``max((v - R)^2, (v_clipped - R)^2) / 2``, ``v_clipped = v_old + clamp(v - v_old, -c, c)``."""
    old_values, returns = old_values.detach(), returns.detach()
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


@torch.no_grad()
def policy_metrics(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None, options: PolicyOptions
) -> dict[str, Tensor]:
    """Token means: how often the clip removed the gradient (below, above, either), ``E[w^2] / 2`` and the ratio."""
    w = log_ratio(logps, old_logps)
    ratio = w.exp()
    low = (ratio < 1.0 - options.low) & (advantages < 0)
    high = (ratio > 1.0 + options.high) & (advantages > 0)
    mean = masked_mean(ratio, mask)
    return {
        "policy/clipfrac_avg": masked_mean(low | high, mask),
        "policy/clipfrac_low": masked_mean(low, mask),
        "policy/clipfrac_high": masked_mean(high, mask),
        "policy/approxkl_avg": masked_mean(w.square(), mask) / 2,
        "val/ratio": mean,
        "val/ratio_var": masked_mean((ratio - mean).square(), mask),
    }


@torch.no_grad()
def value_metrics(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, cliprange: float
) -> dict[str, Tensor]:
    """How often the value clip is the larger error, and ``1 - var(R - v) / var(R)`` (0 where the returns are equal)."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    errors, spread = scored(returns - values, mask), returns - masked_mean(returns, mask)
    residual = masked_mean((errors - masked_mean(errors, mask)).square(), mask)
    variance = masked_mean(spread.square(), mask)
    return {
        "val/clipfrac_avg": masked_mean((clipped - returns).square() > (values - returns).square(), mask),
        "val/var_explained": divide(variance - residual, variance),
    }
