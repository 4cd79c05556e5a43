"""One pass over a row of logits: the gradient of what its statistics became.

With ``p = exp((x - m) / T - log s)``, t the softcap's tanh, ``u = (p - 1[v = y]) (1 - t)(1 + t)`` and ``u_y`` by
``expm1(lp)``, it writes

    g = c u + e p (log p + entropy) (1 - t)(1 + t)
"""

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LN2, LOG2E, expm1, load_logits


@triton.jit
def _gradient(
    x,
    slope,
    cols,
    has_target,
    y,
    at_target,
    row_max,
    log2_sum,
    log2e_t,
    entropy,
    c,
    e,
    HAS_SOFTCAP: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
):
    log2_p = (x - row_max) * log2e_t - log2_sum
    p = tl.exp2(log2_p)
    g = p
    if has_target:  # one tile of the row: the others do not pay for the comparison
        g = tl.where(cols == y, at_target, p)
    if HAS_C:
        g = g * c
    if HAS_E:
        g += p * (e * (tl.maximum(log2_p, -1000.0) * LN2 + entropy))  # p is 0 from -150 down
    if HAS_SOFTCAP:
        g = g * slope
    return g


@triton.jit
def write_gradient(
    row_ptr,
    bias_ptr,
    out_ptr,
    scored,
    y,
    logps,
    row_max,
    log_sum,
    entropy,
    c,
    e,
    logit_scale,
    softcap,
    temperature,
    V,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes ``g`` of V columns; the target is column ``y`` (int64), or none. A row that is not scored is not read."""
    # below a maximum of +inf every probability is 0: in a row that is ignored, or that has no finite logit
    row_max = tl.where(scored & (row_max > float("-inf")), row_max, float("inf"))
    log2_sum = tl.where(scored, log_sum * LOG2E, 0.0)  # NaN where the target is outside the vocabulary
    at_target = tl.where(scored & (logps != float("-inf")), expm1(logps), 0.0)
    log2e_t = LOG2E / tl.where(scored, temperature, 1.0)
    entropy = tl.where(scored, entropy, 0.0)
    c = tl.where(scored, c, 0.0)
    e = tl.where(scored, e, 0.0)
    y = y.to(tl.int32)  # of a target beyond 32 bits the whole row is NaN
    dtype = out_ptr.dtype.element_ty
    TILE: tl.constexpr = LANES * PER_LANE
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    main = V // TILE * TILE
    for v in tl.range(0, main, TILE, num_stages=STAGES):
        cols = v + lane
        x, slope = load_logits(row_ptr, bias_ptr, cols, scored, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        has_target = (y >= v) & (y < v + TILE)
        g = _gradient(
            x,
            slope,
            cols,
            has_target,
            y,
            at_target,
            row_max,
            log2_sum,
            log2e_t,
            entropy,
            c,
            e,
            HAS_SOFTCAP,
            HAS_C,
            HAS_E,
        )
        tl.store(out_ptr + cols, g.to(dtype))
    if main < V:
        cols = main + lane
        mask = (cols < V) & scored
        x, slope = load_logits(row_ptr, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        g = _gradient(
            x,
            slope,
            cols,
            y >= main,
            y,
            at_target,
            row_max,
            log2_sum,
            log2e_t,
            entropy,
            c,
            e,
            HAS_SOFTCAP,
            HAS_C,
            HAS_E,
        )
        tl.store(out_ptr + cols, g.to(dtype), mask=cols < V)
