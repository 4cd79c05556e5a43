"""The backward of the divergence fold: the unscaled gradient ``u`` times a row's factor, recomputed from some columns
of two tiles and the row statistics that the forward left. One program a row. The mathematics is in `_divergence`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, on_device, row_temperature
from prefkern.kernels.triton.two_rows_gradient import write_pair_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import DivergenceRows, LogitForm


@triton.jit(do_not_specialize=["V"])
def _divergence_bwd_kernel(
    tile_ptr,  # [R, V]
    bias_ptr,  # [V] or None
    temperature_ptr,  # [R] or None
    ref_tile_ptr,  # [R, V]
    ref_bias_ptr,  # [V] or None
    ref_temperature_ptr,  # [R] or None
    scored_ptr,  # [R] bool, or None: all
    row_max_ptr,  # [R], as all that follow
    log_sum_ptr,
    ref_row_max_ptr,
    ref_log_sum_ptr,
    center_ptr,
    c_ptr,  # None: 1
    out_ptr,  # [R, V]
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
    out_stride,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_TEMPERATURE: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_SCORED: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if HAS_REF_TEMPERATURE:
        ref_temperature = tl.load(ref_temperature_ptr + row).to(tl.float32)
    scored = V > 0
    if HAS_SCORED:
        scored = tl.load(scored_ptr + row) != 0
    write_pair_gradient(
        tile_ptr + row * stride,
        bias_ptr,
        ref_tile_ptr + row * ref_stride,
        ref_bias_ptr,
        out_ptr + row * out_stride,
        scored,
        tl.load(row_max_ptr + row),
        tl.load(log_sum_ptr + row),
        tl.load(ref_row_max_ptr + row),
        tl.load(ref_log_sum_ptr + row),
        tl.load(center_ptr + row),
        tl.load(c_ptr + row) if HAS_C else 1.0,
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


# By the size of a logit, as in `divergence`.
BACKWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(256, 4, 8, 1)}


def mode_of(beta: float) -> int:
    """0: KL(q || p). 1: KL(p || q). 2: Jensen-Shannon."""
    return {0.0: 0, 1.0: 1}.get(beta, 2)


def check_tiles(
    where: str,
    tile: Tensor,
    ref_tile: Tensor,
    scored: Tensor | None,
    rows: DivergenceRows,
    form: LogitForm,
    ref_form: LogitForm,
) -> None:
    check_rows(where, tile=tile, ref_tile=ref_tile, scored=scored, bias=form.bias, ref_bias=ref_form.bias)
    temperatures = row_temperature(form.temperature)[0], row_temperature(ref_form.temperature)[0]
    check_rows(where, temperature=temperatures[0], ref_temperature=temperatures[1], **rows._asdict())


def tile_bwd(
    tile: Tensor,  # [R, Vs], some columns of the vocabulary
    ref_tile: Tensor,  # [R, Vs]
    scored: Tensor | None,  # [R] bool
    rows: DivergenceRows,
    c: Tensor | None,  # [R], None means 1
    out: Tensor,  # [R, Vs], any row stride, not aliasing a tile
    *,
    form: LogitForm,
    ref_form: LogitForm,
    beta: float,
    peak: float | None,
) -> None:
    """Recomputes ``c u`` from tiles of some columns."""
    R, V = tile.shape
    if R == 0:
        return
    temperature, scalar = row_temperature(form.temperature)
    ref_temperature, ref_scalar = row_temperature(ref_form.temperature)
    where = "kernels.divergence.tile_bwd"
    check_tiles(where, tile, ref_tile, scored, rows, form, ref_form)
    check_rows(where, c=c, out=out)
    block = BACKWARD[tile.element_size()]
    with on_device(tile):
        _divergence_bwd_kernel[(R,)](
            tile,
            form.bias,
            temperature,
            ref_tile,
            ref_form.bias,
            ref_temperature,
            scored,
            *rows,
            c,
            out,
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
            out.stride(0),
            MODE=mode_of(beta),
            HAS_BIAS=form.bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=form.softcap is not None,
            HAS_REF_BIAS=ref_form.bias is not None,
            HAS_REF_TEMPERATURE=ref_temperature is not None,
            HAS_REF_SOFTCAP=ref_form.softcap is not None,
            HAS_SCORED=scored is not None,
            HAS_C=c is not None,
            HAS_PEAK=peak is not None,
            LANES=block.lanes,
            PER_LANE=block.per_lane,
            STAGES=block.num_stages,
            num_warps=block.num_warps,
            enable_fp_fusion=True,
        )
