"""The backward of the fold: the gradient tile of a loss, recomputed from some columns of the raw product, or from the
held unscaled gradient ``u``. One program a row. Both write

    c u + e p (log p + entropy) (1 - t)(1 + t)

and ``-logit_scale / T`` times that is the gradient, with respect to the raw product, of a loss with ``c = dL/d lp`` and
``e = dL/d entropy``. Without softcap ``p`` can be read back from ``u``: it is ``u``, except ``exp(lp)`` at the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, on_device, row_temperature
from prefkern.kernels.triton.math import LN2, LOG2E, expm1, log2
from prefkern.kernels.triton.row_gradient import write_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import RowStats
    from prefkern.types import Temperature


@triton.jit(do_not_specialize=["ignore_index", "v_start", "V"])
def _tile_bwd_kernel(
    tile_ptr,  # [R, V], V of the vocabulary's columns from v_start on
    bias_ptr,  # [V] or None
    targets_ptr,  # [R]
    temperature_ptr,  # [R] or None
    logps_ptr,  # [R], as all that follow
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,  # None where e is
    c_ptr,  # None: 1
    e_ptr,  # None: 0
    out_ptr,  # [R, V]
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    v_start,
    V,
    stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    target = tl.load(targets_ptr + row).to(tl.int64)
    write_gradient(
        tile_ptr + row * stride,
        bias_ptr,
        out_ptr + row * out_stride,
        target != ignore_index,
        target - v_start,
        tl.load(logps_ptr + row),
        tl.load(row_max_ptr + row),
        tl.load(log_sum_ptr + row),
        tl.load(entropy_ptr + row) if HAS_E else 0.0,
        tl.load(c_ptr + row) if HAS_C else 1.0,
        tl.load(e_ptr + row) if HAS_E else 0.0,
        logit_scale,
        softcap,
        temperature,
        V,
        HAS_BIAS,
        True,
        HAS_SOFTCAP,
        HAS_C,
        HAS_E,
        LANES,
        PER_LANE,
        STAGES,
    )


@triton.jit
def _held_gradient(u, cols, has_target, y, p_y, u_y, entropy, c, e):
    p = u
    if has_target:  # one tile of the row: the others do not pay for the comparison
        p = tl.where(cols == y, p_y, u)
        u = tl.where(cols == y, u_y, u)
    return c * u + p * (e * (log2(p) * LN2 + entropy))


@triton.jit(do_not_specialize=["ignore_index", "V"])
def _held_bwd_kernel(
    held_ptr,  # [K, V]
    targets_ptr,  # [K], relative to the first column
    logps_ptr,  # [K], as all that follow
    entropy_ptr,
    c_ptr,
    e_ptr,
    out_ptr,  # [K, V]
    ignore_index,
    V,
    stride,
    out_stride,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    scored = target != ignore_index
    y = tl.where(scored & (target >= 0) & (target < V), target, -1).to(tl.int32)
    logps = tl.load(logps_ptr + row)
    entropy = tl.where(scored, tl.load(entropy_ptr + row), 0.0)
    c = tl.where(scored, tl.load(c_ptr + row), 0.0)
    e = tl.where(scored, tl.load(e_ptr + row), 0.0)
    p_y = tl.exp2(logps * LOG2E)
    u_y = tl.where(logps == float("-inf"), 0.0, expm1(logps))
    row_ptr = held_ptr + row * stride
    out_ptr += row * out_stride
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    TILE: tl.constexpr = LANES * PER_LANE
    main = V // TILE * TILE
    for v in tl.range(0, main, TILE, num_stages=STAGES):
        cols = v + lane
        u = tl.load(row_ptr + cols, mask=scored, other=0.0).to(tl.float32)
        g = _held_gradient(u, cols, (y >= v) & (y < v + TILE), y, p_y, u_y, entropy, c, e)
        tl.store(out_ptr + cols, g.to(dtype))
    if main < V:
        cols = main + lane
        u = tl.load(row_ptr + cols, mask=(cols < V) & scored, other=0.0).to(tl.float32)
        g = _held_gradient(u, cols, y >= main, y, p_y, u_y, entropy, c, e)
        tl.store(out_ptr + cols, g.to(dtype), mask=cols < V)


TILE_BACKWARD = Tile(lanes=512, per_lane=4, num_warps=8, num_stages=1)
HELD_BACKWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}


def tile_bwd(
    tile: Tensor,  # [R, Vs] float32, columns v_start .. v_start + Vs
    bias: Tensor | None,  # [Vs] float32
    targets: Tensor,  # [R]
    stats: RowStats,
    c: Tensor | None,  # [R], None means 1
    e: Tensor | None,  # [R], None means 0
    out: Tensor,  # [R, Vs], any row stride
    *,
    v_start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Recomputes ``c u + e p (log p + entropy) (1 - t)(1 + t)`` from a tile of some columns of the vocabulary."""
    R, V = tile.shape
    if R == 0:
        return
    rows, scalar = row_temperature(temperature)
    check_rows("kernels.tile_bwd", tile=tile, bias=bias, targets=targets, temperature=rows, c=c, e=e, out=out)
    check_rows("kernels.tile_bwd", **stats._asdict())
    with on_device(tile):
        _tile_bwd_kernel[(R,)](
            tile,
            bias,
            targets,
            rows,
            stats.logps,
            stats.row_max,
            stats.log_sum,
            None if e is None else stats.entropy,
            c,
            e,
            out,
            logit_scale,
            1.0 if softcap is None else softcap,
            scalar,
            ignore_index,
            v_start,
            V,
            tile.stride(0),
            out.stride(0),
            HAS_BIAS=bias is not None,
            HAS_TEMPERATURE=rows is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_C=c is not None,
            HAS_E=e is not None,
            LANES=TILE_BACKWARD.lanes,
            PER_LANE=TILE_BACKWARD.per_lane,
            STAGES=TILE_BACKWARD.num_stages,
            num_warps=TILE_BACKWARD.num_warps,
            enable_fp_fusion=True,
        )


def held_bwd(
    held: Tensor,  # [K, Vs], any row stride
    targets: Tensor,  # [K], relative to the first column; one outside the columns has no entry here
    logps: Tensor,  # [K]
    entropy: Tensor,  # [K]
    c: Tensor,  # [K]
    e: Tensor,  # [K]
    out: Tensor,  # [K, Vs], any row stride, not aliasing held
    *,
    ignore_index: int,
) -> None:
    """The same sum from the held ``u`` without softcap: ``p = u`` except at the target, where ``p = exp(lp)``."""
    K, V = held.shape
    if K == 0:
        return
    check_rows("kernels.held_bwd", held=held, targets=targets, logps=logps, entropy=entropy, c=c, e=e, out=out)
    tile = HELD_BACKWARD[held.element_size()]
    with on_device(held):
        _held_bwd_kernel[(K,)](
            held,
            targets,
            logps,
            entropy,
            c,
            e,
            out,
            ignore_index,
            V,
            held.stride(0),
            out.stride(0),
            LANES=tile.lanes,
            PER_LANE=tile.per_lane,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
