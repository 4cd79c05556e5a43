"""The head in one pass: ``sum_t c_t log p_t``, and its gradients made in the forward, in bounded memory.

Where the factor ``c_t`` of every row is known beforehand, as in the cross-entropy with a given count, nothing has to
wait for the backward. A *panel* of rows at a time, with ``u = p - 1[y]`` and ``r = -c (logit_scale / T)``:

    grad_hidden = r * (u W)           grad_weight += u^T (r * hidden)          grad_bias += u^T r

and the panel is overwritten by the next. Three products (two where the weight or the hidden states need no gradient,
one where nothing does), whatever the memory; what the panels cost beside them is one addition to grad_weight each.
Sums over panels are kept in float32: many small panels are as accurate as one. On a CPU ``u`` is written over the
float32 logits; on an accelerator the panel holds ``u`` in the operands' dtype, filled through a smaller float32 tile.

The upstream gradient of the sum is one number, applied afterwards in `prefkern.head.operators.logprob_sum`.
"""

from typing import NamedTuple

from torch import Tensor

from prefkern.head.engine import blocks, memory
from prefkern.head.engine.blocks import empty_tile
from prefkern.head.engine.gradients import Gradients, HeadGradients
from prefkern.head.engine.head import Head
from prefkern.head.engine.products import Weight
from prefkern.head.engine.scaling import RowScales, rate
from prefkern.kernels.interface import RowStats, Tiles

TILE_BYTES = 64 << 20
"""Bytes of a panel on a CPU by default."""

MIN_ROWS = 256
"""Rows of a panel on a CPU at least, by default. Adding a panel to grad_weight moves 8 V H bytes for its 6 C V H
operations: with 512 rows a few percent of the time."""


class Tiling(NamedTuple):
    """Rows of a panel, and rows of the float32 tile through which it is filled."""

    panel: int
    chunk: int


def tiling(H: int, V: int, wide: int, held: int, max_memory: int | None) -> Tiling:
    """Returns the rows for logits of ``wide`` bytes and ``u`` of ``held`` bytes an entry (0: it is written over the
    logits). Both together take at most ``max_memory`` bytes, but are never less than a row. By default 64 MiB or 256
    rows on a CPU; elsewhere a panel of the ``4 V H`` bytes that the float32 sum of grad_weight takes, and at least 1
    GiB: then the additions to that sum cost little, and up to ``2 H`` rows of 16 bits need none."""
    if not held:
        rows = max(MIN_ROWS, TILE_BYTES // (V * wide)) if max_memory is None else max_memory // (V * wide)
        return Tiling(max(rows, 1), max(rows, 1))
    chunk = blocks.chunk_rows(V, wide)
    if max_memory is None:
        return Tiling(max(memory.limits(H, V, held, memory.budget(H, V, None)).held, 1), chunk)
    chunk = max(1, min(chunk, max_memory // (V * (wide + held))))
    return Tiling(max(chunk, (max_memory - chunk * V * wide) // (V * held)), chunk)


def run(
    head: Head,
    targets: Tensor,  # [N]
    coefficients: Tensor,  # [N] float32 (float64 for float64 operands)
    stats: RowStats,
    grads: Gradients,
    tiles: Tiles,
    max_memory: int | None,
) -> None:
    """Fills ``stats`` and ``grads``."""
    N, H = head.hidden.shape
    V = head.weight.shape[0]
    w, every = Weight(head.weight, head.dtype), slice(0, V)
    dtype = w.wide if tiles.IN_PLACE else head.dtype  # of u, and of the factors of its products
    size = tiling(H, V, w.wide.itemsize, 0 if tiles.IN_PLACE else dtype.itemsize, max_memory)
    rows = even(N, size.panel)
    tile = empty_tile(min(size.chunk, rows), V, w.wide, head.hidden.device)
    u = tile if tiles.IN_PLACE else empty_tile(rows, V, dtype, head.hidden.device)

    wanted = any(grad is not None for grad in grads)
    if N == 0:
        grads.zero_()
    row = (coefficients * -rate(head.logits, w.wide)).masked_fill(targets == head.logits.ignore_index, 0.0)
    scales = RowScales.from_gradients(None, None, row, dtype)
    gradients = HeadGradients(head, w, grads, scales, tiles, dtype, panel=rows)
    for start in range(0, N, rows):
        panel = slice(start, min(start + rows, N))
        # statistics and u of the panel, chunk by chunk through the float32 tile
        for first in range(start, panel.stop, tile.shape[0]):
            at = slice(first, min(first + tile.shape[0], panel.stop))
            raw, chunk_u = tile[: at.stop - first], u[first - start : at.stop - start] if wanted else None
            w.logits(head.hidden[at].to(head.dtype), every, raw)
            tiles.tile_fwd(raw, targets[at], stats.rows(at), chunk_u, head.logits.rows(at))
        # its products, before the next panel overwrites it
        if wanted:
            gradients.add(u[: panel.stop - start], every, panel)
    gradients.finish()


def even(N: int, rows: int) -> int:
    """Returns the rows of panels of about equal size: a last one of few rows would cost as much as a whole one in
    additions."""
    panels = max(1, -(-N // rows))
    return max(1, -(-N // panels))
