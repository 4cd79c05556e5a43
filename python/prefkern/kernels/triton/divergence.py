"""The divergence of two tiles of logits, folded per row: value, statistics, unscaled gradient. One program a row.

The tiles ``[C, V]`` are the raw products of two heads (float32), or logits of any floating dtype. `tile_fwd` reads them
twice, once for D and what the gradient needs of it, once for ``u``, which it writes to a buffer of its own; three times
for Jensen-Shannon, whose sums need both log-sums first. `tile_bwd` recomputes ``u`` times a row's factor from some
columns of two tiles and the statistics that the forward left. The mathematics is in `prefkern.kernels.triton.two_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, form_of, launch, matrix
from prefkern.kernels.triton.row import Row, temperature_of
from prefkern.kernels.triton.scale import scale_rows
from prefkern.kernels.triton.two_rows import PairStats, RowPair, pair_statistics, write_pair_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import DivergenceResults, DivergenceStats, TilePair

__all__ = ["IN_PLACE", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = False  # `held` must not alias a tile

# By the size of a logit: 16 bytes a lane and load. Two tiles are in flight, so that lanes are half those of `logprobs`.
FORWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(256, 4, 8, 1)}
BACKWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(256, 4, 8, 1)}


class Two(NamedTuple):
    """Two tiles as kernels take them: the policy's and the reference's, how each becomes logits, which rows count."""

    tile: Any  # Matrix [C, V]
    ref_tile: Any  # Matrix [C, V]
    form: Any
    ref_form: Any
    scored: Any  # [C] bool; None: all


class Kind(NamedTuple):
    """The divergence's beta (beside MODE), and the ``peak`` that a row's gradient is held times over its bound, or
    None."""

    beta: Any
    peak: Any


@triton.jit
def _is_scored(two, i, V):
    scored = V > 0
    if two.scored is not None:
        scored = tl.load(two.scored + i) != 0
    return scored


@triton.jit(do_not_specialize=["V"])
def _divergence_fwd_kernel(
    two,
    results,  # DivergenceResults of [C]; the entropy is None where not asked for
    held,  # Matrix [C, V] or None
    kind,
    V,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    own = Row(two.tile.ptr + i * two.tile.stride, two.form, temperature_of(two.form, i))
    ref = Row(two.ref_tile.ptr + i * two.ref_tile.stride, two.ref_form, temperature_of(two.ref_form, i))
    rows = RowPair(own, ref)
    scored = _is_scored(two, i, V)
    columns = tl.where(scored, V, 0)
    divergence, entropy, stats = pair_statistics(rows, results.entropy, kind.beta, columns, MODE, TILE)
    tl.store(results.divergence + i, tl.where(scored, divergence, 0.0))
    if results.entropy is not None:
        tl.store(results.entropy + i, tl.where(scored, entropy, 0.0))
    tl.store(results.stats.row_max + i, tl.where(scored, stats.row_max, 0.0))
    tl.store(results.stats.log_sum + i, tl.where(scored, stats.log_sum, 0.0))
    tl.store(results.stats.ref_row_max + i, tl.where(scored, stats.ref_row_max, 0.0))
    tl.store(results.stats.ref_log_sum + i, tl.where(scored, stats.ref_log_sum, 0.0))
    tl.store(results.stats.center + i, tl.where(scored, stats.center, 0.0))
    if held is not None:
        write_pair_gradient(rows, held.ptr + i * held.stride, scored, stats, 1.0, kind, V, TILE, MODE)


@triton.jit(do_not_specialize=["V"])
def _divergence_bwd_kernel(
    two,
    kept,  # DivergenceStats of [R]
    c_ptr,  # [R]; None: 1
    out,  # Matrix [R, V]
    kind,
    V,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    own = Row(two.tile.ptr + i * two.tile.stride, two.form, temperature_of(two.form, i))
    ref = Row(two.ref_tile.ptr + i * two.ref_tile.stride, two.ref_form, temperature_of(two.ref_form, i))
    rows = RowPair(own, ref)
    scored = _is_scored(two, i, V)
    stats = PairStats(
        tl.load(kept.row_max + i),
        tl.load(kept.log_sum + i),
        tl.load(kept.ref_row_max + i),
        tl.load(kept.ref_log_sum + i),
        tl.load(kept.center + i),
    )
    c = tl.load(c_ptr + i) if c_ptr is not None else 1.0
    write_pair_gradient(rows, out.ptr + i * out.stride, scored, stats, c, kind, V, TILE, MODE)


def mode_of(beta: float) -> int:
    """Returns 0 for KL(q || p), 1 for KL(p || q), 2 for Jensen-Shannon."""
    return {0.0: 0, 1.0: 1}.get(beta, 2)


def two_of(where: str, pair: TilePair) -> Two:
    """Returns two tiles as kernels take them, checked."""
    form, ref_form = form_of(pair.logits), form_of(pair.ref_logits)
    check_rows(where, tile=pair.tile, ref_tile=pair.ref_tile, scored=pair.scored, form=form)
    check_rows(where, ref_bias=ref_form.bias, ref_row_temperature=ref_form.row_temperature)
    return Two(matrix(pair.tile), matrix(pair.ref_tile), form, ref_form, pair.scored)


def tile_fwd(
    pair: TilePair,
    results: DivergenceResults,
    held: Tensor | None,  # [C, V], never aliasing a tile
    *,
    beta: float,
    peak: float | None,
) -> None:
    """Fills ``results`` from tiles of whole rows, and ``u`` into ``held``; the tiles are not changed."""
    where = "kernels.divergence.tile_fwd"
    two = two_of(where, pair)
    check_rows(where, results=results, held=held)
    arguments = (two, results, matrix(held), Kind(beta, peak), pair.tile.shape[1])
    launch(_divergence_fwd_kernel, pair.tile, FORWARD[pair.tile.element_size()], *arguments, MODE=mode_of(beta))


def tile_bwd(
    pair: TilePair,  # of some columns of the vocabulary
    stats: DivergenceStats,
    c: Tensor | None,  # [R], None means 1
    out: Tensor,  # [R, Vs], any row stride, not aliasing a tile
    *,
    beta: float,
    peak: float | None,
) -> None:
    """Recomputes ``c u`` from tiles of some columns."""
    where = "kernels.divergence.tile_bwd"
    two = two_of(where, pair)
    check_rows(where, stats=stats, c=c, out=out)
    arguments = (two, stats, c, matrix(out), Kind(beta, peak), pair.tile.shape[1])
    launch(_divergence_bwd_kernel, pair.tile, BACKWARD[pair.tile.element_size()], *arguments, MODE=mode_of(beta))
