"""The last pass over a row of two tiles: the unscaled gradient of a divergence, as `_divergence` defines it."""

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LN2, LOG2E
from prefkern.kernels.triton.two_rows import against_mixture, load_pair


@triton.jit
def _pair_gradient(
    x,
    y,
    slope,
    rate,
    log2_sum,
    ref_rate,
    ref_log2_sum,
    center,
    factor,
    beta,
    MODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    log2_p = x * (LOG2E * rate) - log2_sum
    log2_q = y * (LOG2E * ref_rate) - ref_log2_sum
    p = tl.exp2(log2_p)
    if MODE == 0:
        u = p - tl.exp2(log2_q)
    if MODE == 1:  # in natural units: with temperatures of 1 nothing is rounded but the differences
        u = p * ((x * rate - y * ref_rate) - center)
    if MODE == 2:
        policy, _ = against_mixture(log2_p, log2_q, beta)
        u = (1.0 - beta) * p * (policy * LN2 - center)
    u = tl.where(log2_p == float("-inf"), 0.0, u) * factor
    if HAS_SOFTCAP:
        u = u * slope
    return u


@triton.jit
def write_pair_gradient(
    row_ptr,
    bias_ptr,
    ref_row_ptr,
    ref_bias_ptr,
    out_ptr,
    scored,
    row_max,
    log_sum,
    ref_row_max,
    ref_log_sum,
    center,
    c,
    peak,
    logit_scale,
    softcap,
    temperature,
    ref_logit_scale,
    ref_softcap,
    ref_temperature,
    beta,
    V,
    MODE: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes ``c u`` of V columns. A row that is not scored is not read: all logits are 0 in it, and so is ``u``."""
    row_max = tl.where(scored, row_max, 0.0)
    ref_row_max = tl.where(scored, ref_row_max, 0.0)
    log_sum = tl.where(scored, log_sum, 0.0)
    ref_log_sum = tl.where(scored, ref_log_sum, 0.0)
    center = tl.where(scored, center, 0.0)
    factor = tl.where(scored, c, 0.0)
    if HAS_PEAK:
        factor = factor * peak
        if MODE == 1:
            factor = factor / (2.0 * center + 1.0)
    if MODE == 1:
        center += log_sum - ref_log_sum
    log2_sum = log_sum * LOG2E
    ref_log2_sum = ref_log_sum * LOG2E
    rate = 1.0 / tl.where(scored, temperature, 1.0)
    ref_rate = 1.0 / tl.where(scored, ref_temperature, 1.0)
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    TILE: tl.constexpr = LANES * PER_LANE
    main = V // TILE * TILE
    for v in tl.range(0, main, TILE, num_stages=STAGES):
        cols = v + lane
        x, y, slope = load_pair(
            row_ptr,
            bias_ptr,
            ref_row_ptr,
            ref_bias_ptr,
            cols,
            scored,
            row_max,
            ref_row_max,
            logit_scale,
            softcap,
            ref_logit_scale,
            ref_softcap,
            HAS_BIAS,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
            HAS_REF_SOFTCAP,
        )
        u = _pair_gradient(x, y, slope, rate, log2_sum, ref_rate, ref_log2_sum, center, factor, beta, MODE, HAS_SOFTCAP)
        tl.store(out_ptr + cols, u.to(dtype))
    if main < V:
        cols = main + lane
        x, y, slope = load_pair(
            row_ptr,
            bias_ptr,
            ref_row_ptr,
            ref_bias_ptr,
            cols,
            (cols < V) & scored,
            row_max,
            ref_row_max,
            logit_scale,
            softcap,
            ref_logit_scale,
            ref_softcap,
            HAS_BIAS,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
            HAS_REF_SOFTCAP,
        )
        u = _pair_gradient(x, y, slope, rate, log2_sum, ref_rate, ref_log2_sum, center, factor, beta, MODE, HAS_SOFTCAP)
        tl.store(out_ptr + cols, u.to(dtype), mask=cols < V)
