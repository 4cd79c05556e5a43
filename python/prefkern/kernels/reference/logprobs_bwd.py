"""The backward of the tile functions in plain torch: ``c u + e p (log p + entropy) (1 - t)(1 + t)``, recomputed from
some columns of the raw product, or from the held ``u``. The formulas are those of `prefkern.kernels.reference`."""

import torch
from torch import Tensor

from prefkern.kernels.interface import RowStats, activate, center, stats_rows
from prefkern.kernels.reference.rows import blocks, clear, rows_of
from prefkern.types import Temperature


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
    for block in blocks(*tile.shape):
        _rows_bwd(
            tile[block],
            bias,
            targets[block] - v_start,
            stats_rows(stats, block),
            None if c is None else c[block],
            None if e is None else e[block],
            out[block],
            logit_scale,
            softcap,
            rows_of(temperature, block),
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
    at_target = torch.expm1(stats.logps).masked_fill_(stats.logps == -torch.inf, 0.0)
    p.scatter_(1, index, torch.where(here, at_target, p.gather(1, index).squeeze(-1)).unsqueeze(-1))
    if c is not None:
        p.mul_(c.unsqueeze(-1))
    if e is not None:
        gradient.add_(p)
    if factor is not None:
        gradient.mul_(factor)
    if out.data_ptr() != gradient.data_ptr():
        out.copy_(gradient)
    clear(out, targets == ignore_index, stats.logps.isnan())


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
    for block in blocks(*held.shape):
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
