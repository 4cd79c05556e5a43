"""The divergence of two heads, in blocks: two tiles of logits, folded into one number per row and one tile of gradient.

As in `forward`, the gradient ``u = dD / d logits`` does not depend on the loss: it is written once, in the operands'
dtype, into ``held [K, V]``. The loss contributes one scalar per row, ``r = (logit_scale / T) dL/dD``:

    grad_hidden = r * (u W)           grad_weight = u^T (r * hidden)          grad_bias = u^T r

Four products: the logits of the policy and of the reference, grad_hidden, grad_weight. Rows beyond K are recomputed in
the backward, both tiles, slice by slice of the vocabulary: 4 + 2 (N - K) / N. The reference gets no gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks
from prefkern.head.engine.gradients import Gradients, HeadGradients
from prefkern.head.engine.head import Head, RawProduct
from prefkern.head.engine.products import Weight
from prefkern.head.engine.scaling import RowScales, rate
from prefkern.kernels.interface import DivergenceResults, DivergenceStats, DivergenceTiles, TilePair

PEAK = 2.0**14
"""Factor of float16 rows: a row of ``u`` is held times ``PEAK / bound``, so that small differences of probabilities are
not lost."""


class TwoHeads(NamedTuple):
    """The policy's head and the reference's, of the same rows and vocabulary; which rows count; which divergence."""

    policy: Head
    reference: Head
    scored: Tensor | None  # [N] bool, None: all
    beta: float

    def rows(self, rows: slice) -> "TwoHeads":
        """Returns the heads of some rows."""
        scored = None if self.scored is None else self.scored[rows]
        return TwoHeads(self.policy.rows(rows), self.reference.rows(rows), scored, self.beta)

    def pair(self, tile: Tensor, ref_tile: Tensor, columns: slice) -> TilePair:
        """Returns tiles of all rows and some columns, as the tile functions take them."""
        forms = self.policy.logits.columns(columns), self.reference.logits.columns(columns)
        return TilePair(tile, ref_tile, self.scored, *forms)

    @property
    def peak(self) -> float | None:
        """Returns the factor, over its bound, of a row of ``u`` that is held in float16; None for other dtypes."""
        return PEAK if self.policy.dtype == torch.float16 else None


def forward(
    heads: TwoHeads,
    results: DivergenceResults,
    held: Tensor,  # [K, V] in the policy's dtype, K <= N
    tiles: DivergenceTiles,
) -> None:
    """Fills ``results`` and ``held``: two products."""
    N, V = heads.policy.hidden.shape[0], heads.policy.weight.shape[0]
    K, every = held.shape[0], slice(0, V)
    product, ref_product = RawProduct(heads.policy), RawProduct(heads.reference)
    wide = product.weight.wide
    # where u may stand in the place of the policy's logits, held rows need one tile of scratch, the others two
    direct = tiles.IN_PLACE and held.dtype == wide
    step = max(blocks.chunk_rows(V, 2 * wide.itemsize), 1)
    ref_scratch = torch.empty(min(step, N), V, dtype=wide, device=held.device)
    scratch = torch.empty_like(ref_scratch) if K < N or not direct else ref_scratch[:0]
    for at in blocks.row_chunks(N, K, step):
        count = at.stop - at.start
        u = held[at] if at.start < K else None
        tile, ref_tile = u if direct and u is not None else scratch[:count], ref_scratch[:count]
        product.write(at, every, tile)
        ref_product.write(at, every, ref_tile)
        pair = heads.rows(at).pair(tile, ref_tile, every)
        tiles.tile_fwd(pair, results.rows(at), u, beta=heads.beta, peak=heads.peak)


def backward(
    heads: TwoHeads,
    stats: DivergenceStats,
    held: Tensor,
    g: Tensor,  # [N], dL/dD
    grads: Gradients,
    tiles: DivergenceTiles,
) -> None:
    """Fills the gradients of the policy's head from the held rows and, beyond them, from recomputed ones."""
    N, V = heads.policy.hidden.shape[0], heads.policy.weight.shape[0]
    if N == 0:
        grads.zero_()
        return
    w = Weight(heads.policy.weight, heads.policy.dtype)
    scales = _scales(heads, g, stats.bound(heads.beta), w.wide)
    gradients = HeadGradients(heads.policy, w, grads, scales, tiles, held.dtype)
    whole = iter([(held, slice(0, V))])
    for tile, columns in whole if held.shape[0] == N else _gradient_tiles(heads, stats, held, tiles):
        gradients.add(tile, columns)
    gradients.finish()


def _gradient_tiles(
    heads: TwoHeads, stats: DivergenceStats, held: Tensor, tiles: DivergenceTiles
) -> Iterator[tuple[Tensor, slice]]:
    """Yields ``u`` of all rows in one slice of the vocabulary after the other: the first K are held, the others
    recomputed."""
    N, (K, V), dtype, device = heads.policy.hidden.shape[0], held.shape, held.dtype, held.device
    beyond = slice(K, N)
    recomputed, stats = heads.rows(beyond), stats.rows(beyond)
    product, ref_product = RawProduct(recomputed.policy), RawProduct(recomputed.reference)
    wide, all_rows = product.weight.wide, slice(0, N - K)
    direct = tiles.IN_PLACE and dtype == wide
    step = blocks.slice_columns(N, V, dtype.itemsize + (1 if direct else 2) * wide.itemsize)
    buffer = torch.empty(N * step, dtype=dtype, device=device)
    ref_scratch = torch.empty((N - K) * step, dtype=wide, device=device)
    scratch = torch.empty_like(ref_scratch) if not direct else ref_scratch[:0]
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        width = columns.stop - start
        tile = buffer[: N * width].view(N, width)
        tile[:K] = held[:, columns]
        raw = tile[K:] if direct else scratch[: (N - K) * width].view(N - K, width)
        ref_raw = ref_scratch[: (N - K) * width].view(N - K, width)
        product.write(all_rows, columns, raw)
        ref_product.write(all_rows, columns, ref_raw)
        pair = recomputed.pair(raw, ref_raw, columns)
        tiles.tile_bwd(pair, stats, None, tile[K:], beta=heads.beta, peak=heads.peak)
        yield tile, columns


def _scales(heads: TwoHeads, g: Tensor, bound: Tensor, wide: torch.dtype) -> RowScales:
    """Returns ``r`` of each row, over what its ``u`` was scaled by in float16."""
    row = g.to(wide) * rate(heads.policy.logits, wide)
    if heads.scored is not None:
        row = torch.where(heads.scored, row, 0.0)
    if heads.peak is None:
        return RowScales(None, None, row, None)
    row = row * bound / PEAK
    largest = torch.where(row.isfinite(), row, 0.0).abs().amax()
    return RowScales.from_gradients(None, None, row, heads.policy.dtype, largest)
