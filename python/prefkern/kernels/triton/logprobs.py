"""Token log-probabilities of rows of logits, forward and backward: of the float32 tile of a head's product, or of
logits in float16, bfloat16 or float32. One program a row.

A tile ``a [C, V]`` is the raw product ``h W^T``. With ``x = softcap(logit_scale (a + bias))``, temperature T, target y
and t the softcap's tanh, `tile_fwd` reads it twice: once for the statistics

    lp = (x_y - m) / T - log s     m = max_v x_v     s = sum_v exp((x_v - m) / T)

(and the optional ones), once for the unscaled gradient ``u = (p - 1[v = y]) (1 - t)(1 + t)``, which it writes to a
buffer of its own: narrowed in place, a fast warp would overwrite what a slow one has not read. `tile_bwd` recomputes
from some columns, `held_bwd` makes of the held ``u``,

    c u + e p (log p + entropy) (1 - t)(1 + t)

and ``-logit_scale / T`` times that is the gradient, with respect to the raw product, of a loss with ``c = dL/d lp`` and
``e = dL/d entropy``. Without softcap ``p`` can be read back from ``u``: it is ``u``, except ``exp(lp)`` at the target.
Ignored rows are 0 and are not read; rows whose target is outside the vocabulary are NaN. The passes over a row are
those of `prefkern.kernels.triton.row`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, form_of, launch, matrix
from prefkern.kernels.triton.math import LN2, LOG2E, expm1, log2
from prefkern.kernels.triton.row import Given, Row, temperature_of, write_gradient, write_statistics
from prefkern.kernels.triton.scale import scale_rows

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import Factors, Logits, RowStats

__all__ = ["IN_PLACE", "held_bwd", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = False  # `held` must not alias the tile

# Chosen by the compile report, by the size of a logit. A lane reads 16 bytes at once: with 8 float32 a lane two threads
# would share a lane and meet in every step; a held gradient of 16 bits is then stored 8 bytes a lane. Two loads are in
# flight a thread where registers allow. Prefetch (num_stages=3) copies through shared memory, which costs instructions
# and registers, and occupancy hides the latency without it.
FORWARD = {2: Tile(lanes=512, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}
SOFTCAP_FORWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}
BACKWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}


@triton.jit(do_not_specialize=["ignore_index", "V"])
def _tile_fwd_kernel(
    tile,  # Matrix [C, V]
    targets_ptr,  # [C]
    stats,  # RowStats of [C]; None where not asked for
    held,  # Matrix [C, V] or None
    form,
    ignore_index,
    V,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = Row(tile.ptr + i * tile.stride, form, temperature_of(form, i))
    y = tl.load(targets_ptr + i).to(tl.int64)
    logps, row_max, log_sum = write_statistics(row, i, y, stats, ignore_index, V, TILE)
    if held is not None:
        given = Given(y != ignore_index, y, logps, row_max, log_sum, None, None, None)
        write_gradient(row, held.ptr + i * held.stride, given, V, TILE)


def tile_fwd(
    tile: Tensor,  # [C, V]
    targets: Tensor,  # [C]
    stats: RowStats,
    held: Tensor | None,  # [C, V], never aliasing the tile
    logits: Logits,
    *,
    keep_tile: bool = True,  # it is never changed
) -> None:
    """Fills ``stats`` from a tile of whole rows and writes ``u`` into ``held``."""
    form = form_of(logits)
    check_rows("kernels.tile_fwd", tile=tile, targets=targets, stats=stats, held=held, form=form)
    cut = (FORWARD if logits.softcap is None else SOFTCAP_FORWARD)[tile.element_size()]
    arguments = (matrix(tile), targets, stats, matrix(held), form, logits.ignore_index, tile.shape[1])
    launch(_tile_fwd_kernel, tile, cut, *arguments)


@triton.jit(do_not_specialize=["ignore_index", "v_start", "V"])
def _tile_bwd_kernel(
    tile,  # Matrix [R, V], V of the vocabulary's columns from v_start on
    targets_ptr,  # [R]
    stats,  # RowStats of [R]
    factors,  # Factors of [R]
    out,  # Matrix [R, V]
    form,  # of these columns
    ignore_index,
    v_start,
    V,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + i).to(tl.int64)
    given = Given(
        y != ignore_index,
        y - v_start,
        tl.load(stats.logps + i),
        tl.load(stats.row_max + i),
        tl.load(stats.log_sum + i),
        tl.load(stats.entropy + i) if factors.e is not None else None,
        tl.load(factors.c + i) if factors.c is not None else None,
        tl.load(factors.e + i) if factors.e is not None else None,
    )
    row = Row(tile.ptr + i * tile.stride, form, temperature_of(form, i))
    write_gradient(row, out.ptr + i * out.stride, given, V, TILE)


def tile_bwd(
    tile: Tensor,  # [R, Vs], columns v_start .. v_start + Vs
    targets: Tensor,  # [R]
    stats: RowStats,
    factors: Factors,
    out: Tensor,  # [R, Vs], any row stride, not aliasing the tile
    logits: Logits,  # of these columns
    *,
    v_start: int = 0,
    keep_tile: bool = True,  # it is never changed
) -> None:
    """Recomputes ``c u + e p (log p + entropy) (1 - t)(1 + t)`` from a tile of some columns of the vocabulary."""
    form = form_of(logits)
    check_rows("kernels.tile_bwd", tile=tile, targets=targets, stats=stats, factors=factors, out=out, form=form)
    arguments = (matrix(tile), targets, stats, factors, matrix(out), form, logits.ignore_index, v_start, tile.shape[1])
    launch(_tile_bwd_kernel, tile, BACKWARD[tile.element_size()], *arguments)


class Held(NamedTuple):
    """Values from which the gradient of a held row is computed: the target's column and its p and u, and the loss's
    factors."""

    y: Any
    p_y: Any
    u_y: Any
    entropy: Any
    c: Any
    e: Any


@triton.jit
def _held_gradient(entry, u, cols, has_target):
    p = u
    if has_target:  # one tile of the row: the others do not pay for the comparison
        p = tl.where(cols == entry.y, entry.p_y, u)
        u = tl.where(cols == entry.y, entry.u_y, u)
    return entry.c * u + p * (entry.e * (log2(p) * LN2 + entry.entropy))


@triton.jit(do_not_specialize=["ignore_index", "v_start", "V"])
def _held_bwd_kernel(
    held,  # Matrix [K, V], V of the vocabulary's columns from v_start on
    targets_ptr,  # [K]
    stats,  # RowStats of [K]
    factors,  # Factors of [K], both given
    out,  # Matrix [K, V]
    ignore_index,
    v_start,
    V,
    TILE: tl.constexpr,
):
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    STEP: tl.constexpr = LANES * PER_LANE
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i).to(tl.int64)
    scored = target != ignore_index
    y = target - v_start
    y = tl.where(scored & (y >= 0) & (y < V), y, -1).to(tl.int32)
    logps = tl.load(stats.logps + i)
    entropy = tl.where(scored, tl.load(stats.entropy + i), 0.0)
    c = tl.where(scored, tl.load(factors.c + i), 0.0)
    e = tl.where(scored, tl.load(factors.e + i), 0.0)
    p_y = tl.exp2(logps * LOG2E)
    u_y = tl.where(logps == float("-inf"), 0.0, expm1(logps))
    entry = Held(y, p_y, u_y, entropy, c, e)
    row_ptr = held.ptr + i * held.stride
    out_ptr = out.ptr + i * out.stride
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    main = V // STEP * STEP
    for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
        cols = v + lane
        u = tl.load(row_ptr + cols, mask=scored, other=0.0).to(tl.float32)
        g = _held_gradient(entry, u, cols, (y >= v) & (y < v + STEP))
        tl.store(out_ptr + cols, g.to(dtype))
    if main < V:
        cols = main + lane
        u = tl.load(row_ptr + cols, mask=(cols < V) & scored, other=0.0).to(tl.float32)
        g = _held_gradient(entry, u, cols, y >= main)
        tl.store(out_ptr + cols, g.to(dtype), mask=cols < V)


def held_bwd(
    held: Tensor,  # [K, Vs], columns v_start .. v_start + Vs, any row stride
    targets: Tensor,  # [K]
    stats: RowStats,
    factors: Factors,  # both given
    out: Tensor,  # [K, Vs], any row stride, not aliasing held
    logits: Logits,
    *,
    v_start: int = 0,
) -> None:
    """Writes the same sum, of the held ``u`` without softcap: ``p = u``, except ``p = exp(lp)`` at the target."""
    check_rows("kernels.held_bwd", held=held, targets=targets, stats=stats, factors=factors, out=out)
    arguments = (matrix(held), targets, stats, factors, matrix(out), logits.ignore_index, v_start, held.shape[1])
    launch(_held_bwd_kernel, held, BACKWARD[held.element_size()], *arguments)
