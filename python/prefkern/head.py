"""The head: hidden states and the output matrix to token log-probabilities and back, in blocks.

The one place where the vocabulary appears. ``u = p - 1[y]``, the gradient of ``-log p_y``, does not depend on the loss:
the forward writes it once, in the operands' dtype, into ``held [K, V]``. The loss then contributes one scalar per row,
``r = -(logit_scale / T) dL/d log p_y``, which never touches the [N, V] tile again:

    grad_hidden = r * (u W)           grad_weight = u^T (r * hidden)          grad_bias = u^T r

Rows beyond K are recomputed in the backward, slice by slice of the vocabulary, so that every slice of grad_weight is
written once. A gradient of the entropy needs its own pass: then the slices hold ``c u + e p (log p + entropy)``.

Logits are never rounded to 16 bits: products of 16-bit operands are accumulated and kept in float32.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefkern import plan
from prefkern.products import Weight, mm
from prefkern.types import RowStats, Temperature


class Tiles(Protocol):
    """The tile functions: `prefkern.reference` or `prefkern.kernels.fold`."""

    IN_PLACE: bool

    def tile_fwd(
        self,
        tile: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        stats: RowStats,
        held: Tensor | None,
        *,
        logit_scale: float,
        softcap: float | None,
        temperature: Temperature,
        ignore_index: int,
    ) -> None: ...

    def tile_bwd(
        self,
        tile: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        stats: RowStats,
        c: Tensor | None,
        e: Tensor | None,
        out: Tensor,
        *,
        v_start: int,
        logit_scale: float,
        softcap: float | None,
        temperature: Temperature,
        ignore_index: int,
    ) -> None: ...

    def held_bwd(
        self,
        held: Tensor,
        targets: Tensor,
        logps: Tensor,
        entropy: Tensor,
        c: Tensor,
        e: Tensor,
        out: Tensor,
        *,
        ignore_index: int,
    ) -> None: ...


class Logits(NamedTuple):
    """How logits are made of the raw product: ``softcap(logit_scale (h W^T + bias)) / temperature``."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: Temperature
    ignore_index: int


def forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    stats: RowStats,
    held: Tensor,  # [K, V] in the compute dtype, K <= N
    logits: Logits,
    tiles: Tiles,
) -> None:
    """Fills ``stats`` and ``held``: one product."""
    N, V = hidden.shape[0], weight.shape[0]
    K = held.shape[0]
    operand = hidden.to(held.dtype)
    w = Weight(weight, held.dtype)
    direct = tiles.IN_PLACE and held.dtype == w.wide
    rows = max(plan.chunk_rows(V, w.wide.itemsize), 1)
    scratch: Tensor | None = None
    if direct and K:
        w.logits(operand[:K], slice(0, V), held)
    # held rows first; a chunk is either wholly held or not at all
    bounds = [*range(0, K, rows), *range(K, N, rows), N]
    for start, stop in pairwise(bounds):
        kept = held[start:stop] if start < K else None
        if direct and kept is not None:
            tile = kept
        else:
            if scratch is None:
                scratch = torch.empty(min(rows, N), V, dtype=w.wide, device=hidden.device)
            tile = scratch[: stop - start]
            w.logits(operand[start:stop], slice(0, V), tile)
        tiles.tile_fwd(
            tile,
            logits.bias,
            targets[start:stop],
            RowStats._make(None if value is None else value[start:stop] for value in stats),
            kept,
            logit_scale=logits.logit_scale,
            softcap=logits.softcap,
            temperature=_rows(logits.temperature, slice(start, stop)),
            ignore_index=logits.ignore_index,
        )


class Gradients(NamedTuple):
    """Gradients of the head's inputs; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _RowScales(NamedTuple):
    """How the loss enters the backward. With the tile ``c u + e p (log p + entropy)`` (``u`` alone where c is None):
    grad_hidden = post row (tile W), grad_weight = post tile^T (row hidden), grad_bias = post tile^T row."""

    c: Tensor | None
    e: Tensor | None
    row: Tensor
    post: Tensor | None

    @staticmethod
    def of(
        g_logps: Tensor | None,
        g_entropy: Tensor | None,
        logits: Logits,
        scored: Tensor,
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> "_RowScales":
        zero = torch.zeros(scored.shape, dtype=wide, device=scored.device)
        c = zero if g_logps is None else torch.where(scored, g_logps.to(wide), zero)
        e = None if g_entropy is None else torch.where(scored, g_entropy.to(wide), zero)
        temperature = logits.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(wide)
        row = torch.where(scored, -logits.logit_scale / temperature, zero)
        post = None
        if dtype == torch.float16:
            # a loss divided by many tokens underflows in float16: normalised by a power of two, undone in float32
            largest = c.abs().amax() if e is None else torch.maximum(c.abs().amax(), e.abs().amax())
            post = torch.exp2(largest.clamp(min=torch.finfo(wide).tiny).log2().ceil())
            c = c / post
            e = None if e is None else e / post
        return _RowScales(None, None, row * c, post) if e is None else _RowScales(c, e, row, post)


def backward(
    held: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    stats: RowStats,
    logits: Logits,
    tiles: Tiles,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients from the held rows and, beyond them, from recomputed ones: two products and (N - K)/N more."""
    N, H = hidden.shape
    V = weight.shape[0]
    w = Weight(weight, held.dtype)
    grads = Gradients(
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None,
        torch.empty_like(logits.bias) if need_bias and logits.bias is not None else None,
    )
    if N == 0 or (g_logps is None and g_entropy is None):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads

    scales = _RowScales.of(g_logps, g_entropy, logits, targets != logits.ignore_index, held.dtype, w.wide)
    K = held.shape[0]
    if scales.e is not None and logits.softcap is not None:
        K = 0  # the softcap's factor is already in u: p cannot be read back from it
    operand = hidden.to(held.dtype)
    scaled = (hidden.to(w.wide) * scales.row.unsqueeze(-1)).to(held.dtype) if need_weight else None
    wide_hidden = torch.empty(N, H, dtype=w.wide, device=hidden.device) if need_hidden else None

    if K == N and scales.e is None:
        if wide_hidden is not None:
            mm(held, w.weight, wide_hidden)
        _write_vocabulary(held, scaled, scales, grads.weight, grads.bias)
    else:
        direct = tiles.IN_PLACE and held.dtype == w.wide
        step = plan.slice_columns(N, V, held.dtype.itemsize + (0 if direct else w.wide.itemsize))
        buffer = torch.empty(N * step, dtype=held.dtype, device=hidden.device)
        scratch = buffer if direct else torch.empty((N - K) * step, dtype=w.wide, device=hidden.device)
        for start in range(0, V, step):
            columns = slice(start, min(start + step, V))
            width = columns.stop - start
            tile = buffer[: N * width].view(N, width)
            if scales.e is None:
                tile[:K] = held[:K, columns]
            elif K:
                assert stats.entropy is not None
                assert scales.c is not None
                tiles.held_bwd(
                    held[:K, columns],
                    targets[:K] - start,
                    stats.logps[:K],
                    stats.entropy[:K],
                    scales.c[:K],
                    scales.e[:K],
                    tile[:K],
                    ignore_index=logits.ignore_index - start,
                )
            if K < N:
                raw = tile[K:] if direct else scratch[: (N - K) * width].view(N - K, width)
                w.logits(operand[K:], columns, raw)
                rest = slice(K, N)
                tiles.tile_bwd(
                    raw,
                    None if logits.bias is None else logits.bias[columns],
                    targets[rest],
                    RowStats._make(None if value is None else value[rest] for value in stats),
                    None if scales.c is None else scales.c[rest],
                    None if scales.e is None else scales.e[rest],
                    tile[K:],
                    v_start=start,
                    logit_scale=logits.logit_scale,
                    softcap=logits.softcap,
                    temperature=_rows(logits.temperature, rest),
                    ignore_index=logits.ignore_index,
                )
            if wide_hidden is not None:
                mm(tile, w.weight[columns], wide_hidden, accumulate=start > 0)
            _write_vocabulary(
                tile,
                scaled,
                scales,
                None if grads.weight is None else grads.weight[columns],
                None if grads.bias is None else grads.bias[columns],
            )
    if wide_hidden is not None and grads.hidden is not None:
        factor = scales.row if scales.post is None else scales.row * scales.post
        grads.hidden.copy_(wide_hidden.mul_(factor.unsqueeze(-1)))
    return grads


def _write_vocabulary(
    tile: Tensor, scaled: Tensor | None, scales: _RowScales, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> None:
    """Writes the columns' grad_weight and grad_bias from their tile: ``post tile^T (row hidden)``."""
    wide = scales.row.dtype
    if grad_weight is not None and scaled is not None:
        if scales.post is None and grad_weight.dtype in (tile.dtype, wide):
            mm(tile.T, scaled, grad_weight)
        else:
            step = plan.slice_columns(scaled.shape[1], tile.shape[1], wide.itemsize)
            for start in range(0, tile.shape[1], step):
                part = grad_weight[start : start + step]
                product = torch.empty(part.shape, dtype=wide, device=part.device)
                mm(tile[:, start : start + step].T, scaled, product)
                part.copy_(product if scales.post is None else product.mul_(scales.post))
    if grad_bias is not None:
        step = plan.slice_columns(tile.shape[0], tile.shape[1], wide.itemsize)
        for start in range(0, tile.shape[1], step):
            product = torch.mv(tile[:, start : start + step].T.to(wide), scales.row)
            grad_bias[start : start + step] = product if scales.post is None else product.mul_(scales.post)


def _rows(temperature: Temperature, rows: slice) -> Temperature:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature
