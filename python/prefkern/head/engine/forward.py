"""The head, forward: hidden states and the output matrix to token log-probabilities, in blocks of rows.

The one place where the vocabulary appears. ``u = p - 1[y]``, the gradient of ``-log p_y``, does not depend on the loss:
the forward writes it once, in the operands' dtype. What is kept of it depends on the plan (`prefkern.plan`):

    hold     u itself [K, V]: the loss then contributes one scalar per row, and the [N, V] tile is not touched again
    frozen   u W [F, H]: where only the hidden states need a gradient, it is that scalar times this row

`backward` has the other half. Logits are never rounded to 16 bits: products of 16-bit operands are accumulated and kept
in float32.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks, many_targets, vocabulary_slices
from prefkern.head.engine.adapter import Adapter, LowRank
from prefkern.head.engine.blocks import empty_tile
from prefkern.head.engine.products import Weight
from prefkern.kernels.interface import Factors, Logits, RowStats, Tiles


class Kept(NamedTuple):
    """What the forward leaves for the backward; a part that is not used has no rows."""

    held: Tensor  # [K, V], rows padded as in `plan.row_elements`: u in the compute dtype
    logps: Tensor  # [F, H]: u W
    entropy: Tensor  # [F, H]: the same for the entropy, p (log p + entropy) (1 - t)(1 + t) W


def forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    adapter: Adapter | None,
    targets: Tensor,  # [N] or [N, Kt]
    stats: RowStats,
    kept: Kept,
    logits: Logits,
    tiles: Tiles,
    scratch_bytes: int = blocks.SCRATCH_BYTES,
) -> None:
    """Fills ``stats`` and ``kept``: one product, and one more for each part of a frozen head's gradient."""
    N, V = hidden.shape[0], weight.shape[0]
    K, F = kept.held.shape[0], kept.logps.shape[0]
    dtype, every = kept.held.dtype, slice(0, V)
    operand = hidden.to(dtype)
    held = kept.held[:, :V]
    rows, columns = blocks.tile_shape(N, V, max(dtype.itemsize, 4), hidden.is_cuda, scratch_bytes)
    w = Weight(weight, dtype, keep=rows < N and scratch_bytes >= blocks.SCRATCH_BYTES, scratch=scratch_bytes)
    low = None if adapter is None else LowRank(adapter, operand, w.wide)
    if columns < V and K + F == 0 and targets.ndim == 1:
        vocabulary_slices.forward(operand, w, low, targets, stats, logits, tiles, V, (rows, columns))
        return
    direct = tiles.IN_PLACE and dtype == w.wide
    scratch: Tensor | None = None
    unscaled: Tensor | None = None  # a frozen head's u, where it cannot stand in the tile
    if direct and K:
        w.logits(operand[:K], every, held)
        if low is not None:
            low.add(slice(0, K), every, held)
    # kept rows first; a chunk is either wholly kept or not at all
    bounds = [*range(0, K + F, rows), *range(K + F, N, rows), N]
    for start, stop in pairwise(bounds):
        at = slice(start, stop)
        into = held[at] if start < K else None
        if direct and into is not None:
            tile = into
        else:
            if scratch is None:
                scratch = empty_tile(min(rows, N), V, w.wide, hidden.device)
            tile = scratch[: stop - start]
            w.logits(operand[at], every, tile)
            if low is not None:
                low.add(at, every, tile)
        if start < F:
            if unscaled is None and not direct:
                unscaled = empty_tile(min(rows, F), V, dtype, hidden.device)
            into = tile if unscaled is None else unscaled[: stop - start]
        own = logits.rows(at)
        if targets.ndim == 2:
            many_targets.chunk_fwd(tile, targets[at], stats.rows(at), own, tiles)
            continue
        # the tile functions of a CPU overwrite the raw product, which the entropy's gradient starts from again
        raw = tile.clone() if start < F and kept.entropy.shape[0] and tiles.IN_PLACE else tile
        tiles.tile_fwd(tile, targets[at], stats.rows(at), into, own)
        if start < F and into is not None:
            _gradient_rows(w, into, kept.logps[at])
            if kept.entropy.shape[0]:
                ones = torch.ones(stop - start, dtype=w.wide, device=hidden.device)
                out = raw if direct else into
                tiles.tile_bwd(raw, targets[at], stats.rows(at), Factors(torch.zeros_like(ones), ones), out, own)
                _gradient_rows(w, out, kept.entropy[at])


def _gradient_rows(w: Weight, tile: Tensor, out: Tensor) -> None:
    """``out = tile W``, rounded once."""
    wide = torch.empty(out.shape, dtype=w.wide, device=out.device) if w.casts and out.dtype != w.wide else out
    w.hidden(tile, slice(0, tile.shape[1]), wide)
    if wide is not out:
        out.copy_(wide)
