"""Importance weights: what corrects for a sampler whose probabilities are not quite the trainer's."""

import math
from typing import Annotated, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.ratios import KLEstimator, binary_kl, binary_tv, held, kl_penalty
from prefkern.losses.reduce import (
    divide,
    masked_mean,
    masked_means,
    per_token,
    scored,
    sequence_ids,
    sequence_lengths,
    sequence_sums,
    widen,
)
from prefkern.options import FINITE, at_least, read, takes

WeightLevel = Literal["token", "sequence", "geometric"]
WeightMode = Literal["truncate", "mask", "icepop", "none"]
Gate = Literal["k1", "k2", "k3", "tv", "kl"]
GateLevel = Literal["token", "sequence_mean", "sequence_sum", "sequence_max"]

BOUNDS: dict[WeightMode, tuple[float, float]] = {
    "truncate": (0.0, 2.0),
    "mask": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "none": (0.0, math.inf),
}
"""The interval of the ratio of each mode, where none is given."""


class Importance(NamedTuple):
    """The options of `importance_weights`, complete."""

    level: WeightLevel = "token"
    mode: WeightMode = "truncate"
    low: Annotated[float | None, at_least(0.0)] = None
    high: Annotated[float | None, at_least(0.0)] = None
    gate: Gate | None = None
    gate_level: GateLevel = "token"
    gate_low: Annotated[float | None, FINITE] = None
    gate_high: Annotated[float | None, FINITE] = None
    normalize: bool = False
    metrics: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = BOUNDS[self.mode]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def check(self, where: str) -> None:
        low, high = self.bounds
        if low >= high:
            check.fail(where, f"low must be less than high, got {low} and {high}")
        if self.mode == "icepop" and self.level != "token":
            check.fail(where, f"mode='icepop' is per token, got level={self.level!r}: mode='mask' takes any level")
        if self.gate is None and (self.gate_low is not None or self.gate_high is not None):
            check.fail(where, "gate_low and gate_high bound a gate, got gate=None")
        if self.gate is not None and self.gate_low is None and self.gate_high is None:
            check.fail(where, f"gate={self.gate!r} needs gate_high, the largest value that is kept (or gate_low)")
        if self.gate_low is not None and self.gate_high is not None and self.gate_low > self.gate_high:
            check.fail(where, f"gate_low must not exceed gate_high, got {self.gate_low} and {self.gate_high}")


class ImportanceOptions(TypedDict, total=False):
    """The keywords of `importance_weights` that are no tensors."""

    level: WeightLevel
    mode: WeightMode
    low: float | None
    high: float | None
    gate: Gate | None
    gate_level: GateLevel
    gate_low: float | None
    gate_high: float | None
    normalize: bool
    metrics: bool


class ImportanceWeights(NamedTuple):
    """Weights for ``token_weights``, the mask of what is kept, and metrics; none has a gradient."""

    weights: Tensor
    """Per token, or per sequence ``[S]`` at the other levels; 0 where rejected or not scored."""
    mask: Tensor
    """Bool, per token: what is scored and kept."""
    metrics: dict[str, Tensor]


@takes(Importance)
@torch.no_grad()
def importance_weights(
    logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[ImportanceOptions],
) -> ImportanceWeights:
    """Corrections for a sampler that is not quite the trainer's policy, https://fengyao.notion.site/off-policy-rl.

    With ``r = e^w``, ``w = lp - lp_rollout`` per token, its sum over the sequence (``level="sequence"``, the ratio of
    the whole) or its mean (``geometric``), within +-20::

        truncate   clamp(r, low, high)                 TIS; 0 and 2
        mask       r where low <= r <= high, else rejected    MIS; a sequence mask at the other levels; 0 and 2
        icepop     the same per token, 1/2 and 5       https://arxiv.org/abs/2510.18855
        none       1, or the plain ratio where low or high is given: for gates alone

    and, whatever the mode, a gate that keeps tokens, or whole sequences by the mean, the sum or the largest of their
    tokens, whose value lies in [gate_low, gate_high]: k1 ``-w``, k2 ``w^2 / 2``, k3 ``e^w - 1 - w`` (estimates of the
    divergence of the sampler from the policy), tv ``|p - p_rollout|``, kl (the binary divergence). A veto, no token
    less likely than 1e-4 of what the sampler thought, is ``gate="k1", gate_level="sequence_max", gate_high=9.21``.

    What is rejected leaves through the mask, and so the denominator too: pass ``weights`` as ``token_weights`` and
    ``mask`` as ``mask`` to a policy loss. With the mask that was given here instead, a rejected token counts and weighs
    0, as in TRL 1.16 and verl 0.9.1.

    Args:
        logps: of the tokens taken, under the policy as the trainer has it (before the update: ``old_logps``).
        rollout_logps: as the sampler had it, shaped like ``logps``; padded ``[B, T]`` or packed ``[N]``. A NaN says
            that the sampler did not tell: the ratio is 1 there.
        mask: scored tokens, bool or 0/1; what it excludes may hold anything.
        low, high: bounds of the ratio; the defaults are those of the mode.
        normalize: divides the weights by their mean over what is kept (self-normalised; couples the batch).
        cu_seqlens: ``[S + 1]`` offsets of packed sequences.
        metrics: False gives an empty dict.

    Returns:
        ``ImportanceWeights(weights, mask, metrics)``, detached, float32 (float64 for float64). Metrics over scored
        tokens (sequences): ``sampling/importance_sampling_ratio/mean``, ``/min``, ``/max`` (before the bounds),
        ``sampling/sampling_logp_difference/mean`` and ``/max`` (of ``|w|`` per token), ``sampling/kept`` (share of the
        scored tokens).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, bounds in the wrong order, a gate without
            bounds, by name.
    """
    where = "importance_weights"
    chosen = read(where, options, Importance)
    inputs.tokens(where, cu_seqlens, logps=logps, rollout_logps=rollout_logps)
    if chosen.level != "token" or chosen.gate_level != "token":
        inputs.sequences(where, "logps", logps, cu_seqlens)
    given = inputs.scored(where, logps, mask, None)
    kept = torch.ones_like(logps, dtype=torch.bool) if given is None else given

    lp, rollout = scored(logps, given), scored(rollout_logps, given)
    rollout = torch.where(rollout.isnan(), lp, rollout)
    difference = lp - rollout
    level = difference
    if chosen.level != "token":
        level = sequence_sums(difference, cu_seqlens)
        if chosen.level == "geometric":
            level = divide(level, sequence_lengths(difference, given, cu_seqlens))
    ratio = held(level).exp()
    low, high = chosen.bounds
    inside = (ratio >= low) & (ratio <= high)
    if chosen.mode in ("mask", "icepop"):
        kept = kept & (inside if chosen.level == "token" else per_token(inside, lp, cu_seqlens))
    if chosen.gate is not None:
        kept = kept & _gated(lp, rollout, given, cu_seqlens, chosen)

    plain = chosen.mode == "none" and chosen.low is None and chosen.high is None
    weights = torch.ones_like(ratio) if plain else ratio.clamp(low, high)
    if chosen.level == "token":
        weights = weights.masked_fill(~kept, 0.0)
    else:
        weights = weights.masked_fill(sequence_lengths(lp, kept, cu_seqlens) == 0, 0.0)
    if chosen.normalize:
        spread = weights if chosen.level == "token" else per_token(weights, lp, cu_seqlens)
        weights = divide(weights, masked_mean(spread, kept))
    shown = _metrics(difference, ratio, chosen.level, given, kept, cu_seqlens) if chosen.metrics else {}
    return ImportanceWeights(weights, kept, shown)


def _gated(
    logps: Tensor, rollout: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: Importance
) -> Tensor:
    """Which tokens the gate keeps, in bool."""
    if options.gate == "tv":
        values = binary_tv(logps, rollout).abs()
    elif options.gate == "kl":
        values = binary_kl(logps, rollout)
    else:
        assert options.gate is not None
        estimator: KLEstimator = options.gate
        values = kl_penalty(rollout, logps, estimator)
    if options.gate_level != "token":
        values = _of_sequences(scored(values, mask), mask, cu_seqlens, options.gate_level)
    kept = torch.ones_like(values, dtype=torch.bool)
    if options.gate_low is not None:
        kept &= values >= options.gate_low
    if options.gate_high is not None:
        kept &= values <= options.gate_high
    return kept if options.gate_level == "token" else per_token(kept, logps, cu_seqlens)


def _of_sequences(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, level: GateLevel) -> Tensor:
    if level == "sequence_max":
        values = values if mask is None else values.masked_fill(~mask, -torch.inf)
        if cu_seqlens is None:
            return values.amax(dim=-1) if values.shape[1] else values.new_zeros(values.shape[0])
        rows = values.new_full((cu_seqlens.shape[0] - 1,), -torch.inf)
        return rows.scatter_reduce(0, sequence_ids(cu_seqlens, values.shape[0]), values, "amax")
    rows = sequence_sums(values, cu_seqlens)
    return rows if level == "sequence_sum" else divide(rows, sequence_lengths(values, mask, cu_seqlens))


def _metrics(
    difference: Tensor,
    ratio: Tensor,
    level: WeightLevel,
    mask: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
) -> dict[str, Tensor]:
    counted = mask if level == "token" else sequence_lengths(difference, mask, cu_seqlens) > 0
    distance = difference.abs()
    means = masked_means({"sampling/sampling_logp_difference/mean": distance, "sampling/kept": kept}, mask)
    return {
        **means,
        "sampling/sampling_logp_difference/max": _extreme(distance, mask),
        "sampling/importance_sampling_ratio/mean": masked_mean(ratio, counted),
        "sampling/importance_sampling_ratio/min": -_extreme(-ratio, counted),
        "sampling/importance_sampling_ratio/max": _extreme(ratio, counted),
    }


def _extreme(x: Tensor, mask: Tensor | None) -> Tensor:
    """The largest of what is counted; 0 of nothing."""
    flat = widen(x).flatten() if mask is None else widen(x).masked_fill(~mask, -torch.inf).flatten()
    largest = torch.cat([flat, flat.new_full((1,), -torch.inf)]).amax()
    return torch.where(largest == -torch.inf, 0.0, largest)
