"""Several targets per row: the log-probability of each of ``y_1 .. y_Kt`` under one softmax.

The row's statistics do not depend on the target; ``lp_k = (x_k - row_max) / T - log_sum``. With upstream gradients
``c_k`` and ``C = sum_k c_k``, and f the softcap's factor, the gradient of ``-sum_k c_k lp_k`` is ``C p_v f_v`` outside
the targets and at each of them, whatever the order of the targets and with repeated ones counted together,

    (C p_k - c_k) f_k = (C expm1(lp_k) + sum of the other c) f_k

where nothing cancels for a confident token. It is written over the recomputed tile: four products, none of them rounded
before it is scaled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.kernels.interface import Logits, RowStats, Tiles

PADDING = 8
"""Columns beside a tile: entries of targets outside its slice of the vocabulary are written there."""


def chunk_fwd(
    tile: Tensor,  # [C, V], the raw product
    targets: Tensor,  # [C, Kt]
    stats: RowStats,  # logps [C, Kt], all others [C]
    logits: Logits,
    tiles: Tiles,
) -> None:
    """Fills ``stats``: those of the rows by the tile function, ``logps`` from the entries at the targets."""
    V = tile.shape[1]
    ignored = targets == logits.ignore_index
    index = targets.clamp(0, V - 1)
    x = tile.gather(1, index)
    logits.columns(index).activate(x)  # each entry with its own bias
    row_logps = torch.empty_like(stats.row_max)
    row = _row_targets(index, ignored, logits.ignore_index)
    tiles.tile_fwd(tile, row, stats._replace(logps=row_logps), None, logits)
    lp = logits.center(x, stats.row_max).sub_(stats.log_sum.unsqueeze(-1)).clamp_(max=0.0)
    outside = (targets != index) & ~ignored
    stats.logps.copy_(lp.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0.0))


def _row_targets(index: Tensor, ignored: Tensor, ignore_index: int) -> Tensor:
    """Returns one legal target per row, or ``ignore_index`` where all are ignored: it decides whether a row is read."""
    first = index.gather(1, ignored.to(torch.uint8).argmin(1, keepdim=True)).squeeze(1)
    return torch.where(ignored.all(1), ignore_index, first)


class TargetEntries(NamedTuple):
    """The gradient's entries at the targets, and what the tile function needs to fill the rest."""

    c: Tensor  # [N]
    largest: Tensor  # of the sums of |c_k|, which no entry exceeds
    row_targets: Tensor  # [N], in no column; ignore_index where nothing is scored
    targets: Tensor  # [N, Kt]
    entries: Tensor  # [N, Kt]

    @staticmethod
    def from_gradients(
        g_logps: Tensor | None,  # [N, Kt]
        e: Tensor | None,  # [N]
        targets: Tensor,
        stats: RowStats,
        logits: Logits,
        V: int,
    ) -> "TargetEntries":
        """Returns the entries of a loss with these gradients."""
        wide = stats.logps.dtype
        scored = targets != logits.ignore_index
        zero = torch.zeros(targets.shape, dtype=wide, device=targets.device)
        c = zero if g_logps is None else torch.where(scored, g_logps.to(wide), zero)
        total = c.sum(1).masked_fill((scored & stats.logps.isnan()).any(1), torch.nan)  # a target that does not exist
        # what the other targets ask for: added up, not subtracted from the total
        others = torch.stack([(c * (targets != targets[:, k : k + 1])).sum(1) for k in range(targets.shape[1])], 1)
        lp = stats.logps
        entries = total.unsqueeze(1) * torch.expm1(lp) + others
        if e is not None:
            assert stats.entropy is not None
            entries += e.unsqueeze(1) * lp.exp() * (lp.clamp(min=-1e30) + stats.entropy.unsqueeze(1))
        if logits.softcap is not None:
            temperature = logits.temperature
            if isinstance(temperature, Tensor):
                temperature = temperature.to(wide).unsqueeze(1)
            t = ((lp + stats.log_sum.unsqueeze(1)) * temperature + stats.row_max.unsqueeze(1)) / logits.softcap
            entries *= (1 - t) * (1 + t)
        entries.masked_fill_(lp == -torch.inf, 0.0)
        nowhere = V if logits.ignore_index != V else V + 1
        row_targets = torch.where(scored.any(1), nowhere, logits.ignore_index)
        return TargetEntries(total, c.abs().sum(1).amax(), row_targets, torch.where(scored, targets, -1), entries)

    def write(self, padded: Tensor, start: int, width: int) -> None:
        """Writes the entries over those of a tile of columns ``start .. start + width`` that has `PADDING` columns
        more."""
        local = self.targets - start
        index = torch.where((local >= 0) & (local < width), local, width)
        padded.scatter_(1, index, self.entries.to(padded.dtype))
