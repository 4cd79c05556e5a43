"""Policy surrogates: what each method minimises at a sampled token, pure functions with a declared coupling.

The mask was applied to the tokens before, so that no exponential sees what it excludes. Masks, gates and weights carry
no gradient. `prefkern.losses.policy` lists the functions.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.ratios import (
    LOG_RATIO_LIMIT,
    binary_kl,
    binary_tv,
    held,
    log_ratio,
    sequence_log_ratio,
    unmoved,
)
from prefkern.losses.reduce import divide, masked_mean, per_token, scored, sequence_lengths, sequence_sums

if TYPE_CHECKING:
    from prefkern.losses.grpo import GRPO

LOWEST_LOG_WEIGHT = math.log(1e-8)


class Tokens(NamedTuple):
    """The sampled tokens, padded ``[B, T]`` or packed ``[N]``, float32 or wider, 0 where not scored. ``logps`` and
    ``log_ratio`` carry the gradient."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    log_ratio: Tensor
    """``lp - lp_old``, or what stands for it at another level, within +-20."""
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    weights: Tensor | None = None
    """Corrections for the sampler, per token, or per sequence as a column ``[S, 1]``; not yet applied."""
    generator: torch.Generator | None = None


@objective("token")
def clipped(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-min(c1 A, c2 A)``, ``c1 = e^w``, ``c2 = clamp(c1, 1 - epsilon, 1 + epsilon_high)``; with ``delta``, the first
    c1 is ``min(c1, delta)``."""
    return _clipped(tokens.log_ratio, tokens.advantages, options)


@objective("token")
def cispo(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-sg[min(c1, epsilon_high)] A lp``: the cap of the ratio is absolute."""
    assert options.epsilon_high is not None
    return _likelihood(tokens, tokens.log_ratio.detach().exp().clamp(max=options.epsilon_high))


@objective("token")
def sapo(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A (4 / t) s(t (c1 - 1))``, t the temperature of the sign of A (negative at 0)."""
    A = tokens.advantages
    t = _by_sign(A > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, A)
    return -(torch.sigmoid(t * torch.expm1(tokens.log_ratio)) * (4.0 / t) * A)


@objective("sequence")
def vespo(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-sg[phi] A lp``, ``phi = exp(l + k log w - l w)``, ``log w`` the sequence's sum of log-ratios and log-weights,
    each within +-20, itself within [ln 1e-8, 20]; (k, l) of the sign of A (positive at 0)."""
    A = tokens.advantages
    with torch.no_grad():
        rows = sequence_sums(log_ratio(tokens.logps, tokens.old_logps), tokens.cu_seqlens)
        if tokens.weights is not None:
            logs = tokens.weights.log().clamp(LOWEST_LOG_WEIGHT, LOG_RATIO_LIMIT)
            per_sequence = logs.shape != A.shape
            rows = rows + (logs[:, 0] if per_sequence else sequence_sums(scored(logs, tokens.mask), tokens.cu_seqlens))
        log_w = per_token(rows.clamp(LOWEST_LOG_WEIGHT, LOG_RATIO_LIMIT), A, tokens.cu_seqlens)
        k = _by_sign(A >= 0, options.vespo_k_pos, options.vespo_k_neg, A)
        lambda_ = _by_sign(A >= 0, options.vespo_lambda_pos, options.vespo_lambda_neg, A)
        phi = (lambda_ + k * log_w - lambda_ * log_w.exp()).exp()
    return _likelihood(tokens, phi)


@objective("sequence")
def gspo_token(tokens: Tokens, options: "GRPO") -> Tensor:
    """As `clipped`, of the ratio ``exp(lp - sg[lp] + sg[mean over the sequence of w])``: the sequence's, moving with
    its token alone."""
    with torch.no_grad():
        level = sequence_log_ratio(tokens.logps, tokens.old_logps, tokens.mask, tokens.cu_seqlens, "sequence")
    return _clipped(held(level + unmoved(tokens.logps)), tokens.advantages, options)


@objective("sequence")
def gmpo(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-Abar exp(mean_t w'_t)`` at each token of a sequence, Abar the mean advantage, ``w'_t = sign(A) min(sign(A) w,
    sign(A) clamp(w, -epsilon, epsilon_high))``."""
    w, sign = tokens.log_ratio, tokens.advantages.sign()
    clamped = sign * torch.minimum(sign * w, sign * w.clamp(-options.epsilon, options.high))
    counts = sequence_lengths(w, tokens.mask, tokens.cu_seqlens)
    ratio = divide(sequence_sums(clamped, tokens.cu_seqlens), counts).exp()
    mean = divide(sequence_sums(tokens.advantages, tokens.cu_seqlens), counts)
    return per_token(-(mean * ratio), w, tokens.cu_seqlens)


@objective("token")
def dppo_tv(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A sg[min(c, delta)] lp m``, m = 1 where ``p - p_old <= epsilon_high`` (A > 0) or ``>= -epsilon`` (A <= 0)."""
    change = binary_tv(tokens.logps, tokens.old_logps)
    inside = torch.where(tokens.advantages > 0, change <= options.high, change >= -options.epsilon)
    return _truncated(tokens, options, inside)


@objective("token")
def dppo_kl(tokens: Tokens, options: "GRPO") -> Tensor:
    """As `dppo_tv`, m = 1 where the binary divergence d is ``<= epsilon_high`` or ``p <= p_old`` (A > 0), where it is
    ``<= epsilon`` or ``p >= p_old`` (A <= 0)."""
    d, up = binary_kl(tokens.logps, tokens.old_logps), tokens.logps.detach() - tokens.old_logps
    inside = torch.where(tokens.advantages > 0, (d <= options.high) | (up <= 0), (d <= options.epsilon) | (up >= 0))
    return _truncated(tokens, options, inside)


@objective("token")
def importance_mask(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A c m + importance_tau w^2``, m = 0 where ``p - p_old`` is outside [-epsilon, epsilon_high]."""
    change = binary_tv(tokens.logps, tokens.old_logps)
    kept = (change >= -options.epsilon) & (change <= options.high)
    w = tokens.log_ratio
    return options.importance_tau * w.square() - tokens.advantages.masked_fill(~kept, 0.0) * w.exp()


@objective("batch")
def clip_cov(tokens: Tokens, options: "GRPO") -> Tensor:
    """As `clipped`, 0 at a random share ``cov_ratio`` (at least one) of the tokens whose ``(A - mean A)(lp - mean lp)``
    lies in (clip_cov_low, clip_cov_high) and that the clip left alone."""
    losses, A = clipped(tokens, options), tokens.advantages
    with torch.no_grad():
        cov = _covariance(tokens)
        untouched = losses == -A * tokens.log_ratio.exp()
        eligible = (cov > options.clip_cov_low) & (cov < options.clip_cov_high) & untouched
        draws = torch.empty_like(A).uniform_(generator=tokens.generator)
        dropped = _largest(draws.masked_fill(~eligible, -torch.inf), options.cov_ratio, tokens.mask)
    return losses.masked_fill(dropped, 0.0)


@objective("batch")
def kl_cov(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A c``, plus ``kl_cov_coef abs(w)`` at the share ``cov_ratio`` (at least one) of the tokens with the largest
    ``(A - mean A)(lp - mean lp)``."""
    held_back = _largest(_covariance(tokens), options.cov_ratio, tokens.mask)
    pull = options.kl_cov_coef * tokens.log_ratio.abs()
    return pull.masked_fill(~held_back, 0.0) - tokens.advantages * tokens.log_ratio.exp()


@objective("token")
def importance_sampling(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A c``, without a clip."""
    return -(tokens.advantages * tokens.log_ratio.exp())


@objective("token")
def reinforce(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-A lp``."""
    return _likelihood(tokens, None)


@objective("token")
def dro(tokens: Tokens, options: "GRPO") -> Tensor:
    """``-(A lp - dro_beta / 2 w^2)``."""
    assert options.dro_beta is not None
    return _likelihood(tokens, None) + 0.5 * options.dro_beta * tokens.log_ratio.square()


def _clipped(w: Tensor, advantages: Tensor, options: "GRPO") -> Tensor:
    ratio = w.exp()
    inside = ratio.clamp(1.0 - options.epsilon, 1.0 + options.high)
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    return -torch.minimum(ratio * advantages, inside * advantages)


def _by_sign(positive: Tensor, pos: float, neg: float, like: Tensor) -> Tensor:
    return torch.where(positive, like.new_full((), pos), like.new_full((), neg))


def _likelihood(tokens: Tokens, weights: Tensor | None) -> Tensor:
    """``-sg[weights] A lp``; an impossible token of weight 0 is 0, not NaN."""
    logps = tokens.logps.clamp(min=torch.finfo(tokens.logps.dtype).min)
    return -(tokens.advantages if weights is None else weights.detach() * tokens.advantages) * logps


def _truncated(tokens: Tokens, options: "GRPO", inside: Tensor) -> Tensor:
    """``-A sg[min(c, delta)] lp`` inside a trust region, delta 20 if not given."""
    ratio = tokens.log_ratio.detach().exp().clamp(max=20.0 if options.delta is None else options.delta)
    return _likelihood(tokens, ratio.masked_fill(~inside, 0.0))


@torch.no_grad()
def _covariance(tokens: Tokens) -> Tensor:
    """``(A - mean A)(lp - mean lp)`` of each scored token, -inf elsewhere."""
    A, lp, mask = tokens.advantages, tokens.logps, tokens.mask
    products = (A - masked_mean(A, mask)) * (lp - masked_mean(lp, mask))
    return products if mask is None else products.masked_fill(~mask, -torch.inf)


@torch.no_grad()
def _largest(x: Tensor, share: float, mask: Tensor | None) -> Tensor:
    """Where the largest finite values are: a share of the scored tokens, rounded down, at least one."""
    total = x.numel()
    most = min(max(int(share * total), 1), total)
    values, places = x.flatten().topk(most)
    chosen = values > -torch.inf
    if mask is not None:  # the count is on the device: take as many as there could be, leave the last
        allowed = (share * mask.sum(dtype=torch.float64)).floor().clamp(min=1.0)
        chosen = chosen & (torch.arange(most, device=x.device) < allowed)
    return torch.zeros(total, dtype=torch.bool, device=x.device).scatter(0, places, chosen).view_as(x)
