"""The head, forward: hidden states and the output matrix to token log-probabilities, in blocks of rows.

The one place where the vocabulary appears. ``u = p - 1[y]``, the gradient of ``-log p_y``, does not depend on the loss:
the forward writes it once, in the operands' dtype. What is kept of it depends on the plan (`prefkern.plan`):

    hold     u itself [K, V]: the loss then contributes one scalar per row, and the [N, V] tile is not touched again
    frozen   u W [F, H]: where only the hidden states need a gradient, it is that scalar times this row

`backward` has the other half. Logits are never rounded to 16 bits: products of 16-bit operands are accumulated and kept
in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks, many_targets, vocabulary_slices
from prefkern.head.engine.blocks import empty_tile
from prefkern.head.engine.head import Head, RawProduct
from prefkern.head.engine.products import Weight
from prefkern.kernels.interface import Factors, RowStats, Tiles


class Kept(NamedTuple):
    """Left by the forward for the backward; a part that is not used has no rows."""

    held: Tensor  # [K, V], rows padded as in `blocks.row_elements`: u in the compute dtype
    logps: Tensor  # [F, H]: u W
    entropy: Tensor  # [F, H]: the same for the entropy, p (log p + entropy) (1 - t)(1 + t) W


def forward(
    head: Head,
    targets: Tensor,  # [N] or [N, Kt]
    stats: RowStats,
    kept: Kept,
    tiles: Tiles,
    scratch_bytes: int = blocks.SCRATCH_BYTES,
) -> None:
    """Fills ``stats`` and ``kept``: one product, and one more for each part of a frozen head's gradient."""
    N, V = head.hidden.shape[0], head.weight.shape[0]
    K, F = kept.held.shape[0], kept.logps.shape[0]
    every, held, device = slice(0, V), kept.held[:, :V], head.hidden.device
    rows, columns = blocks.tile_shape(N, V, max(head.dtype.itemsize, 4), head.hidden.is_cuda, scratch_bytes)
    # an accelerator that takes several chunks of rows casts the weight once, if the memory for a copy is granted
    product = RawProduct(head, keep=rows < N and scratch_bytes >= blocks.SCRATCH_BYTES, scratch=scratch_bytes)
    wide = product.weight.wide

    # whole rows do not fit: statistics from slices of the vocabulary
    if columns < V and K + F == 0 and targets.ndim == 1:
        vocabulary_slices.forward(product, head.logits, targets, stats, tiles, (rows, columns))
        return

    # where u may stand in the place of the logits, held rows need no scratch: all their logits at once
    direct = tiles.IN_PLACE and head.dtype == wide
    if direct and K:
        product.write(slice(0, K), every, held)
    scratch: Tensor | None = None
    unscaled: Tensor | None = None  # a frozen head's u, where it cannot stand in the tile
    for at in blocks.row_chunks(N, K + F, rows):
        count, is_held, is_frozen = at.stop - at.start, at.start < K, at.start < F

        # the logits of a chunk of rows
        if direct and is_held:
            tile = held[at]
        else:
            if scratch is None:
                scratch = empty_tile(min(rows, N), V, wide, device)
            tile = scratch[:count]
            product.write(at, every, tile)
        chunk_logits = head.logits.rows(at)
        if targets.ndim == 2:
            many_targets.chunk_fwd(tile, targets[at], stats.rows(at), chunk_logits, tiles)
            continue

        # their statistics, and u: held, or for a moment where it is multiplied
        u = held[at] if is_held else None
        if is_frozen:
            if unscaled is None and not direct:
                unscaled = empty_tile(min(rows, F), V, head.dtype, device)
            u = tile if unscaled is None else unscaled[:count]
        # the tile functions of a CPU overwrite the raw product, which the entropy's gradient starts from again
        with_entropy = is_frozen and kept.entropy.shape[0] > 0
        raw = tile.clone() if with_entropy and tiles.IN_PLACE else tile
        tiles.tile_fwd(tile, targets[at], stats.rows(at), u, chunk_logits)

        # a frozen head's gradients without the loss's factor
        if is_frozen and u is not None:
            _gradient_rows(product.weight, u, kept.logps[at])
        if with_entropy and u is not None:
            ones = torch.ones(count, dtype=wide, device=device)
            out = raw if direct else u
            factors = Factors(torch.zeros_like(ones), ones)
            tiles.tile_bwd(raw, targets[at], stats.rows(at), factors, out, chunk_logits)
            _gradient_rows(product.weight, out, kept.entropy[at])


def _gradient_rows(w: Weight, tile: Tensor, out: Tensor) -> None:
    """Writes ``out = tile W``, rounded once."""
    wide = torch.empty(out.shape, dtype=w.wide, device=out.device) if w.casts and out.dtype != w.wide else out
    w.times_weight(tile, slice(0, tile.shape[1]), wide)
    if wide is not out:
        out.copy_(wide)
