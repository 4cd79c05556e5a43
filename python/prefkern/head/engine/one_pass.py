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

import torch
from torch import Tensor

from prefkern.head.engine import blocks, memory
from prefkern.head.engine.blocks import empty_tile
from prefkern.head.engine.products import Weight
from prefkern.head.engine.scaling import RowScales, finish, rate, scaled_rows, write_vocabulary
from prefkern.kernels.interface import Logits, RowStats, Tiles

TILE_BYTES = 64 << 20
MIN_ROWS = 256
"""Of a panel on a CPU by default. Adding a panel to grad_weight moves 8 V H bytes for its 6 C V H operations: with 512
rows a few percent of the time."""


class Tiling(NamedTuple):
    """Rows of a panel, and rows of the float32 tile through which it is filled."""

    panel: int
    chunk: int


def tiling(H: int, V: int, wide: int, held: int, max_memory: int | None) -> Tiling:
    """For logits of ``wide`` bytes and ``u`` of ``held`` bytes an entry (0: written over the logits). Both together
    take at most ``max_memory`` bytes, but are never less than a row. By default 64 MiB or 256 rows on a CPU; elsewhere
    a panel of the ``4 V H`` bytes that the float32 sum of grad_weight takes, and at least 1 GiB: then the additions to
    that sum cost little, and up to ``2 H`` rows of 16 bits need none."""
    if not held:
        rows = max(MIN_ROWS, TILE_BYTES // (V * wide)) if max_memory is None else max_memory // (V * wide)
        return Tiling(max(rows, 1), max(rows, 1))
    chunk = blocks.chunk_rows(V, wide)
    if max_memory is None:
        return Tiling(max(memory.limits(H, V, held, memory.budget(H, V, None)).held, 1), chunk)
    chunk = max(1, min(chunk, max_memory // (V * (wide + held))))
    return Tiling(max(chunk, (max_memory - chunk * V * wide) // (V * held)), chunk)


class Gradients(NamedTuple):
    """Where the gradients go, every element of them; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Head(NamedTuple):
    """What the sum is of."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    logits: Logits
    compute_dtype: torch.dtype  # of the operands in the products


def run(
    head: Head,
    coefficients: Tensor,  # [N] float32 (float64 for float64 operands)
    stats: RowStats,
    grads: Gradients,
    tiles: Tiles,
    max_memory: int | None,
) -> None:
    """Fills ``stats`` and ``grads``."""
    N, H = head.hidden.shape
    V = head.weight.shape[0]
    w = Weight(head.weight, head.compute_dtype)
    dtype = w.wide if tiles.IN_PLACE else head.compute_dtype  # of u, and of the factors of its products
    size = tiling(H, V, w.wide.itemsize, 0 if tiles.IN_PLACE else dtype.itemsize, max_memory)
    rows = even(N, size.panel)
    tile = empty_tile(min(size.chunk, rows), V, w.wide, head.hidden.device)
    u = tile
    if not tiles.IN_PLACE:
        u = empty_tile(rows, V, dtype, head.hidden.device)

    wanted = any(grad is not None for grad in grads)
    row = coefficients * -rate(head.logits.logit_scale, head.logits.temperature, w.wide)
    scales = RowScales.of(None, None, row.masked_fill(head.targets == head.logits.ignore_index, 0.0), dtype)
    totals = _Totals(grads, w.wide, scales, tiles, single=rows >= N)
    for start in range(0, N, rows):
        panel = slice(start, min(start + rows, N))
        for first in range(start, panel.stop, tile.shape[0]):
            at = slice(first, min(first + tile.shape[0], panel.stop))
            _fold(
                head,
                w,
                at,
                tile[: at.stop - first],
                stats,
                u[first - start : at.stop - start] if wanted else None,
                tiles,
            )
        if wanted:
            _add_panel(head, w, u[: panel.stop - start], panel, scales.rows(panel), grads, totals, tiles)
    totals.finish()


def _fold(head: Head, w: Weight, at: slice, tile: Tensor, stats: RowStats, u: Tensor | None, tiles: Tiles) -> None:
    """The logits of some rows, their statistics and, if wanted, their ``u``."""
    logits = head.logits.rows(at)
    w.logits(head.hidden[at].to(head.compute_dtype), slice(0, head.weight.shape[0]), tile)
    tiles.tile_fwd(tile, head.targets[at], stats.rows(at), u, logits)


def _add_panel(
    head: Head,
    w: Weight,
    u: Tensor,
    panel: slice,
    scales: RowScales,
    grads: Gradients,
    totals: "_Totals",
    tiles: Tiles,
) -> None:
    if grads.hidden is not None:
        out = grads.hidden[panel]
        product = out if out.dtype == w.wide else torch.empty(out.shape, dtype=w.wide, device=out.device)
        w.hidden(u, slice(0, u.shape[1]), product)
        tiles.scale_rows(product, scales.row, out, post=scales.post)
    scaled = None
    if grads.weight is not None:
        scaled = scaled_rows(head.hidden[panel].to(head.compute_dtype), scales.row, u.dtype, tiles)
    totals.add(u, scaled, scales.row)


def even(N: int, rows: int) -> int:
    """Panels of about equal size: a last one of few rows would cost as much as a whole one in additions."""
    panels = max(1, -(-N // rows))
    return max(1, -(-N // panels))


class _Totals:
    """The sums over panels, grad_weight and grad_bias: those of a single panel are written as they are, those of
    several are wide until the last panel."""

    def __init__(self, grads: Gradients, wide: torch.dtype, scales: RowScales, tiles: Tiles, *, single: bool) -> None:
        self._grads, self._scales, self._tiles, self._empty = grads[1:], scales, tiles, True
        self._post = scales.post if single else None  # of several panels it waits for their sum
        self._sums = [
            grad if grad is None or single or grad.dtype == wide else torch.empty_like(grad, dtype=wide)
            for grad in self._grads
        ]

    def add(self, u: Tensor, scaled: Tensor | None, row: Tensor) -> None:
        """A panel: ``u [C, V]``, ``scaled = row * hidden [C, H]`` in the dtype of u, and its ``row``."""
        scales = RowScales(None, None, row, self._post)
        weight, bias = self._sums
        columns = slice(0, u.shape[1])
        write_vocabulary(u, columns, scaled, scales, weight, bias, self._tiles, accumulate=not self._empty)
        self._empty = False

    def finish(self) -> None:
        for grad, total in zip(self._grads, self._sums, strict=True):
            if grad is None or total is None:
                continue
            if self._empty:
                grad.zero_()
            elif total is not grad or self._post is not self._scales.post:
                finish(_rows(total), self._scales.post, _rows(grad), self._tiles)


def _rows(grad: Tensor) -> Tensor:
    """As a matrix."""
    return grad if grad.ndim == 2 else grad.unsqueeze(0)
