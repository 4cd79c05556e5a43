"""Statistics of a row from slices of the vocabulary: scoring where a tile of whole rows would be too large.

The tile function folds each slice as if it were the whole vocabulary, which gives the statistics of a conditional
distribution. With ``l_s = (row_max_s - row_max) / T + log_sum_s`` the slices are then put together:

    log_sum   log sum_s exp l_s, and the slice's probability is w_s = exp(l_s - log_sum)
    entropy   sum_s w_s (entropy_s - log w_s)            log sum_v p_v^2   log sum_s w_s^2 sum (p_v^2)_s
    log p_y   from the target's slice                    top-1             from the slice of the first largest logit

in float64, so that slices cost no digits.
"""

import math

import torch
from torch import Tensor

from prefkern.head.engine.blocks import empty_tile, narrowed
from prefkern.head.engine.head import RawProduct
from prefkern.kernels.interface import Logits, RowStats, Tiles

_SKIPPED = -1
"""The target of a row that is not scored: no column of any slice."""


def forward(
    product: RawProduct,
    logits: Logits,
    targets: Tensor,  # [N]
    stats: RowStats,
    tiles: Tiles,
    shape: tuple[int, int],
) -> None:
    """Fills ``stats`` with tiles of at most ``shape`` rows and columns: one product."""
    N, V, device = targets.shape[0], product.weight.shape[0], targets.device
    rows, step = shape
    scratch = empty_tile(min(rows, N), step, product.weight.wide, device)
    for start in range(0, N, rows):
        at = slice(start, min(start + rows, N))
        chunk_logits = logits.rows(at)._replace(ignore_index=_SKIPPED)
        row_stats, row_targets = stats.rows(at), targets[at]
        ignored = row_targets == logits.ignore_index
        index = row_targets.clamp(0, V - 1)
        parts = _like(row_stats, -(-V // step))
        for part, first in enumerate(range(0, V, step)):
            columns = slice(first, min(first + step, V))
            tile = narrowed(scratch, at.stop - start, columns.stop - first)
            product.write(at, columns, tile)
            local = (index - first).clamp(0, columns.stop - first - 1).masked_fill_(ignored, _SKIPPED)
            tiles.tile_fwd(tile, local, parts.rows(part), None, chunk_logits.columns(columns))
        widths = torch.full((parts.logps.shape[0], 1), step, device=device)
        widths[-1] = V - step * (widths.shape[0] - 1)
        merged = _merge(parts, widths, index // step, chunk_logits.temperature)
        for out, value in zip(row_stats, merged, strict=True):
            if out is not None and value is not None:
                nothing = math.nan if value.is_floating_point() else False  # of a target outside the vocabulary
                out.copy_(value.masked_fill_(row_targets != index, nothing).masked_fill_(ignored, 0))


def _like(stats: RowStats, parts: int) -> RowStats:
    """Returns unwritten statistics for every slice, ``[parts, rows]``."""
    return RowStats._make(None if value is None else value.new_empty(parts, *value.shape) for value in stats)


def _merge(parts: RowStats, widths: Tensor, target_part: Tensor, temperature: Tensor | float) -> RowStats:
    """Puts the slices together."""
    part_max, part_sum = parts.row_max.double(), parts.log_sum.double()
    row_max = part_max.amax(0)
    none = row_max == -math.inf  # a row without any finite logit
    share = (part_max - row_max.masked_fill(none, 0.0)) / temperature + part_sum
    log_sum = share.logsumexp(0).masked_fill(none, 0.0)
    share -= log_sum  # log w
    chosen = target_part.unsqueeze(0)
    # of the conditional log-probability and of its slice: where both are -inf, so is the sum
    logps = (parts.logps.gather(0, chosen).double() + share.gather(0, chosen)).squeeze(0).clamp(max=0.0)
    w = share.exp()
    entropy, squares, mean, top1 = (
        None if value is None else value.double()
        for value in (parts.entropy, parts.log_sum_sq_probs, parts.mean_logit, parts.is_top1)
    )
    if entropy is not None:
        entropy = (w * entropy + torch.special.entr(w)).sum(0)
    if squares is not None:
        squares = (squares + 2 * share).logsumexp(0)
    if mean is not None:
        mean = (mean * widths).sum(0) / widths.sum()
    if parts.is_top1 is not None:
        top1 = parts.is_top1.gather(0, chosen).squeeze(0) & (part_max.argmax(0) == target_part)
    return RowStats(logps, row_max, log_sum, entropy, squares, mean, top1)
