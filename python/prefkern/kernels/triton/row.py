"""One pass over a row of logits: its statistics.

With ``x`` the logits before the temperature T, one pass gives

    m = max_v x_v     s = sum_v w_v     e = sum_v w_v (x_v - m)     q = sum_v w_v^2     w_v = exp((x_v - m) / T)

    lp = (x_y - m) / T - log s     entropy = log s - e / (s T)     log sum p^2 = log q - 2 log s

The maximum is subtracted before anything is scaled, so that an offset common to all logits costs nothing, and nothing
cancels in the entropy. Each lane keeps its own (m, s, e, q) for the few contiguous elements that it reads of a tile
``[LANES, PER_LANE]``; the lanes meet once, at the end of the row. The running maximum starts at the lowest float, not
at -inf: then ``x - m`` is never NaN, a logit of -inf has ``w = 0``, and ``s = 0`` says that all were -inf. The first
argmax is free: a lane remembers where it last raised its maximum.
"""

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LOG2E, LOWEST, load_logits


@triton.jit
def _add(
    x,
    group,
    log2e_t,
    m,
    s,
    e,
    q,
    argmax,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ: tl.constexpr,
    HAS_TOP1: tl.constexpr,
):
    """Adds a tile ``x [LANES, PER_LANE]``, whose lanes begin at the columns ``group``, to the lanes' sums."""
    best = tl.max(x, 1)
    if HAS_TOP1:
        argmax = tl.where(best > m, group, argmax)
    new = tl.maximum(m, best)
    step = m - new
    decay = tl.exp2(step * log2e_t)
    gap = x - new[:, None]
    w = tl.exp2(gap * log2e_t)
    if HAS_ENTROPY:
        # a sum whose weight has vanished is dropped, since it may be infinite; so is the gap of a logit of -inf
        e = tl.where(decay > 0.0, (e + step * s) * decay, 0.0) + tl.sum(w * tl.maximum(gap, LOWEST), 1)
    if HAS_SQ:
        q = q * decay * decay + tl.sum(w * w, 1)
    s = s * decay + tl.sum(w, 1)
    return new, s, e, q, argmax


@triton.jit
def _statistics(
    row_ptr,
    bias_ptr,
    y,
    logit_scale,
    softcap,
    temperature,
    V,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    log2e_t = LOG2E / temperature
    x_y, _ = load_logits(row_ptr, bias_ptr, y, y < V, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
    groups = tl.arange(0, LANES) * PER_LANE
    lane = tl.arange(0, PER_LANE)
    m = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    e = tl.zeros((LANES,), tl.float32)
    q = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    argmax = groups
    TILE: tl.constexpr = LANES * PER_LANE
    main = V // TILE * TILE
    for v in tl.range(0, main, TILE, num_stages=STAGES):
        cols = v + groups[:, None] + lane[None, :]
        x, _slope = load_logits(row_ptr, bias_ptr, cols, None, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        if HAS_MEAN:
            total += tl.sum(x, 1)
        m, s, e, q, argmax = _add(x, v + groups, log2e_t, m, s, e, q, argmax, HAS_ENTROPY, HAS_SQ, HAS_TOP1)
    if main < V:
        cols = main + groups[:, None] + lane[None, :]
        x, _slope = load_logits(
            row_ptr, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
        if HAS_MEAN:
            total += tl.sum(x, 1)  # beyond the row x is 0
        x = tl.where(cols < V, x, float("-inf"))
        m, s, e, q, argmax = _add(x, main + groups, log2e_t, m, s, e, q, argmax, HAS_ENTROPY, HAS_SQ, HAS_TOP1)

    row_max = tl.max(m, 0)
    step = m - row_max
    decay = tl.exp2(step * log2e_t)
    mass = tl.sum(s * decay, 0)
    dead = mass == 0.0
    mass = tl.where(dead, 1.0, mass)
    log_sum = tl.log(mass)
    entropy = log_sum
    if HAS_ENTROPY:
        entropy -= tl.sum(tl.where(decay > 0.0, (e + step * s) * decay, 0.0), 0) / mass / temperature
    log_sq = log_sum
    if HAS_SQ:
        log_sq = tl.log(tl.sum(q * decay * decay, 0)) - 2.0 * log_sum
    mean = log_sum
    if HAS_MEAN:
        mean = tl.sum(total, 0) / V / temperature
    is_top1 = dead
    if HAS_TOP1:
        # the first group of columns that holds the maximum, and in it the first such column
        cols = tl.min(tl.where(m == row_max, argmax, V), 0) + lane
        x, _slope = load_logits(
            row_ptr, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
        x = tl.where(cols < V, x, float("-inf"))
        is_top1 = tl.min(tl.where(x == tl.max(x, 0), cols, V), 0) == y
    # a fused multiply-add may leave the largest weight a rounding below 1, and the sum with it
    logps = tl.minimum((x_y - row_max) / temperature - log_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)
    row_max = tl.where(dead, float("-inf"), row_max)
    return logps, row_max, log_sum, entropy, log_sq, mean, is_top1


@triton.jit
def _final(value, scored, outside):
    return tl.where(scored, tl.where(outside, float("nan"), value), 0.0)


@triton.jit
def write_statistics(
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
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores a row's statistics: 0 where ignored (the row is not read), NaN where the target is outside [0, V)."""
    scored = target != ignore_index
    outside = (target < 0) | (target >= V)
    y = tl.where(scored & (target >= 0) & (target < V), target, 0).to(tl.int32)
    logps, row_max, log_sum, entropy, log_sq, mean, top1 = _statistics(
        row_ptr,
        bias_ptr,
        y,
        logit_scale,
        softcap,
        temperature,
        tl.where(scored, V, 0),
        HAS_BIAS,
        HAS_SCALE,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        HAS_SQ,
        HAS_MEAN,
        HAS_TOP1,
        LANES,
        PER_LANE,
        STAGES,
    )
    logps = _final(logps, scored, outside)
    row_max = _final(row_max, scored, outside)
    log_sum = _final(log_sum, scored, outside)
    tl.store(logps_ptr + row, logps)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, _final(entropy, scored, outside))
    if HAS_SQ:
        tl.store(log_sq_ptr + row, _final(log_sq, scored, outside))
    if HAS_MEAN:
        tl.store(mean_ptr + row, _final(mean, scored, outside))
    if HAS_TOP1:
        tl.store(top1_ptr + row, top1 & scored & (target >= 0) & (target < V))
    return logps, row_max, log_sum
