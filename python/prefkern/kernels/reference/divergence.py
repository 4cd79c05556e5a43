"""Divergences between two heads in plain torch: what runs on the CPU, and the oracle of the kernels.

With ``p`` the policy's distribution of a row and ``q`` the reference's, ``beta`` names the divergence D as TRL does:

    beta = 0       KL(q || p), forward        u_v = p_v - q_v
    beta = 1       KL(p || q), reverse        u_v = p_v (log p_v - log q_v - D)
    between        beta KL(q || m) + (1 - beta) KL(p || m),   m = (1 - beta) p + beta q
                                              u_v = (1 - beta) p_v (log p_v - log m_v - KL(p || m))

``u`` is ``dD / d logit_v``, times the softcap's derivative ``(1 - t)(1 + t)`` where there is a cap; it does not depend
on the loss. ``log(p / m)`` and ``log(q / m)`` are made of ``d = log q - log p`` and ``exp(-|d|)``, so that nothing
overflows or cancels. A logit of -inf has no probability and no gradient; D is infinite where the distribution in front
has a token that the other has not, and NaN where one has no finite logit at all. Row statistics are those of
`prefkern.kernels.reference.logprobs`.

In float16 ``u`` is written times ``peak / bound``: probabilities of 1e-6 and their differences stay normal numbers.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from prefkern.kernels.interface import DivergenceResults, DivergenceStats, Logits, TilePair
from prefkern.kernels.reference.rows import blocks, scale_rows

__all__ = ["IN_PLACE", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = True  # `held` may be `tile` itself: each row is read before it is overwritten


def tile_fwd(
    pair: TilePair, results: DivergenceResults, held: Tensor | None, *, beta: float, peak: float | None
) -> None:
    """Fills ``results`` from tiles of whole rows and writes ``u`` into ``held [C, V]``."""
    for rows in blocks(*pair.tile.shape):
        block, own = pair.rows(rows), results.rows(rows)
        # log-probabilities of both heads, and the divergence
        lp, slope, row_max, log_sum = _log_probs(block.tile, block.logits)
        lq, _, ref_row_max, ref_log_sum = _log_probs(block.ref_tile, block.ref_logits)
        both = _LogProbs(lp, lq, beta)
        value, center = both.divergence()
        computed = [value.clamp_(min=0.0), row_max, log_sum, ref_row_max, ref_log_sum, center]
        written = [own.divergence, *own.stats]
        if own.entropy is not None:
            computed.append(both.entropy())
            written.append(own.entropy)
        ignored = None if block.scored is None else ~block.scored
        for out, result in zip(written, computed, strict=True):
            out.copy_(result if ignored is None else result.masked_fill(ignored, 0.0))
        # the unscaled gradient, of the statistics as they are kept
        if held is not None:
            _write(held[rows], both.gradient(own.stats.center), slope, None, own.stats.bound(beta), peak, ignored)


def tile_bwd(
    pair: TilePair,  # of some columns of the vocabulary
    stats: DivergenceStats,
    c: Tensor | None,  # [R], None means 1
    out: Tensor,  # [R, Vs], any row stride; may be the policy's tile
    *,
    beta: float,
    peak: float | None,
) -> None:
    """Recomputes ``c u`` from tiles of some columns."""
    for rows in blocks(*pair.tile.shape):
        block, own = pair.rows(rows), stats.rows(rows)
        lp, slope, *_ = _log_probs(block.tile, block.logits, own.row_max, own.log_sum)
        lq, *_ = _log_probs(block.ref_tile, block.ref_logits, own.ref_row_max, own.ref_log_sum)
        gradient = _LogProbs(lp, lq, beta).gradient(own.center)
        ignored = None if block.scored is None else ~block.scored
        _write(out[rows], gradient, slope, None if c is None else c[rows], own.bound(beta), peak, ignored)


def _log_probs(
    tile: Tensor, logits: Logits, row_max: Tensor | None = None, log_sum: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns log-probabilities (a new tensor), the softcap's derivative, and the row statistics, found if not
    given."""
    x = tile.to(torch.promote_types(tile.dtype, torch.float32), copy=True)
    slope = logits.activate(x)
    if row_max is None or log_sum is None:
        row_max = x.amax(-1)
        z = logits.center(x, row_max)
        log_sum = torch.exp(z).sum(-1).log_()  # in levels, as in `prefkern.kernels.reference.logprobs`
        log_sum.masked_fill_(log_sum == -math.inf, math.nan)  # without any finite logit there is no distribution
        return z.sub_(log_sum.unsqueeze(-1)), slope, row_max, log_sum
    return logits.center(x, row_max).sub_(log_sum.unsqueeze(-1)), slope, row_max, log_sum


def _write(
    out: Tensor,
    u: Tensor,
    slope: Tensor | None,
    c: Tensor | None,
    bound: Tensor,
    peak: float | None,
    ignored: Tensor | None,
) -> None:
    if slope is not None:
        u.mul_(slope)
    if peak is not None:
        u.mul_((peak / bound).unsqueeze(-1))
    if c is not None:
        u.mul_(c.unsqueeze(-1))
    out.copy_(u)
    if ignored is not None and ignored.any():
        out[ignored] = 0.0


class _LogProbs:
    """The log-probabilities of some rows under both heads, and what is made of them, each at most once."""

    def __init__(self, lp: Tensor, lq: Tensor, beta: float) -> None:
        self._lp, self._lq, self._beta = lp, lq, beta
        self._masked = bool((lp.amin(-1) == -math.inf).any() | (lq.amin(-1) == -math.inf).any())

    @cached_property
    def _p(self) -> Tensor:
        return self._lp.exp()

    @cached_property
    def _q(self) -> Tensor:
        return self._lq.exp()

    def divergence(self) -> tuple[Tensor, Tensor]:
        """Returns D, and the center of the gradient."""
        if self._beta == 0.0:
            value = self._expected_gap(self._q, self._lq, self._lp)
            return value, value
        if self._beta == 1.0:
            value = self._expected_gap(self._p, self._lp, self._lq)
            return value, value.masked_fill(value == math.inf, math.nan)  # an infinite D has no derivative
        policy, reference = self._against_mixture
        center = (self._p * policy).sum(-1)
        return (1.0 - self._beta) * center + self._beta * (self._q * reference).sum(-1), center

    def entropy(self) -> Tensor:
        return -(self._p * self._lp.clamp(min=-1e30)).sum(-1)

    def gradient(self, center: Tensor) -> Tensor:
        """Returns ``u`` without the softcap's factor, in a new tensor."""
        if self._beta == 0.0:
            u = self._p - self._q
        elif self._beta == 1.0:
            u = (self._lp - self._lq).sub_(center.unsqueeze(-1)).mul_(self._p)
        else:
            u = (self._against_mixture[0] - center.unsqueeze(-1)).mul_(self._p).mul_(1.0 - self._beta)
        return u.masked_fill_(self._lp == -math.inf, 0.0) if self._masked else u

    def _expected_gap(self, p: Tensor, lp: Tensor, lq: Tensor) -> Tensor:
        """Returns ``sum p (log p - log q)``: 0 where p is, infinite where only q is, whatever p underflows to."""
        gap = (lp - lq).mul_(p)
        if self._masked:
            gap = gap.masked_fill_(lq == -math.inf, math.inf).masked_fill_(lp == -math.inf, 0.0)
        return gap.sum(-1)

    @cached_property
    def _against_mixture(self) -> tuple[Tensor, Tensor]:
        """Returns ``log(p / m)`` and ``log(q / m)``; finite also where p or q is 0."""
        beta = self._beta
        d = self._lq.clamp(min=-1e30) - self._lp.clamp(min=-1e30)
        t = d.abs().neg_().exp_()
        larger = torch.where(d > 0, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t).log_()
        return -d.clamp(min=0.0) - larger, d.clamp(max=0.0) - larger
