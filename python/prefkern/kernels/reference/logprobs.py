"""Token log-probabilities in plain torch: what runs on the CPU, and the oracle of the kernels.

A *tile* is a block of the raw product ``a = h W^T``. With ``x = softcap(logit_scale (a + bias))`` and temperature T:

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

from prefkern.kernels.interface import RowStats, activate, center, stats_rows, wide_dtype
from prefkern.kernels.reference.logprobs_bwd import held_bwd, tile_bwd
from prefkern.kernels.reference.rows import blocks, clear, rows_of, scale_rows
from prefkern.types import Temperature

__all__ = ["IN_PLACE", "held_bwd", "logprobs_bwd", "logprobs_fwd", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = True  # `held` may be `tile` itself: each row is read before it is overwritten


def _scaled(x: Tensor, temperature: Temperature) -> Tensor:
    return x / temperature if isinstance(temperature, Tensor) or temperature != 1.0 else x


def tile_fwd(
    tile: Tensor,  # [C, V], overwritten
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [C]
    stats: RowStats,
    held: Tensor | None,  # [C, V]
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Fills ``stats`` from a tile of whole rows and writes ``u`` into ``held`` (which may be ``tile``)."""
    for block in blocks(*tile.shape):
        _rows_fwd(
            tile[block],
            bias,
            targets[block],
            stats_rows(stats, block),
            None if held is None else held[block],
            logit_scale,
            softcap,
            rows_of(temperature, block),
            ignore_index,
        )


def _rows_fwd(
    x: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: RowStats,
    held: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    V = x.shape[1]
    ignored = targets == ignore_index
    outside = ((targets < 0) | (targets >= V)) & ~ignored
    index = targets.clamp(0, V - 1).unsqueeze(-1)

    def write(out: Tensor | None, value: Tensor) -> None:
        if out is not None:
            out.copy_(value.masked_fill_(outside, math.nan).masked_fill_(ignored, 0.0))

    factor = activate(x, bias, logit_scale, softcap)
    row_max = x.amax(-1)
    dead = row_max == -math.inf
    if stats.mean_logit is not None:
        write(stats.mean_logit, _scaled(x.mean(-1), temperature))
    if stats.is_top1 is not None:
        torch.logical_and(x.argmax(-1) == targets, ~ignored, out=stats.is_top1)
    z = center(x, row_max, temperature)
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
    at_target = torch.expm1(logps).masked_fill_(z_target == -math.inf, 0.0).unsqueeze(-1)
    p.mul_(share.unsqueeze(-1)).scatter_(1, index, at_target)
    if factor is not None:
        p.mul_(factor)
    if p.data_ptr() != held.data_ptr():
        held.copy_(p)
    clear(held, ignored, outside)


def logprobs_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    stats: RowStats,
    *,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Fills ``stats`` from logits; the logits are not changed."""
    for block in blocks(*logits.shape):
        tile = logits[block].to(wide_dtype(logits.dtype), copy=True)
        _rows_fwd(
            tile,
            None,
            targets[block],
            stats_rows(stats, block),
            None,
            1.0,
            softcap,
            rows_of(temperature, block),
            ignore_index,
        )


def logprobs_bwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    stats: RowStats,
    c: Tensor,
    e: Tensor | None,
    grad: Tensor,  # [N, V]
    *,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Writes the gradient of the loss with respect to the logits: ``-(c u + e p (log p + entropy)) / T``."""
    c = -_scaled(c, temperature)
    e = None if e is None else -_scaled(e, temperature)
    for block in blocks(*logits.shape):
        tile_bwd(
            logits[block].to(wide_dtype(logits.dtype), copy=True),
            None,
            targets[block],
            stats_rows(stats, block),
            c[block],
            None if e is None else e[block],
            grad[block],
            v_start=0,
            logit_scale=1.0,
            softcap=softcap,
            temperature=rows_of(temperature, block),
            ignore_index=ignore_index,
        )
