"""The passes over a row of two tiles of logits: statistics of both and their divergence, then the gradient.

p is the policy's distribution, q the reference's, ``beta`` and MODE say the divergence D: 0 is KL(q || p), 1 is
KL(p || q), 2 the Jensen-Shannon ``beta KL(q || m) + (1 - beta) KL(p || m)``, m = (1 - beta) p + beta q. With
``z_v = (x_v - max x) log2(e) / T`` of each, f the distribution in front (q in mode 0) and b the other, one pass gives

    s = sum_v 2^z_v     g = sum_v 2^f_v (f_v - b_v)     D = ln 2 g / s_f - ln s_f + ln s_b

in lanes of their own that meet at the end of the row, as in `prefkern.kernels.triton.row`. The gap ``f_v - b_v`` is
between numbers relative to the maxima, so that offsets cost nothing. A logit of -inf is cut at the lowest float where
it is subtracted: a term without weight is 0 then, and one with weight and nothing behind exceeds UNBOUNDED, which says
that D = inf.

Mode 2 needs both log-sums first: a second pass sums ``p log(p / m)`` and ``q log(q / m)``, which are made of
``d = log q - log p`` and ``2^-|d|``. The last pass writes

    u = p - q     p (log p - log q - D)     (1 - beta) p (log(p / m) - sum_v p_v log(p_v / m_v))

times the softcap's derivative, a row's factor, and, in float16, ``peak / bound``: bound is 1, or 1 + 2 D in mode 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LN2, LOG2E, LOWEST, log2
from prefkern.kernels.triton.row import load_logits

UNBOUNDED = tl.constexpr(1.0e38)
FAR = tl.constexpr(-1.0e30)  # the logarithm of a probability of 0, where two are subtracted


class RowPair(NamedTuple):
    """One row of the policy's tile, and of the reference's: `prefkern.kernels.triton.row.Row`."""

    own: Any
    ref: Any


class PairSums(NamedTuple):
    """The sums of each lane: maximum and sum of the policy's logits (m, s) and of the reference's (n, r), the gap
    between them and its largest (g, top), the entropy's (e)."""

    m: Any
    s: Any
    n: Any
    r: Any
    g: Any
    top: Any
    e: Any


class PairStats(NamedTuple):
    """The statistics of a row of two tiles, as `prefkern.kernels.interface.DivergenceStats`."""

    row_max: Any
    log_sum: Any
    ref_row_max: Any
    ref_log_sum: Any
    center: Any


class PairEntry(NamedTuple):
    """Values from which every tile of a row computes its gradient; ``rate = 1 / T``."""

    rate: Any
    log2_sum: Any
    ref_rate: Any
    ref_log2_sum: Any
    center: Any
    factor: Any


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
    """Returns a lane's ``sum 2^z y`` after ``y`` moved by ``step`` and z by the maximum's; what has no weight left is
    dropped, since it may be infinite."""
    return tl.where(decay > 0.0, (total + step * s) * decay, 0.0)


@triton.jit
def _add_pair(sums, x, y, log2e_t, log2e_r, entropy, MODE: tl.constexpr):
    """Adds tiles of the policy's logits and of the reference's; the entropy's sum if there is a place for it."""
    m, s, decay, step, z, w = _add_logits(x, log2e_t, sums.m, sums.s)
    n, r, ref_decay, ref_step, ref_z, ref_w = _add_logits(y, log2e_r, sums.n, sums.r)
    g = sums.g
    top = sums.top
    if MODE == 0:
        gap = tl.maximum(ref_z - tl.maximum(z, LOWEST), LOWEST)
        g = _shifted(g, ref_step - tl.maximum(step, LOWEST), sums.r, ref_decay) + tl.sum(ref_w * gap, 1)
        top = tl.maximum(top, tl.max(gap, 1))
    if MODE == 1:
        gap = tl.maximum(z - tl.maximum(ref_z, LOWEST), LOWEST)
        g = _shifted(g, step - tl.maximum(ref_step, LOWEST), sums.s, decay) + tl.sum(w * gap, 1)
        top = tl.maximum(top, tl.max(gap, 1))
    e = sums.e
    if entropy is not None:
        e = _shifted(e, step, sums.s, decay) + tl.sum(w * tl.maximum(z, LOWEST), 1)
    return PairSums(m, s, n, r, g, top, e)


@triton.jit
def _load_pair(pair, cols, mask, row_max, ref_row_max):
    """Returns both heads' logits of some columns less the rows' maxima, and the policy's softcap's derivative."""
    x, slope = load_logits(pair.own, cols, mask)
    y, _ = load_logits(pair.ref, cols, mask)
    return x - row_max, y - ref_row_max, slope


@triton.jit
def _against_mixture(log2_p, log2_q, beta):
    """Returns ``log2(p / m)`` and ``log2(q / m)``; finite also where p or q is 0."""
    d = tl.maximum(log2_q, FAR) - tl.maximum(log2_p, FAR)
    t = tl.exp2(-tl.abs(d))
    larger = log2(tl.where(d > 0.0, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t))
    return -tl.maximum(d, 0.0) - larger, tl.minimum(d, 0.0) - larger


@triton.jit
def pair_statistics(pair, entropy_ptr, beta, V, MODE: tl.constexpr, TILE: tl.constexpr):
    """Returns D, the policy's entropy (if there is a place for it), and the statistics of both rows."""
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    STEP: tl.constexpr = LANES * PER_LANE
    log2e_t = LOG2E / pair.own.temperature
    log2e_r = LOG2E / pair.ref.temperature
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    low = tl.full((LANES,), LOWEST, tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    sums = PairSums(low, zero, low, zero, zero, low, zero)
    main = V // STEP * STEP
    for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
        x, _ = load_logits(pair.own, v + lane, None)
        y, _ = load_logits(pair.ref, v + lane, None)
        sums = _add_pair(sums, x, y, log2e_t, log2e_r, entropy_ptr, MODE)
    if main < V:
        mask = main + lane < V
        x, _ = load_logits(pair.own, main + lane, mask)
        y, _ = load_logits(pair.ref, main + lane, mask)
        x = tl.where(mask, x, float("-inf"))
        y = tl.where(mask, y, float("-inf"))
        sums = _add_pair(sums, x, y, log2e_t, log2e_r, entropy_ptr, MODE)

    # the lanes meet
    row_max = tl.max(sums.m, 0)
    ref_row_max = tl.max(sums.n, 0)
    step = (sums.m - row_max) * log2e_t
    ref_step = (sums.n - ref_row_max) * log2e_r
    decay = tl.exp2(step)
    ref_decay = tl.exp2(ref_step)
    mass = tl.sum(sums.s * decay, 0)
    ref_mass = tl.sum(sums.r * ref_decay, 0)
    # without any finite logit there is no distribution
    log_sum = tl.log(tl.where(mass > 0.0, mass, float("nan")))
    ref_log_sum = tl.log(tl.where(ref_mass > 0.0, ref_mass, float("nan")))
    entropy = log_sum
    if entropy_ptr is not None:
        entropy -= LN2 * tl.sum(_shifted(sums.e, step, sums.s, decay), 0) / mass
    if MODE == 0:
        gap = tl.sum(_shifted(sums.g, ref_step - tl.maximum(step, LOWEST), sums.r, ref_decay), 0)
        divergence = LN2 * gap / ref_mass - ref_log_sum + log_sum
    if MODE == 1:
        gap = tl.sum(_shifted(sums.g, step - tl.maximum(ref_step, LOWEST), sums.s, decay), 0)
        divergence = LN2 * gap / mass - log_sum + ref_log_sum
    if MODE == 2:
        # a second pass, against the mixture
        c = tl.zeros((LANES,), tl.float32)
        d = tl.zeros((LANES,), tl.float32)
        log2_sum = log_sum * LOG2E
        ref_log2_sum = ref_log_sum * LOG2E
        for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
            x, y, _ = _load_pair(pair, v + lane, None, row_max, ref_row_max)
            log2_p = x * log2e_t - log2_sum
            log2_q = y * log2e_r - ref_log2_sum
            policy, reference = _against_mixture(log2_p, log2_q, beta)
            c += tl.sum(tl.exp2(log2_p) * policy, 1)
            d += tl.sum(tl.exp2(log2_q) * reference, 1)
        if main < V:
            mask = main + lane < V
            x, y, _ = _load_pair(pair, main + lane, mask, row_max, ref_row_max)
            log2_p = x * log2e_t - log2_sum
            log2_q = y * log2e_r - ref_log2_sum
            policy, reference = _against_mixture(log2_p, log2_q, beta)
            c += tl.sum(tl.where(mask, tl.exp2(log2_p) * policy, 0.0), 1)
            d += tl.sum(tl.where(mask, tl.exp2(log2_q) * reference, 0.0), 1)
        center = LN2 * tl.sum(c, 0)
        divergence = (1.0 - beta) * center + beta * LN2 * tl.sum(d, 0)
    else:
        finite = tl.max(sums.top, 0) < UNBOUNDED
        center = divergence
        if MODE == 1:  # an infinite D has no derivative
            center = tl.where(finite, divergence, float("nan"))
        divergence = tl.where(finite, divergence, float("inf"))
    alive = (mass > 0.0) & (ref_mass > 0.0)  # nor is NaN
    divergence = tl.where(alive, tl.maximum(divergence, 0.0, propagate_nan=tl.PropagateNan.ALL), float("nan"))
    center = tl.where(alive, center, float("nan"))
    return divergence, entropy, PairStats(row_max, log_sum, ref_row_max, ref_log_sum, center)


@triton.jit
def _pair_gradient(entry, x, y, slope, softcap, beta, MODE: tl.constexpr):
    log2_p = x * (LOG2E * entry.rate) - entry.log2_sum
    log2_q = y * (LOG2E * entry.ref_rate) - entry.ref_log2_sum
    p = tl.exp2(log2_p)
    if MODE == 0:
        u = p - tl.exp2(log2_q)
    if MODE == 1:  # in natural units: with temperatures of 1 nothing is rounded but the differences
        u = p * ((x * entry.rate - y * entry.ref_rate) - entry.center)
    if MODE == 2:
        policy, _ = _against_mixture(log2_p, log2_q, beta)
        u = (1.0 - beta) * p * (policy * LN2 - entry.center)
    u = tl.where(log2_p == float("-inf"), 0.0, u) * entry.factor
    if softcap is not None:
        u = u * slope
    return u


@triton.jit
def write_pair_gradient(pair, out_ptr, scored, stats, c, kind, V, TILE: tl.constexpr, MODE: tl.constexpr):
    """Writes ``c u`` of V columns. A row that is not scored is not read: all logits are 0 in it, and so is ``u``."""
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    STEP: tl.constexpr = LANES * PER_LANE
    row_max = tl.where(scored, stats.row_max, 0.0)
    ref_row_max = tl.where(scored, stats.ref_row_max, 0.0)
    log_sum = tl.where(scored, stats.log_sum, 0.0)
    ref_log_sum = tl.where(scored, stats.ref_log_sum, 0.0)
    center = tl.where(scored, stats.center, 0.0)
    factor = tl.where(scored, c, 0.0)
    if kind.peak is not None:
        factor = factor * kind.peak
        if MODE == 1:
            factor = factor / (2.0 * center + 1.0)
    if MODE == 1:
        center += log_sum - ref_log_sum
    rate = 1.0 / tl.where(scored, pair.own.temperature, 1.0)
    ref_rate = 1.0 / tl.where(scored, pair.ref.temperature, 1.0)
    entry = PairEntry(rate, log_sum * LOG2E, ref_rate, ref_log_sum * LOG2E, center, factor)
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    main = V // STEP * STEP
    for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
        x, y, slope = _load_pair(pair, v + lane, scored, row_max, ref_row_max)
        u = _pair_gradient(entry, x, y, slope, pair.own.form.softcap, kind.beta, MODE)
        tl.store(out_ptr + v + lane, u.to(dtype))
    if main < V:
        cols = main + lane
        x, y, slope = _load_pair(pair, cols, (cols < V) & scored, row_max, ref_row_max)
        u = _pair_gradient(entry, x, y, slope, pair.own.form.softcap, kind.beta, MODE)
        tl.store(out_ptr + cols, u.to(dtype), mask=cols < V)
