"""The divergence of two heads, in blocks: two tiles of logits, folded into one number per row and one tile of gradient.

As in `prefkern.head`, the gradient ``u = dD / d logits`` does not depend on the loss: the forward writes it once, in
the operands' dtype, into ``held [K, V]``. The loss contributes one scalar per row, ``r = (logit_scale / T) dL/dD``:

    grad_hidden = r * (u W)           grad_weight = u^T (r * hidden)          grad_bias = u^T r

Four products: the logits of the policy and of the reference, grad_hidden, grad_weight. Rows beyond K are recomputed in
the backward, both tiles, slice by slice of the vocabulary: 4 + 2 (N - K) / N. The reference gets no gradient.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks
from prefkern.head.engine.backward import Gradients
from prefkern.head.engine.products import Weight
from prefkern.head.engine.scaling import RowScales, rate, scaled_rows, write_vocabulary
from prefkern.kernels.interface import DivergenceResults, DivergenceStats, DivergenceTiles, Logits, TilePair

PEAK = 2.0**14
"""float16: a row of ``u`` is held times ``PEAK / bound``, so that small differences of probabilities are not lost."""


class Side(NamedTuple):
    """One head: ``hidden [N, H]``, ``weight [V, H]``, how logits are made of their product, the operands' dtype."""

    hidden: Tensor
    weight: Tensor
    logits: Logits
    dtype: torch.dtype


def forward(
    policy: Side,
    reference: Side,
    scored: Tensor | None,  # [N] bool, None: all
    results: DivergenceResults,
    held: Tensor,  # [K, V] in the policy's dtype, K <= N
    tiles: DivergenceTiles,
    beta: float,
) -> None:
    """Fills ``results`` and ``held``: two products."""
    N, V = policy.hidden.shape[0], policy.weight.shape[0]
    K = held.shape[0]
    w, ref_w = Weight(policy.weight, policy.dtype), Weight(reference.weight, reference.dtype)
    operand, ref_operand = policy.hidden.to(policy.dtype), reference.hidden.to(reference.dtype)
    direct = tiles.IN_PLACE and held.dtype == w.wide
    step = max(blocks.chunk_rows(V, 2 * w.wide.itemsize), 1)
    ref_scratch = torch.empty(min(step, N), V, dtype=w.wide, device=held.device)
    scratch = torch.empty_like(ref_scratch) if K < N or not direct else ref_scratch[:0]
    # held rows first; a chunk is either wholly held or not at all
    for start, stop in pairwise([*range(0, K, step), *range(K, N, step), N]):
        rows = slice(start, stop)
        kept = held[rows] if start < K else None
        tile = kept if direct and kept is not None else scratch[: stop - start]
        ref_tile = ref_scratch[: stop - start]
        w.logits(operand[rows], slice(0, V), tile)
        ref_w.logits(ref_operand[rows], slice(0, V), ref_tile)
        some = None if scored is None else scored[rows]
        pair = TilePair(tile, ref_tile, some, policy.logits.rows(rows), reference.logits.rows(rows))
        tiles.tile_fwd(pair, results.rows(rows), kept, beta=beta, peak=_peak(policy.dtype))


def backward(
    held: Tensor,
    policy: Side,
    reference: Side,
    scored: Tensor | None,
    stats: DivergenceStats,
    g: Tensor,  # [N], dL/dD
    tiles: DivergenceTiles,
    beta: float,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients of the policy's head from the held rows and, beyond them, from recomputed ones."""
    hidden, weight, logits, dtype = policy
    N, H = hidden.shape
    V = weight.shape[0]
    K = held.shape[0]
    grads = Gradients(
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None,
        torch.empty_like(logits.bias) if need_bias and logits.bias is not None else None,
        None,
        None,
    )
    if N == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    w = Weight(weight, dtype)
    scales = _scales(g, logits, scored, stats.bound(beta), dtype, w.wide)
    scaled = scaled_rows(hidden, scales.row, dtype, tiles) if need_weight else None
    wide_hidden = grads.hidden
    if wide_hidden is not None and wide_hidden.dtype != w.wide:
        wide_hidden = torch.empty(N, H, dtype=w.wide, device=hidden.device)
    whole = iter([(slice(0, V), held)])
    for columns, tile in whole if K == N else _slices(held, policy, reference, w, scored, stats, tiles, beta):
        if wide_hidden is not None:
            w.hidden(tile, columns, wide_hidden, accumulate=columns.start > 0)
        write_vocabulary(tile, columns, scaled, scales, grads.weight, grads.bias, tiles)
    if wide_hidden is not None and grads.hidden is not None:
        tiles.scale_rows(wide_hidden, scales.row, grads.hidden, post=scales.post)
    return grads


def _slices(
    held: Tensor,
    policy: Side,
    reference: Side,
    w: Weight,
    scored: Tensor | None,
    stats: DivergenceStats,
    tiles: DivergenceTiles,
    beta: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, with ``u`` of all rows in each: the first K are held, the others recomputed."""
    N, V, K = policy.hidden.shape[0], policy.weight.shape[0], held.shape[0]
    rest = slice(K, N)
    ref_w = Weight(reference.weight, reference.dtype)
    operand, ref_operand = policy.hidden[rest].to(policy.dtype), reference.hidden[rest].to(reference.dtype)
    logits, ref_logits = policy.logits.rows(rest), reference.logits.rows(rest)
    some = None if scored is None else scored[rest]
    direct = tiles.IN_PLACE and held.dtype == w.wide
    step = blocks.slice_columns(N, V, held.dtype.itemsize + (1 if direct else 2) * w.wide.itemsize)
    buffer = torch.empty(N * step, dtype=held.dtype, device=held.device)
    ref_scratch = torch.empty((N - K) * step, dtype=w.wide, device=held.device)
    scratch = torch.empty_like(ref_scratch) if not direct else ref_scratch[:0]
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        width = columns.stop - start
        tile = buffer[: N * width].view(N, width)
        tile[:K] = held[:, columns]
        raw = tile[K:] if direct else scratch[: (N - K) * width].view(N - K, width)
        ref_raw = ref_scratch[: (N - K) * width].view(N - K, width)
        w.logits(operand, columns, raw)
        ref_w.logits(ref_operand, columns, ref_raw)
        pair = TilePair(raw, ref_raw, some, logits.columns(columns), ref_logits.columns(columns))
        tiles.tile_bwd(pair, stats.rows(rest), None, tile[K:], beta=beta, peak=_peak(policy.dtype))
        yield columns, tile


def _scales(
    g: Tensor, logits: Logits, scored: Tensor | None, bound: Tensor, dtype: torch.dtype, wide: torch.dtype
) -> RowScales:
    """``r`` of each row, over what its ``u`` was scaled by in float16."""
    row = g.to(wide) * rate(logits.logit_scale, logits.temperature, wide)
    if scored is not None:
        row = torch.where(scored, row, 0.0)
    if dtype != torch.float16:
        return RowScales(None, None, row, None)
    row = row * bound / PEAK
    return RowScales.of(None, None, row, dtype, torch.where(row.isfinite(), row, 0.0).abs().amax())


def _peak(dtype: torch.dtype) -> float | None:
    return PEAK if dtype == torch.float16 else None
