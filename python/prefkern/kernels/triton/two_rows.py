"""What the divergence kernels do to a row of two tiles of logits: statistics of both, then the gradient.

p is the policy's distribution, q the reference's, ``beta`` and MODE say the divergence D: 0 is KL(q || p), 1 is
KL(p || q), 2 the Jensen-Shannon ``beta KL(q || m) + (1 - beta) KL(p || m)``, m = (1 - beta) p + beta q. With
``z_v = (x_v - max x) log2(e) / T`` of each, f the distribution in front (q in mode 0) and b the other, one pass gives

    s = sum_v 2^z_v     g = sum_v 2^f_v (f_v - b_v)     D = ln 2 g / s_f - ln s_f + ln s_b

in lanes of their own that meet at the end of the row, as in `_statistics`. The gap ``f_v - b_v`` is between numbers
relative to the maxima, so that offsets cost nothing. A logit of -inf is cut at the lowest float where it is subtracted:
a term without weight is 0 then, and one with weight and nothing behind exceeds UNBOUNDED, which says that D = inf.

Mode 2 needs both log-sums first: a second pass sums ``p log(p / m)`` and ``q log(q / m)``, which are made of
``d = log q - log p`` and ``2^-|d|``. The last pass writes

    u = p - q     p (log p - log q - D)     (1 - beta) p (log(p / m) - sum_v p_v log(p_v / m_v))

times the softcap's derivative, a row's factor, and, in float16, ``peak / bound``: bound is 1, or 1 + 2 D in mode 1.
"""

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LN2, LOG2E, LOWEST, load_logits, log2

UNBOUNDED = tl.constexpr(1.0e38)
FAR = tl.constexpr(-1.0e30)  # the logarithm of a probability of 0, where two are subtracted


@triton.jit
def _add_logits(x, log2e_t, m, s):
    """Adds a tile to the lanes' maximum and sum; also the step of the maximum and ``z``, both in powers of two."""
    new = tl.maximum(m, tl.max(x, 1))
    step = (m - new) * log2e_t
    z = (x - new[:, None]) * log2e_t
    w = tl.exp2(z)
    decay = tl.exp2(step)
    return new, s * decay + tl.sum(w, 1), decay, step, z, w


@triton.jit
def _shifted(total, step, s, decay):
    """A lane's ``sum 2^z y`` after ``y`` moved by ``step`` and z by the maximum's; what has no weight left is dropped,
    since it may be infinite."""
    return tl.where(decay > 0.0, (total + step * s) * decay, 0.0)


@triton.jit
def _add_pair(
    x,
    y,
    log2e_t,
    log2e_r,
    m,
    s,
    n,
    r,
    g,
    top,
    e,
    MODE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Adds tiles of the policy's logits (maxima m, sums s) and of the reference's (n, r)."""
    m, new_s, decay, step, z, w = _add_logits(x, log2e_t, m, s)
    n, new_r, ref_decay, ref_step, ref_z, ref_w = _add_logits(y, log2e_r, n, r)
    if MODE == 0:
        gap = tl.maximum(ref_z - tl.maximum(z, LOWEST), LOWEST)
        g = _shifted(g, ref_step - tl.maximum(step, LOWEST), r, ref_decay) + tl.sum(ref_w * gap, 1)
        top = tl.maximum(top, tl.max(gap, 1))
    if MODE == 1:
        gap = tl.maximum(z - tl.maximum(ref_z, LOWEST), LOWEST)
        g = _shifted(g, step - tl.maximum(ref_step, LOWEST), s, decay) + tl.sum(w * gap, 1)
        top = tl.maximum(top, tl.max(gap, 1))
    if HAS_ENTROPY:
        e = _shifted(e, step, s, decay) + tl.sum(w * tl.maximum(z, LOWEST), 1)
    return m, new_s, n, new_r, g, top, e


@triton.jit
def load_pair(
    row_ptr,
    bias_ptr,
    ref_row_ptr,
    ref_bias_ptr,
    cols,
    mask,  # None: all
    row_max,
    ref_row_max,
    logit_scale,
    softcap,
    ref_logit_scale,
    ref_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
):
    """The logits of some columns less the rows' maxima, of both heads, and the policy's softcap's derivative."""
    x, slope = load_logits(row_ptr, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS, True, HAS_SOFTCAP)
    y, _ = load_logits(
        ref_row_ptr, ref_bias_ptr, cols, mask, ref_logit_scale, ref_softcap, HAS_REF_BIAS, True, HAS_REF_SOFTCAP
    )
    return x - row_max, y - ref_row_max, slope


@triton.jit
def against_mixture(log2_p, log2_q, beta):
    """``log2(p / m)`` and ``log2(q / m)``; finite also where p or q is 0."""
    d = tl.maximum(log2_q, FAR) - tl.maximum(log2_p, FAR)
    t = tl.exp2(-tl.abs(d))
    larger = log2(tl.where(d > 0.0, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t))
    return -tl.maximum(d, 0.0) - larger, tl.minimum(d, 0.0) - larger


@triton.jit
def pair_statistics(
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
    V,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """D, its center, the policy's entropy, and maximum and log-sum of both rows."""
    log2e_t = LOG2E / temperature
    log2e_r = LOG2E / ref_temperature
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    m = tl.full((LANES,), LOWEST, tl.float32)
    n = tl.full((LANES,), LOWEST, tl.float32)
    top = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    r = tl.zeros((LANES,), tl.float32)
    g = tl.zeros((LANES,), tl.float32)
    e = tl.zeros((LANES,), tl.float32)
    TILE: tl.constexpr = LANES * PER_LANE
    main = V // TILE * TILE
    for v in tl.range(0, main, TILE, num_stages=STAGES):
        cols = v + lane
        x, _ = load_logits(row_ptr, bias_ptr, cols, None, logit_scale, softcap, HAS_BIAS, True, HAS_SOFTCAP)
        y, _ = load_logits(
            ref_row_ptr, ref_bias_ptr, cols, None, ref_logit_scale, ref_softcap, HAS_REF_BIAS, True, HAS_REF_SOFTCAP
        )
        m, s, n, r, g, top, e = _add_pair(x, y, log2e_t, log2e_r, m, s, n, r, g, top, e, MODE, HAS_ENTROPY)
    if main < V:
        cols = main + lane
        mask = cols < V
        x, _ = load_logits(row_ptr, bias_ptr, cols, mask, logit_scale, softcap, HAS_BIAS, True, HAS_SOFTCAP)
        y, _ = load_logits(
            ref_row_ptr, ref_bias_ptr, cols, mask, ref_logit_scale, ref_softcap, HAS_REF_BIAS, True, HAS_REF_SOFTCAP
        )
        x = tl.where(mask, x, float("-inf"))
        y = tl.where(mask, y, float("-inf"))
        m, s, n, r, g, top, e = _add_pair(x, y, log2e_t, log2e_r, m, s, n, r, g, top, e, MODE, HAS_ENTROPY)

    row_max = tl.max(m, 0)
    ref_row_max = tl.max(n, 0)
    step = (m - row_max) * log2e_t
    ref_step = (n - ref_row_max) * log2e_r
    decay = tl.exp2(step)
    ref_decay = tl.exp2(ref_step)
    mass = tl.sum(s * decay, 0)
    ref_mass = tl.sum(r * ref_decay, 0)
    # without any finite logit there is no distribution
    log_sum = tl.log(tl.where(mass > 0.0, mass, float("nan")))
    ref_log_sum = tl.log(tl.where(ref_mass > 0.0, ref_mass, float("nan")))
    entropy = log_sum
    if HAS_ENTROPY:
        entropy -= LN2 * tl.sum(_shifted(e, step, s, decay), 0) / mass
    if MODE == 0:
        gap = tl.sum(_shifted(g, ref_step - tl.maximum(step, LOWEST), r, ref_decay), 0)
        divergence = LN2 * gap / ref_mass - ref_log_sum + log_sum
    if MODE == 1:
        gap = tl.sum(_shifted(g, step - tl.maximum(ref_step, LOWEST), s, decay), 0)
        divergence = LN2 * gap / mass - log_sum + ref_log_sum
    if MODE == 2:
        c = tl.zeros((LANES,), tl.float32)
        d = tl.zeros((LANES,), tl.float32)
        log2_sum = log_sum * LOG2E
        ref_log2_sum = ref_log_sum * LOG2E
        for v in tl.range(0, main, TILE, num_stages=STAGES):
            x, y, _ = load_pair(
                row_ptr,
                bias_ptr,
                ref_row_ptr,
                ref_bias_ptr,
                v + lane,
                None,
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
            log2_p = x * log2e_t - log2_sum
            log2_q = y * log2e_r - ref_log2_sum
            policy, reference = against_mixture(log2_p, log2_q, beta)
            c += tl.sum(tl.exp2(log2_p) * policy, 1)
            d += tl.sum(tl.exp2(log2_q) * reference, 1)
        if main < V:
            mask = main + lane < V
            x, y, _ = load_pair(
                row_ptr,
                bias_ptr,
                ref_row_ptr,
                ref_bias_ptr,
                main + lane,
                mask,
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
            log2_p = x * log2e_t - log2_sum
            log2_q = y * log2e_r - ref_log2_sum
            policy, reference = against_mixture(log2_p, log2_q, beta)
            c += tl.sum(tl.where(mask, tl.exp2(log2_p) * policy, 0.0), 1)
            d += tl.sum(tl.where(mask, tl.exp2(log2_q) * reference, 0.0), 1)
        center = LN2 * tl.sum(c, 0)
        divergence = (1.0 - beta) * center + beta * LN2 * tl.sum(d, 0)
    else:
        finite = tl.max(top, 0) < UNBOUNDED
        center = divergence
        if MODE == 1:  # an infinite D has no derivative
            center = tl.where(finite, divergence, float("nan"))
        divergence = tl.where(finite, divergence, float("inf"))
    alive = (mass > 0.0) & (ref_mass > 0.0)  # nor is NaN
    divergence = tl.where(alive, tl.maximum(divergence, 0.0, propagate_nan=tl.PropagateNan.ALL), float("nan"))
    center = tl.where(alive, center, float("nan"))
    return divergence, center, entropy, row_max, log_sum, ref_row_max, ref_log_sum
