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
from prefkern.head.engine.adapter import Adapter, LowRank
from prefkern.head.engine.forward import Kept
from prefkern.head.engine.products import Weight, mm
from prefkern.head.engine.scaling import RowScales, finish, rate, scaled_rows, write_vocabulary
from prefkern.kernels.interface import Factors, Logits, RowStats, Tiles


class Need(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    a: bool
    b: bool


class Gradients(NamedTuple):
    """Gradients of the head's inputs; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def backward(
    kept: Kept,
    hidden: Tensor,
    weight: Tensor,
    adapter: Adapter | None,
    targets: Tensor,
    stats: RowStats,
    logits: Logits,
    tiles: Tiles,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    need: Need,
    scratch_bytes: int = blocks.SCRATCH_BYTES,
) -> Gradients:
    """The gradients that are needed, from what the forward has kept."""
    given = (
        hidden,
        weight,
        logits.bias,
        None if adapter is None else adapter.a,
        None if adapter is None else adapter.b,
    )
    grads = Gradients(
        *(
            torch.empty_like(value, memory_format=torch.contiguous_format) if needed and value is not None else None
            for value, needed in zip(given, need, strict=True)
        )
    )
    N, F = hidden.shape[0], kept.logps.shape[0]
    if N == 0 or (g_logps is None and g_entropy is None):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads

    wide, dtype = stats.row_max.dtype, kept.held.dtype
    scored = (targets != logits.ignore_index) if targets.ndim == 1 else (targets != logits.ignore_index).any(1)
    zero = torch.zeros(N, dtype=wide, device=hidden.device)
    row = torch.where(scored, -rate(logits.logit_scale, logits.temperature, wide), zero)
    e = None if g_entropy is None else torch.where(scored, g_entropy.to(wide), zero)
    if targets.ndim == 2:
        upstream = many_targets.Upstream.of(g_logps, e, targets, stats, logits, weight.shape[0])
        scales = RowScales.of(upstream.c, e, row, dtype, upstream.largest)
        if scales.post is not None:
            upstream = upstream._replace(entries=upstream.entries / scales.post)
    else:
        upstream = None
        c = zero if g_logps is None else torch.where(scored, g_logps.to(wide), zero)
        scales = RowScales.of(c, e, row, dtype)
    if F and grads.hidden is not None:
        _frozen_rows(kept, scales.rows(slice(0, F)), grads.hidden[:F], tiles)
    if F < N:
        rest = slice(F, N)
        rows = (targets[rest], stats.rows(rest), logits.rows(rest))
        own = grads._replace(hidden=None if grads.hidden is None else grads.hidden[rest])
        _Rows(hidden[rest], weight, adapter, *rows, tiles, upstream, scratch_bytes).write(
            kept.held, scales.rows(rest), own
        )
    return grads


def _frozen_rows(kept: Kept, scales: RowScales, grad_hidden: Tensor, tiles: Tiles) -> None:
    """``row (c u W + e ...)``: no product."""
    assert scales.c is not None
    other = None if scales.e is None else (kept.entropy, scales.row * scales.e)
    tiles.scale_rows(kept.logps, scales.row * scales.c, grad_hidden, post=scales.post, other=other)


class _Rows(NamedTuple):
    """Rows whose gradient tile is held or recomputed."""

    hidden: Tensor
    weight: Tensor
    adapter: Adapter | None
    targets: Tensor
    stats: RowStats
    logits: Logits
    tiles: Tiles
    upstream: many_targets.Upstream | None
    scratch_bytes: int

    def write(self, held: Tensor, scales: RowScales, grads: Gradients) -> None:
        """Fills ``grads``; ``held [K, V]`` has the first K rows."""
        N, H = self.hidden.shape
        V, dtype = self.weight.shape[0], held.dtype
        w = Weight(self.weight, dtype, scratch=self.scratch_bytes)
        operand = self.hidden.to(dtype)
        low = None if self.adapter is None else LowRank(self.adapter, operand, w.wide)
        if scales.e is None and self.upstream is None:
            scales = scales.folded()
        whole = scales.c is None and held.shape[0] == N
        pieces = iter([(held[:, :V], slice(0, V))]) if whole else self._slices(w, operand, low, held[:, :V], scales)

        wide_hidden = grads.hidden
        if wide_hidden is not None and wide_hidden.dtype != w.wide:
            wide_hidden = torch.empty(N, H, dtype=w.wide, device=self.hidden.device)
        scaled = scaled_rows(self.hidden, scales.row, dtype, self.tiles) if grads.weight is not None else None
        narrow = None
        if self.adapter is not None and low is not None:
            narrow = _Narrow(self.adapter, low, scales, dtype, grads, self.tiles)
        for tile, columns in pieces:
            if wide_hidden is not None:
                w.hidden(tile, columns, wide_hidden, accumulate=columns.start > 0)
            write_vocabulary(tile, columns, scaled, scales, grads.weight, grads.bias, self.tiles)
            if narrow is not None:
                narrow.add(tile, columns)
        if narrow is not None:
            narrow.finish(operand, wide_hidden)
        if wide_hidden is not None and grads.hidden is not None:
            self.tiles.scale_rows(wide_hidden, scales.row, grads.hidden, post=scales.post)

    def _slices(
        self, w: Weight, operand: Tensor, low: LowRank | None, held: Tensor, scales: RowScales
    ) -> Iterator[tuple[Tensor, slice]]:
        """The gradient tile ``[N, width]`` of one slice of the vocabulary after the other, in one buffer."""
        N, V, dtype, device = operand.shape[0], self.weight.shape[0], held.dtype, operand.device
        K = held.shape[0]
        if scales.e is not None and self.logits.softcap is not None:
            K = 0  # the softcap's factor is already in u: p cannot be read back from it
        direct = self.tiles.IN_PLACE and dtype == w.wide
        padding = 0 if self.upstream is None else many_targets.PADDING
        step = blocks.slice_columns(N, V, dtype.itemsize + (0 if direct else w.wide.itemsize), self.scratch_bytes)
        buffer = torch.empty(N * (step + padding), dtype=dtype, device=device)
        scratch = None if direct else torch.empty((N - K) * step, dtype=w.wide, device=device)
        recomputed = slice(K, N)
        logits = self.logits.rows(recomputed)
        stats = self.stats.rows(recomputed)
        targets = self.targets if self.upstream is None else self.upstream.row_targets
        if self.upstream is not None:
            stats = stats._replace(logps=torch.zeros_like(stats.row_max))
        rest = scales.rows(recomputed)
        for start in range(0, V, step):
            columns = slice(start, min(start + step, V))
            width = columns.stop - start
            padded = buffer[: N * (width + padding)].view(N, width + padding)
            tile = padded[:, :width]
            if K and scales.e is None:
                tile[:K] = held[:, columns]
            elif K:
                some = slice(0, K)
                factors = Factors(scales.c, scales.e).rows(some)
                given = (held[:K, columns], targets[:K], self.stats.rows(some), factors, tile[:K], logits)
                self.tiles.held_bwd(*given, v_start=start)
            if K < N:
                raw = tile[K:] if scratch is None else scratch[: (N - K) * width].view(N - K, width)
                w.logits(operand[K:], columns, raw)
                if low is not None:
                    low.add(recomputed, columns, raw)
                factors = Factors(rest.c, rest.e)
                self.tiles.tile_bwd(raw, targets[K:], stats, factors, tile[K:], logits.columns(columns), v_start=start)
            if self.upstream is not None:
                self.upstream.write(padded, start, width)
            yield tile, columns


class _Narrow:
    """The adapter's backward, beside the weight's: the gradients of ``x = scale h A^T`` and of ``B``, then of ``A``."""

    def __init__(
        self, adapter: Adapter, low: LowRank, scales: RowScales, dtype: torch.dtype, grads: Gradients, tiles: Tiles
    ) -> None:
        self._adapter, self._scales, self._grads, self._dtype, self._tiles = adapter, scales, grads, dtype, tiles
        self._b = Weight(adapter.b, dtype)
        self._scaled = scaled_rows(low.x, scales.row, dtype, tiles) if grads.b is not None else None
        self._grad_x = None if grads.hidden is None and grads.a is None else torch.empty_like(low.x)

    def add(self, tile: Tensor, columns: slice) -> None:
        if self._grad_x is not None:
            self._b.hidden(tile, columns, self._grad_x, accumulate=columns.start > 0)
        write_vocabulary(tile, columns, self._scaled, self._scales, self._grads.b, None, self._tiles)

    def finish(self, hidden: Tensor, grad_hidden: Tensor | None) -> None:
        """Adds the adapter's share to ``grad_hidden``, whose rows are not scaled yet, and writes A's gradient."""
        if self._grad_x is None:
            return
        grad_x = self._grad_x.mul_(self._adapter.scale)
        if grad_hidden is not None:
            mm(grad_x, self._adapter.a.to(self._dtype).to(grad_x.dtype), grad_hidden, accumulate=True)
        if self._grads.a is not None:
            product = torch.empty(self._adapter.a.shape, dtype=grad_x.dtype, device=grad_x.device)
            mm(scaled_rows(grad_x, self._scales.row, self._dtype, self._tiles).T, hidden, product)
            finish(product, self._scales.post, self._grads.a, self._tiles)
