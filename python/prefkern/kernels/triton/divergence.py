"""The divergence of two tiles of logits, folded per row: value, statistics, unscaled gradient. One program a row.

The tiles ``[C, V]`` are the raw products of two heads (float32), or logits of any floating dtype. `tile_fwd` reads them
twice, once for D and what the gradient needs of it, once for ``u``, which it writes to a buffer of its own; three times
for Jensen-Shannon, whose sums need both log-sums first. The mathematics is in `_divergence`; the backward, which
recomputes ``u`` from some columns, in `divergence_bwd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.divergence_bwd import check_tiles, mode_of, tile_bwd
from prefkern.kernels.triton.launch import Tile, check_rows, on_device, row_temperature
from prefkern.kernels.triton.scale import scale_rows
from prefkern.kernels.triton.two_rows import pair_statistics
from prefkern.kernels.triton.two_rows_gradient import write_pair_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import DivergenceRows, LogitForm

__all__ = ["IN_PLACE", "scale_rows", "tile_bwd", "tile_fwd"]

IN_PLACE = False  # `held` must not alias the tile


@triton.jit(do_not_specialize=["V"])
def _divergence_fwd_kernel(
    tile_ptr,  # [C, V]
    bias_ptr,  # [V] or None
    temperature_ptr,  # [C] or None
    ref_tile_ptr,  # [C, V]
    ref_bias_ptr,  # [V] or None
    ref_temperature_ptr,  # [C] or None
    scored_ptr,  # [C] bool, or None: all
    divergence_ptr,  # [C], as all that follow
    entropy_ptr,  # None where not asked for
    row_max_ptr,
    log_sum_ptr,
    ref_row_max_ptr,
    ref_log_sum_ptr,
    center_ptr,
    held_ptr,  # [C, V] or None
    logit_scale,
    softcap,
    temperature,
    ref_logit_scale,
    ref_softcap,
    ref_temperature,
    beta,
    peak,
    V,
    stride,
    ref_stride,
    held_stride,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_TEMPERATURE: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_SCORED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_HELD: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * stride
    ref_row_ptr = ref_tile_ptr + row * ref_stride
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if HAS_REF_TEMPERATURE:
        ref_temperature = tl.load(ref_temperature_ptr + row).to(tl.float32)
    scored = V > 0
    if HAS_SCORED:
        scored = tl.load(scored_ptr + row) != 0
    divergence, center, entropy, row_max, log_sum, ref_row_max, ref_log_sum = pair_statistics(
        row_ptr,
        bias_ptr,
        ref_row_ptr,
        ref_bias_ptr,
        logit_scale,
        softcap,
        temperature,
        ref_logit_scale,
        ref_softcap,
        ref_temperature,
        beta,
        tl.where(scored, V, 0),
        MODE,
        HAS_BIAS,
        HAS_REF_BIAS,
        HAS_SOFTCAP,
        HAS_REF_SOFTCAP,
        HAS_ENTROPY,
        LANES,
        PER_LANE,
        STAGES,
    )
    tl.store(divergence_ptr + row, tl.where(scored, divergence, 0.0))
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, tl.where(scored, entropy, 0.0))
    tl.store(row_max_ptr + row, tl.where(scored, row_max, 0.0))
    tl.store(log_sum_ptr + row, tl.where(scored, log_sum, 0.0))
    tl.store(ref_row_max_ptr + row, tl.where(scored, ref_row_max, 0.0))
    tl.store(ref_log_sum_ptr + row, tl.where(scored, ref_log_sum, 0.0))
    tl.store(center_ptr + row, tl.where(scored, center, 0.0))
    if HAS_HELD:
        write_pair_gradient(
            row_ptr,
            bias_ptr,
            ref_row_ptr,
            ref_bias_ptr,
            held_ptr + row * held_stride,
            scored,
            row_max,
            log_sum,
            ref_row_max,
            ref_log_sum,
            center,
            1.0,
            peak,
            logit_scale,
            softcap,
            temperature,
            ref_logit_scale,
            ref_softcap,
            ref_temperature,
            beta,
            V,
            MODE,
            HAS_PEAK,
            HAS_BIAS,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
            HAS_REF_SOFTCAP,
            LANES,
            PER_LANE,
            STAGES,
        )


# By the size of a logit: 16 bytes a lane and load. Two tiles are in flight, so that lanes are half those of `fold`.
FORWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(256, 4, 8, 1)}


def tile_fwd(
    tile: Tensor,  # [C, V]
    ref_tile: Tensor,  # [C, V]
    scored: Tensor | None,  # [C] bool
    divergence: Tensor,  # [C]
    entropy: Tensor | None,  # [C]
    rows: DivergenceRows,
    held: Tensor | None,  # [C, V], never aliasing a tile
    *,
    form: LogitForm,
    ref_form: LogitForm,
    beta: float,
    peak: float | None,
) -> None:
    """Fills ``divergence``, ``entropy`` and ``rows`` from tiles of whole rows, and ``u`` into ``held``; the tiles are
    not changed."""
    C, V = tile.shape
    if C == 0:
        return
    temperature, scalar = row_temperature(form.temperature)
    ref_temperature, ref_scalar = row_temperature(ref_form.temperature)
    where = "kernels.divergence.tile_fwd"
    check_tiles(where, tile, ref_tile, scored, rows, form, ref_form)
    check_rows(where, divergence=divergence, entropy=entropy, held=held)
    block = FORWARD[tile.element_size()]
    with on_device(tile):
        _divergence_fwd_kernel[(C,)](
            tile,
            form.bias,
            temperature,
            ref_tile,
            ref_form.bias,
            ref_temperature,
            scored,
            divergence,
            entropy,
            *rows,
            held,
            form.logit_scale,
            1.0 if form.softcap is None else form.softcap,
            scalar,
            ref_form.logit_scale,
            1.0 if ref_form.softcap is None else ref_form.softcap,
            ref_scalar,
            beta,
            1.0 if peak is None else peak,
            V,
            tile.stride(0),
            ref_tile.stride(0),
            0 if held is None else held.stride(0),
            MODE=mode_of(beta),
            HAS_BIAS=form.bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=form.softcap is not None,
            HAS_REF_BIAS=ref_form.bias is not None,
            HAS_REF_TEMPERATURE=ref_temperature is not None,
            HAS_REF_SOFTCAP=ref_form.softcap is not None,
            HAS_SCORED=scored is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_HELD=held is not None,
            HAS_PEAK=peak is not None,
            LANES=block.lanes,
            PER_LANE=block.per_lane,
            STAGES=block.num_stages,
            num_warps=block.num_warps,
            enable_fp_fusion=True,
        )
