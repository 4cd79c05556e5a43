"""Log-ratios of a policy to another, per token and per sequence, and the divergences estimated from them."""

from typing import Literal

import torch
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.reduce import divide, per_token, scored, sequence_lengths, sequence_sums, widen

KLEstimator = Literal["k1", "k2", "k3"]
KLGradient = Literal["plain", "unbiased"]
RatioLevel = Literal["token", "sequence", "product"]
LOG_RATIO_LIMIT = 20.0


def held(log_ratio: Tensor) -> Tensor:
    """Within +-20, where its exponential and that one's gradient are finite; no gradient beyond."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def log_ratio(logps: Tensor, other: Tensor) -> Tensor:
    """``logps - other`` within +-20, without a gradient beyond, nor to ``other``."""
    return held(logps - other.detach())


@objective("sequence")
def sequence_log_ratio(
    logps: Tensor, other: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, level: RatioLevel
) -> Tensor:
    """The sum (``product`` of ratios) or the mean (``sequence``, their geometric mean) of ``logps - other`` over each
    sequence, within +-20, at each of its tokens. ``other`` may be the sums of the sequences."""
    if other.shape == logps.shape:
        rows = sequence_sums(scored(logps - other.detach(), mask), cu_seqlens)
    else:
        rows = sequence_sums(scored(logps, mask), cu_seqlens) - widen(other).detach()
    if level == "sequence":
        rows = divide(rows, sequence_lengths(logps, mask, cu_seqlens))
    return per_token(held(rows), logps, cu_seqlens)


def unmoved(logps: Tensor) -> Tensor:
    """Zeros with the gradient of ``logps`` (none where it is infinite)."""
    finite = torch.finfo(logps.dtype)
    moving = logps.clamp(finite.min, finite.max)
    return moving - moving.detach()


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
def unbiased_kl_penalty(logps: Tensor, ref_logps: Tensor, ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """The value of `kl_penalty` with the gradient ``sg[c k1] grad lp``, c the ratio to the policy that sampled: an
    unbiased estimate of the gradient of the divergence."""
    minus_x = log_ratio(logps, ref_logps)
    moving = (ratio * minus_x).detach() * minus_x
    return kl_penalty(logps.detach(), ref_logps, estimator) + (moving - moving.detach())


@torch.no_grad()
def binary_tv(logps: Tensor, other: Tensor) -> Tensor:
    """``p - q``, signed: how far the probability of the token taken moved, ``p = e^logps``, ``q = e^other``."""
    return logps.exp() - other.exp()


@torch.no_grad()
def binary_kl(logps: Tensor, other: Tensor) -> Tensor:
    """``q log(q / p) + (1 - q) log((1 - q) / (1 - p))``, the divergence of the events that the token is taken,
    ``p = e^logps``, ``q = e^other``; exact where p is near 1, infinite where only p is 0 or 1."""
    lp, lq = logps.clamp(max=0.0), other.clamp(max=0.0)
    taken = (lq.exp() * (lq - lp)).masked_fill(lq == -torch.inf, 0.0)
    rest = torch.expm1(lq)  # q - 1, from the logarithm: 1 - q of a rounded q would be 0
    not_taken = (-rest * (rest / torch.expm1(lp)).abs().log()).masked_fill(lq == 0.0, 0.0)
    return taken + not_taken
