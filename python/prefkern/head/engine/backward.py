"""The head, backward: two products for the rows whose unscaled gradient ``u`` is held, three for those beyond.

The loss enters as one scalar per row, ``r = -(logit_scale / T) dL/d log p_y``, which never touches the held tile:

    grad_hidden = r * (u W)           grad_weight = u^T (r * hidden)          grad_bias = u^T r

Rows that are not held are recomputed slice by slice of the vocabulary, so that every slice of grad_weight is written
once. A gradient of the entropy needs its own pass: then the slices hold ``c u + e p (log p + entropy)``. A frozen head
whose ``u W`` was kept needs no product. An adapter is a second, narrow pair of hidden states and weight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks, many_targets
from prefkern.head.engine.forward import Kept
from prefkern.head.engine.gradients import Gradients, HeadGradients
from prefkern.head.engine.head import Head, RawProduct
from prefkern.head.engine.many_targets import TargetEntries
from prefkern.head.engine.scaling import RowScales, rate
from prefkern.kernels.interface import Logits, RowStats, Tiles


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the results of the forward; None is 0."""

    logps: Tensor | None  # as the targets
    entropy: Tensor | None  # [N]


def backward(
    head: Head,
    targets: Tensor,  # [N] or [N, Kt]
    stats: RowStats,
    kept: Kept,
    upstream: Upstream,
    grads: Gradients,
    tiles: Tiles,
    scratch_bytes: int = blocks.SCRATCH_BYTES,
) -> None:
    """Fills ``grads`` from what the forward has kept."""
    N, F = head.hidden.shape[0], kept.logps.shape[0]
    if N == 0 or upstream == (None, None):
        grads.zero_()
        return

    # the loss's factors of each row: of rows that are not scored 0, whatever stands upstream
    wide = stats.row_max.dtype
    ignored = targets == head.logits.ignore_index
    scored = ~ignored if targets.ndim == 1 else ~ignored.all(1)
    zero = torch.zeros(N, dtype=wide, device=head.hidden.device)
    row = torch.where(scored, -rate(head.logits, wide), zero)
    e = None if upstream.entropy is None else torch.where(scored, upstream.entropy.to(wide), zero)
    entries = None
    if targets.ndim == 2:
        V = head.weight.shape[0]
        entries = TargetEntries.from_gradients(upstream.logps, e, targets, stats, head.logits, V)
        scales = RowScales.from_gradients(entries.c, e, row, head.dtype, entries.largest)
        if scales.post is not None:
            entries = entries._replace(entries=entries.entries / scales.post)
    else:
        c = zero if upstream.logps is None else torch.where(scored, upstream.logps.to(wide), zero)
        scales = RowScales.from_gradients(c, e, row, head.dtype)

    # a frozen head's rows: what was kept, scaled
    if F and grads.hidden is not None:
        _write_frozen(kept, scales.rows(slice(0, F)), grads.hidden[:F], tiles)
    if F == N:
        return

    # all others: gradient tiles, each multiplied twice
    others = slice(F, N)
    head, scales = head.rows(others), scales.rows(others)
    if grads.hidden is not None:
        grads = grads._replace(hidden=grads.hidden[others])
    if scales.e is None and entries is None:
        scales = scales.folded()
    product = RawProduct(head, scratch=scratch_bytes)
    gradients = HeadGradients(head, product.weight, grads, scales, tiles, head.dtype, adapter=product.adapter)
    rows = _Rows(targets[others], stats.rows(others), scales, entries)
    for tile, columns in _gradient_tiles(product, head.logits, rows, kept.held[:, : head.weight.shape[0]], tiles):
        gradients.add(tile, columns)
    gradients.finish()


def _write_frozen(kept: Kept, scales: RowScales, grad_hidden: Tensor, tiles: Tiles) -> None:
    """Writes ``row (c u W + e ...)``: no product."""
    assert scales.c is not None
    other = None if scales.e is None else (kept.entropy, scales.row * scales.e)
    tiles.scale_rows(kept.logps, scales.row * scales.c, grad_hidden, post=scales.post, other=other)


class _Rows(NamedTuple):
    """Values from which the gradient tile of some rows is computed, beside their logits."""

    targets: Tensor
    stats: RowStats
    scales: RowScales
    entries: TargetEntries | None  # of several targets per row

    def recomputed(self, rows: slice) -> "_Rows":
        """Returns those of some rows to recompute; of several targets none is a column then: entries come later."""
        stats, targets = self.stats.rows(rows), self.targets
        if self.entries is not None:
            stats, targets = stats._replace(logps=torch.zeros_like(stats.row_max)), self.entries.row_targets
        return _Rows(targets[rows], stats, self.scales.rows(rows), None)


def _gradient_tiles(
    product: RawProduct, logits: Logits, rows: _Rows, held: Tensor, tiles: Tiles
) -> Iterator[tuple[Tensor, slice]]:
    """Yields the gradient tile of all rows: whole if all are held, else of one slice of the vocabulary after the other,
    in one buffer. ``held [K, V]`` has the first K rows."""
    (N, _), (K, V), dtype, device = product.operand.shape, held.shape, held.dtype, held.device
    scales, wide = rows.scales, product.weight.wide
    if scales.c is None and K == N:
        yield held, slice(0, V)
        return
    if scales.e is not None and logits.softcap is not None:
        K = 0  # the softcap's factor is already in u: p cannot be read back from it
    direct = tiles.IN_PLACE and dtype == wide
    padding = 0 if rows.entries is None else many_targets.PADDING
    step = blocks.slice_columns(N, V, dtype.itemsize + (0 if direct else wide.itemsize), product.weight.scratch)
    buffer = torch.empty(N * (step + padding), dtype=dtype, device=device)
    scratch = None if direct else torch.empty((N - K) * step, dtype=wide, device=device)
    kept, beyond = slice(0, K), slice(K, N)
    recomputed, logits = rows.recomputed(beyond), logits.rows(beyond)
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        width = columns.stop - start
        padded = buffer[: N * (width + padding)].view(N, width + padding)
        tile = padded[:, :width]

        # held rows: u as it is, or with the entropy's share
        if K and scales.e is None:
            tile[:K] = held[:, columns]
        elif K:
            given = (held[:K, columns], rows.targets[kept], rows.stats.rows(kept), scales.factors.rows(kept), tile[:K])
            tiles.held_bwd(*given, logits, v_start=start)

        # rows beyond them: their logits again
        if K < N:
            raw = tile[K:] if scratch is None else scratch[: (N - K) * width].view(N - K, width)
            product.write(beyond, columns, raw)
            given = (raw, recomputed.targets, recomputed.stats, recomputed.scales.factors, tile[K:])
            tiles.tile_bwd(*given, logits.columns(columns), v_start=start)
        if rows.entries is not None:
            rows.entries.write(padded, start, width)
        yield tile, columns
