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
from collections.abc import Iterator

import torch
from torch import Tensor

from prefkern import plan
from prefkern.types import RowStats, Temperature

IN_PLACE = True  # `held` may be `tile` itself: each row is read before it is overwritten


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, plan.block_elements(rows, columns) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _rows(temperature: Temperature, block: slice) -> Temperature:
    return temperature[block] if isinstance(temperature, Tensor) else temperature


def _stats_rows(stats: RowStats, block: slice) -> RowStats:
    return RowStats._make(None if value is None else value[block] for value in stats)


def activate(tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor | None:
    """Turns the raw product into logits before the temperature, in place; returns the softcap's derivative."""
    if bias is not None:
        tile.add_(bias)
    if logit_scale != 1.0:
        tile.mul_(logit_scale)
    if softcap is None:
        return None
    masked = tile == -math.inf
    t = tile.div_(softcap).tanh_()
    factor = (1 - t) * (1 + t)
    tile.mul_(softcap).masked_fill_(masked, -math.inf)
    return factor


def center(x: Tensor, row_max: Tensor, temperature: Temperature) -> Tensor:
    """``(x - row_max) / T`` in place, -inf kept; a row without any finite logit stays -inf."""
    x.sub_(row_max.masked_fill(row_max == -math.inf, 0.0).unsqueeze(-1))
    if isinstance(temperature, Tensor):
        x.div_(temperature.unsqueeze(-1))
    elif temperature != 1.0:
        x.div_(temperature)
    return x


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
    for block in _blocks(*tile.shape):
        _rows_fwd(
            tile[block],
            bias,
            targets[block],
            _stats_rows(stats, block),
            None if held is None else held[block],
            logit_scale,
            softcap,
            _rows(temperature, block),
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

    same = held is not None and held.data_ptr() == z.data_ptr()
    if held is not None and held.dtype == z.dtype and not same:
        p = torch.softmax(z, -1, out=held)
    else:
        p = torch.softmax(z, -1) if stats.entropy is not None else torch.softmax(z, -1, out=z)
    if dead.any():
        p[dead] = 0.0
    log_sum = -p.amax(-1).log_()  # the largest probability is exp(0) / sum
    log_sum.masked_fill_(dead, 0.0)
    logps = (z_target - log_sum).clamp_(max=0.0)
    if stats.entropy is not None:
        # both terms are >= 0 and nothing cancels; the clamp makes 0 * -inf a 0
        write(stats.entropy, log_sum - (p * z.clamp_(min=-1e30)).sum(-1))
    if stats.log_sum_sq_probs is not None:
        write(stats.log_sum_sq_probs, (p * p).sum(-1).log_())
    write(stats.logps, logps)
    write(stats.row_max, row_max)
    write(stats.log_sum, log_sum)
    if held is None:
        return
    at_target = torch.expm1(logps).masked_fill_(z_target == -math.inf, 0.0).unsqueeze(-1)
    p.scatter_(1, index, at_target)
    if factor is not None:
        p.mul_(factor)
    if p.data_ptr() != held.data_ptr():
        held.copy_(p)
    _clear(held, ignored, outside)


def _clear(gradient: Tensor, ignored: Tensor, outside: Tensor) -> None:
    """Zero rows for ignored targets, NaN rows for targets outside the vocabulary."""
    if ignored.any():
        gradient[ignored] = 0.0
    if outside.any():
        gradient[outside] = math.nan


def tile_bwd(
    tile: Tensor,  # [R, Vs], columns v_start .. v_start + Vs; overwritten
    bias: Tensor | None,  # [Vs]
    targets: Tensor,  # [R]
    stats: RowStats,
    c: Tensor | None,  # [R], None means 1
    e: Tensor | None,  # [R], None means 0
    out: Tensor,  # [R, Vs], any row stride
    *,
    v_start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Recomputes ``c u + e p (log p + entropy) (1 - t)(1 + t)`` from a tile of some columns of the vocabulary."""
    for block in _blocks(*tile.shape):
        _rows_bwd(
            tile[block],
            bias,
            targets[block] - v_start,
            _stats_rows(stats, block),
            None if c is None else c[block],
            None if e is None else e[block],
            out[block],
            logit_scale,
            softcap,
            _rows(temperature, block),
            ignore_index - v_start,
        )


def _rows_bwd(
    x: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: RowStats,
    c: Tensor | None,
    e: Tensor | None,
    out: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    width = x.shape[1]
    factor = activate(x, bias, logit_scale, softcap)
    z = center(x, stats.row_max, temperature)
    logp = z.sub_(stats.log_sum.unsqueeze(-1))
    # the only entry that could be NaN is that of a row without a finite logit: its z is -inf, its p 0
    p = logp.exp() if e is not None else logp.exp_()
    here = (targets >= 0) & (targets < width)
    index = targets.clamp(0, width - 1).unsqueeze(-1)
    gradient = p
    if e is not None:
        assert stats.entropy is not None
        gradient = logp.clamp_(min=-1e30).add_(stats.entropy.unsqueeze(-1)).mul_(p).mul_(e.unsqueeze(-1))
    at_target = torch.expm1(stats.logps).masked_fill_(stats.logps == -math.inf, 0.0)
    p.scatter_(1, index, torch.where(here, at_target, p.gather(1, index).squeeze(-1)).unsqueeze(-1))
    if c is not None:
        p.mul_(c.unsqueeze(-1))
    if e is not None:
        gradient.add_(p)
    if factor is not None:
        gradient.mul_(factor)
    if out.data_ptr() != gradient.data_ptr():
        out.copy_(gradient)
    _clear(out, targets == ignore_index, stats.logps.isnan())


def held_bwd(
    held: Tensor,  # [K, Vs], any row stride
    targets: Tensor,  # [K], relative to the first column; one outside the columns has no entry here
    logps: Tensor,
    entropy: Tensor,
    c: Tensor,
    e: Tensor,
    out: Tensor,  # [K, Vs], any row stride
    *,
    ignore_index: int,
) -> None:
    """The same sum from the held ``u`` without softcap: ``p = u`` except at the target, where ``p = exp(log p_y)``."""
    for block in _blocks(*held.shape):
        _held_rows_bwd(held[block], targets[block], logps[block], entropy[block], c[block], e[block], out[block])


def _held_rows_bwd(
    held: Tensor, targets: Tensor, logps: Tensor, entropy: Tensor, c: Tensor, e: Tensor, out: Tensor
) -> None:
    width = held.shape[1]
    u = held.to(c.dtype)
    here = (targets >= 0) & (targets < width)
    index = targets.clamp(0, width - 1).unsqueeze(-1)
    kept = u.gather(1, index).squeeze(-1)
    p = u.clone().scatter_(1, index, torch.where(here, logps.exp(), kept).unsqueeze(-1))
    gradient = p.log().clamp_(min=-1e30).add_(entropy.unsqueeze(-1)).mul_(p).mul_(e.unsqueeze(-1))
    out.copy_(gradient.addcmul_(u, c.unsqueeze(-1)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    for block in _blocks(*logits.shape):
        tile = logits[block].to(_wide(logits.dtype), copy=True)
        _rows_fwd(
            tile,
            None,
            targets[block],
            _stats_rows(stats, block),
            None,
            1.0,
            softcap,
            _rows(temperature, block),
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
    for block in _blocks(*logits.shape):
        tile_bwd(
            logits[block].to(_wide(logits.dtype), copy=True),
            None,
            targets[block],
            _stats_rows(stats, block),
            c[block],
            None if e is None else e[block],
            grad[block],
            v_start=0,
            logit_scale=1.0,
            softcap=softcap,
            temperature=_rows(temperature, block),
            ignore_index=ignore_index,
        )
