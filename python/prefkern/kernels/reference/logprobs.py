"""Token log-probabilities in plain torch: what runs on the CPU, and the oracle of the kernels.

A *tile* is a block of the raw product ``a = h W^T``, or of logits. With ``x = softcap(logit_scale (a + bias))`` and
temperature T:

    row_max = max_v x_v                       log_sum = log sum_v exp((x_v - row_max) / T)
    log p_v = (x_v - row_max) / T - log_sum   entropy = log_sum - sum_v p_v (x_v - row_max) / T

The maximum is subtracted before the division and the logarithm of the sum is kept apart, so that a large offset common
to all logits costs nothing. Gradients, with ``t = tanh`` of the softcap (its factor is absent without one):

    u_v = -d log p_y / d a_v * T / logit_scale = (p_v - 1[v = y]) (1 - t_v)(1 + t_v)        u_y by expm1(log p_y)
    -d (c log p_y + e entropy) / d a_v * T / logit_scale = c u_v + e p_v (log p_v + entropy) (1 - t_v)(1 + t_v)

``u`` does not depend on the loss. Probability and gradient of a logit of -inf are exactly 0, also for the target; an
ignored target gives zeros, one outside the vocabulary NaN. Rows are taken a few at a time so that every pass but the
first finds its operands in the cache.
"""

import math

import torch
from torch import Tensor

from prefkern.kernels.interface import Factors, Logits, RowStats, wide_dtype
from prefkern.kernels.reference.rows import blocks, clear, scale_rows

__all__ = ["IN_PLACE", "held_bwd", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = True  # `held` may be `tile` itself: each row is read before it is overwritten


def tile_fwd(
    tile: Tensor,  # [C, V], overwritten unless `keep_tile`
    targets: Tensor,  # [C]
    stats: RowStats,
    held: Tensor | None,  # [C, V]
    logits: Logits,
    *,
    keep_tile: bool = False,
) -> None:
    """Fills ``stats`` from a tile of whole rows and writes ``u`` into ``held`` (which may be ``tile``)."""
    for rows in blocks(*tile.shape):
        u = None if held is None else held[rows]
        _fold(_own(tile[rows], keep_tile), targets[rows], stats.rows(rows), u, logits.rows(rows))


def _own(tile: Tensor, keep: bool) -> Tensor:
    """Returns the tile as it may be overwritten: itself, or a wide copy."""
    return tile.to(wide_dtype(tile.dtype), copy=True) if keep else tile


def _fold(x: Tensor, targets: Tensor, stats: RowStats, held: Tensor | None, logits: Logits) -> None:
    """`tile_fwd` of one block, which it overwrites."""
    V = x.shape[1]
    ignored = targets == logits.ignore_index
    outside = ((targets < 0) | (targets >= V)) & ~ignored
    index = targets.clamp(0, V - 1).unsqueeze(-1)

    def write(out: Tensor | None, value: Tensor) -> None:
        if out is not None:
            out.copy_(value.masked_fill_(outside, math.nan).masked_fill_(ignored, 0.0))

    # logits before the temperature, and what is asked of them
    slope = logits.activate(x)
    row_max = x.amax(-1)
    dead = row_max == -math.inf
    if stats.mean_logit is not None:
        write(stats.mean_logit, x.mean(-1) / logits.temperature)
    if stats.is_top1 is not None:
        torch.logical_and(x.argmax(-1) == targets, ~ignored, out=stats.is_top1)
    z = logits.center(x, row_max)
    z_target = z.gather(1, index).squeeze(-1)

    # softmax would add up the exponentials one after the other: beside the 1 of a confident token small ones are lost
    if held is not None and held.dtype == z.dtype and held.data_ptr() != z.data_ptr():
        p = torch.exp(z, out=held)
    else:
        p = torch.exp(z) if stats.entropy is not None else z.exp_()
    total = p.sum(-1)
    log_sum = total.log().masked_fill_(dead, 0.0)
    share = total.reciprocal_().masked_fill_(dead, 0.0)
    logps = (z_target - log_sum).clamp_(max=0.0)
    if stats.entropy is not None:
        # both terms are >= 0 and nothing cancels; the clamp makes 0 * -inf a 0
        write(stats.entropy, log_sum - (p * z.clamp_(min=-1e30)).sum(-1) * share)
    if stats.log_sum_sq_probs is not None:
        write(stats.log_sum_sq_probs, (p * p).sum(-1).log_() - 2 * log_sum)
    write(stats.logps, logps)
    write(stats.row_max, row_max)
    write(stats.log_sum, log_sum)
    if held is None:
        return

    # u: probabilities, with expm1(log p_y) at the target
    at_target = torch.expm1(logps).masked_fill_(z_target == -math.inf, 0.0).unsqueeze(-1)
    p.mul_(share.unsqueeze(-1)).scatter_(1, index, at_target)
    if slope is not None:
        p.mul_(slope)
    if p.data_ptr() != held.data_ptr():
        held.copy_(p)
    clear(held, ignored, outside)


def tile_bwd(
    tile: Tensor,  # [R, Vs], columns v_start .. v_start + Vs; overwritten unless `keep_tile`
    targets: Tensor,  # [R]
    stats: RowStats,
    factors: Factors,
    out: Tensor,  # [R, Vs], any row stride
    logits: Logits,  # of these columns
    *,
    v_start: int = 0,
    keep_tile: bool = False,
) -> None:
    """Recomputes ``c u + e p (log p + entropy) (1 - t)(1 + t)`` from a tile of some columns of the vocabulary."""
    ignored = targets == logits.ignore_index
    columns = targets - v_start
    for rows in blocks(*tile.shape):
        own, x = stats.rows(rows), _own(tile[rows], keep_tile)
        _gradient(x, columns[rows], own, factors.rows(rows), out[rows], logits.rows(rows))
        clear(out[rows], ignored[rows], own.logps.isnan())


def _gradient(x: Tensor, targets: Tensor, stats: RowStats, factors: Factors, out: Tensor, logits: Logits) -> None:
    """`tile_bwd` of one block, which it overwrites; targets are columns of the block, or none."""
    c, e = factors
    slope = logits.activate(x)
    logp = logits.center(x, stats.row_max).sub_(stats.log_sum.unsqueeze(-1))
    # the only entry that could be NaN is that of a row without a finite logit: its log p is -inf, its p 0
    p = logp.exp() if e is not None else logp.exp_()
    gradient = p
    if e is not None:
        assert stats.entropy is not None
        gradient = logp.clamp_(min=-1e30).add_(stats.entropy.unsqueeze(-1)).mul_(p).mul_(e.unsqueeze(-1))
    # then p becomes u, by expm1(log p_y) at the target where that is one of these columns
    index, here = _columns(targets, x.shape[1])
    at_target = torch.expm1(stats.logps).masked_fill_(stats.logps == -torch.inf, 0.0)
    p.scatter_(1, index, torch.where(here, at_target, p.gather(1, index).squeeze(-1)).unsqueeze(-1))
    if c is not None:
        p.mul_(c.unsqueeze(-1))
    if e is not None:
        gradient.add_(p)
    if slope is not None:
        gradient.mul_(slope)
    if out.data_ptr() != gradient.data_ptr():
        out.copy_(gradient)


def _columns(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns a legal column for every target as ``[R, 1]``, and whether it is the target's own."""
    return targets.clamp(0, width - 1).unsqueeze(-1), (targets >= 0) & (targets < width)


def held_bwd(
    held: Tensor,  # [K, Vs], columns v_start .. v_start + Vs, any row stride
    targets: Tensor,  # [K]
    stats: RowStats,
    factors: Factors,  # both given
    out: Tensor,  # [K, Vs], any row stride
    logits: Logits,
    *,
    v_start: int = 0,
) -> None:
    """Writes the same sum from the held ``u`` without softcap: ``p = u`` except at the target, where
    ``p = exp(log p_y)``."""
    c, e, entropy = factors.c, factors.e, stats.entropy
    assert c is not None
    assert e is not None
    assert entropy is not None
    for rows in blocks(*held.shape):
        u = held[rows].to(c.dtype)
        index, here = _columns(targets[rows] - v_start, u.shape[1])
        at_target = torch.where(here, stats.logps[rows].exp(), u.gather(1, index).squeeze(-1))
        p = u.clone().scatter_(1, index, at_target.unsqueeze(-1))
        gradient = p.log().clamp_(min=-1e30).add_(entropy[rows].unsqueeze(-1)).mul_(p).mul_(e[rows].unsqueeze(-1))
        out[rows].copy_(gradient.addcmul_(u, c[rows].unsqueeze(-1)))
