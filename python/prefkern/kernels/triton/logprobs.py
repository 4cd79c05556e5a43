"""The fold of a float32 logit tile: what stands between the head's products. One program a row.

A tile ``a [C, V]`` is the raw product ``h W^T``. With ``x = softcap(logit_scale (a + bias))``, temperature T, target y
and t the softcap's tanh, `tile_fwd` reads it twice: once for the statistics

    lp = (x_y - m) / T - log s     m = max_v x_v     s = sum_v exp((x_v - m) / T)

(and the optional ones), once for the unscaled gradient ``u = (p - 1[v = y]) (1 - t)(1 + t)``, which it writes to a
buffer of its own: narrowed in place, a fast warp would overwrite what a slow one has not read. The passes over a row
are those of `_statistics` and `_gradient`; the backward functions are in `fold_bwd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, on_device, row_temperature
from prefkern.kernels.triton.logprobs_bwd import held_bwd, tile_bwd
from prefkern.kernels.triton.row import write_statistics
from prefkern.kernels.triton.row_gradient import write_gradient
from prefkern.kernels.triton.scale import scale_rows

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import RowStats
    from prefkern.types import Temperature

__all__ = ["IN_PLACE", "held_bwd", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = False  # `held` must not alias the tile


@triton.jit(do_not_specialize=["ignore_index", "V"])
def _tile_fwd_kernel(
    tile_ptr,  # [C, V]
    bias_ptr,  # [V] or None
    targets_ptr,  # [C]
    temperature_ptr,  # [C] or None
    logps_ptr,  # [C], as all that follow; None where not asked for
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    log_sq_ptr,
    mean_ptr,
    top1_ptr,
    held_ptr,  # [C, V] or None
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    V,
    stride,
    held_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    HAS_HELD: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * stride
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    target = tl.load(targets_ptr + row).to(tl.int64)
    logps, row_max, log_sum = write_statistics(
        row,
        row_ptr,
        bias_ptr,
        target,
        logps_ptr,
        row_max_ptr,
        log_sum_ptr,
        entropy_ptr,
        log_sq_ptr,
        mean_ptr,
        top1_ptr,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        V,
        HAS_BIAS,
        True,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        HAS_SQ,
        HAS_MEAN,
        HAS_TOP1,
        LANES,
        PER_LANE,
        STAGES,
    )
    if HAS_HELD:
        write_gradient(
            row_ptr,
            bias_ptr,
            held_ptr + row * held_stride,
            target != ignore_index,
            target,
            logps,
            row_max,
            log_sum,
            0.0,
            1.0,
            0.0,
            logit_scale,
            softcap,
            temperature,
            V,
            HAS_BIAS,
            True,
            HAS_SOFTCAP,
            False,
            False,
            LANES,
            PER_LANE,
            STAGES,
        )


# As in `rowwise`: 16 bytes a lane and load, no prefetch. A held gradient of 16 bits is then stored 8 bytes a lane.
FORWARD = Tile(lanes=512, per_lane=4, num_warps=8, num_stages=1)


def tile_fwd(
    tile: Tensor,  # [C, V] float32
    bias: Tensor | None,  # [V] float32
    targets: Tensor,  # [C]
    stats: RowStats,
    held: Tensor | None,  # [C, V], never aliasing the tile
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Fills ``stats`` from a tile of whole rows and writes ``u`` into ``held``; the tile is not changed."""
    C, V = tile.shape
    if C == 0:
        return
    rows, scalar = row_temperature(temperature)
    check_rows("kernels.tile_fwd", tile=tile, bias=bias, targets=targets, temperature=rows, held=held)
    check_rows("kernels.tile_fwd", **stats._asdict())
    with on_device(tile):
        _tile_fwd_kernel[(C,)](
            tile,
            bias,
            targets,
            rows,
            *stats,
            held,
            logit_scale,
            1.0 if softcap is None else softcap,
            scalar,
            ignore_index,
            V,
            tile.stride(0),
            0 if held is None else held.stride(0),
            HAS_BIAS=bias is not None,
            HAS_TEMPERATURE=rows is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_ENTROPY=stats.entropy is not None,
            HAS_SQ=stats.log_sum_sq_probs is not None,
            HAS_MEAN=stats.mean_logit is not None,
            HAS_TOP1=stats.is_top1 is not None,
            HAS_HELD=held is not None,
            LANES=FORWARD.lanes,
            PER_LANE=FORWARD.per_lane,
            STAGES=FORWARD.num_stages,
            num_warps=FORWARD.num_warps,
            enable_fp_fusion=True,
        )
