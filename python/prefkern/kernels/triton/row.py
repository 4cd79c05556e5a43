"""Two passes over a row of logits: its statistics, and the gradient of what they became.

With ``x`` the logits before the temperature T, the first gives

    m = max_v x_v     s = sum_v w_v     e = sum_v w_v (x_v - m)     q = sum_v w_v^2     w_v = exp((x_v - m) / T)

    lp = (x_y - m) / T - log s     entropy = log s - e / (s T)     log sum p^2 = log q - 2 log s

The maximum is subtracted before anything is scaled, so that an offset common to all logits costs nothing, and nothing
cancels in the entropy. Each lane keeps its own (m, s, e, q) for the few contiguous elements that it reads of a tile
``[LANES, PER_LANE]``; the lanes meet once, at the end of the row. The running maximum starts at the lowest float, not
at -inf: then ``x - m`` is never NaN, a logit of -inf has ``w = 0``, and ``s = 0`` says that all were -inf. The first
argmax is free: a lane remembers where it last raised its maximum.

With ``p = exp((x - m) / T - log s)``, t the softcap's tanh, ``u = (p - 1[v = y]) (1 - t)(1 + t)`` and ``u_y`` by
``expm1(lp)``, the second writes

    g = c u + e p (log p + entropy) (1 - t)(1 + t)

What is absent is None throughout: a bias, a softcap, a statistic that was not asked for.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefkern.kernels.triton.math import LN2, LOG2E, LOWEST, expm1, tanh


class Row(NamedTuple):
    """One row of a tile: where it begins, how logits are made of it, and its temperature."""

    ptr: Any
    form: Any
    temperature: Any


class Sums(NamedTuple):
    """The sums of each lane, and its maximum with the column where that was last raised."""

    m: Any
    s: Any
    e: Any
    q: Any
    total: Any
    argmax: Any


class Given(NamedTuple):
    """Values from which the gradient of a row is computed; ``c`` of None is 1, ``e`` of None is 0."""

    scored: Any
    y: Any  # int64: the target's column, or none
    logps: Any
    row_max: Any
    log_sum: Any
    entropy: Any  # None where e is
    c: Any
    e: Any


class Entry(NamedTuple):
    """`Given`, as every tile of the row needs it."""

    y: Any
    at_target: Any
    row_max: Any
    log2_sum: Any
    log2e_t: Any
    entropy: Any
    c: Any
    e: Any


@triton.jit
def temperature_of(form, i):
    """Returns the temperature of row i. (A row itself cannot be returned: Triton 3.6 returns no tuple with a None.)"""
    temperature = form.temperature
    if form.row_temperature is not None:
        temperature = tl.load(form.row_temperature + i).to(tl.float32)
    return temperature


@triton.jit
def _load(ptr, mask):  # mask None: all
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_logits(row, cols, mask):
    """Returns the logits of some columns before the temperature, and the softcap's derivative there; -inf stays -inf
    under the cap."""
    x = _load(row.ptr + cols, mask)
    if row.form.bias is not None:
        x = x + _load(row.form.bias + cols, mask)
    if row.form.scale is not None:
        x = x * row.form.scale
    slope = x
    if row.form.softcap is not None:
        t, slope = tanh(x * (1.0 / row.form.softcap))
        x = tl.where(x == float("-inf"), x, row.form.softcap * t)
    return x, slope


@triton.jit
def _add(sums, x, group, log2e_t, wanted):
    """Adds a tile ``x [LANES, PER_LANE]``, whose lanes begin at the columns ``group``, to the lanes' sums."""
    best = tl.max(x, 1)
    argmax = sums.argmax
    if wanted.is_top1 is not None:
        argmax = tl.where(best > sums.m, group, argmax)
    new = tl.maximum(sums.m, best)
    step = sums.m - new
    decay = tl.exp2(step * log2e_t)
    gap = x - new[:, None]
    w = tl.exp2(gap * log2e_t)
    e = sums.e
    if wanted.entropy is not None:
        # a sum whose weight has vanished is dropped, since it may be infinite; so is the gap of a logit of -inf
        e = tl.where(decay > 0.0, (e + step * sums.s) * decay, 0.0) + tl.sum(w * tl.maximum(gap, LOWEST), 1)
    q = sums.q
    if wanted.log_sum_sq_probs is not None:
        q = q * decay * decay + tl.sum(w * w, 1)
    return Sums(new, sums.s * decay + tl.sum(w, 1), e, q, sums.total, argmax)


@triton.jit
def _add_total(sums, x, wanted):
    total = sums.total
    if wanted.mean_logit is not None:
        total -= tl.sum(-x, 1)  # Triton 3.6 does not compile a sum of what was just loaded and is used again
    return Sums(sums.m, sums.s, sums.e, sums.q, total, sums.argmax)


@triton.jit
def _store(ptr, value, scored, outside):
    value = tl.where(scored, tl.where(outside, float("nan"), value), 0.0)
    tl.store(ptr, value)
    return value


@triton.jit
def write_statistics(row, i, target, stats, ignore_index, V, TILE: tl.constexpr):
    """Stores the statistics of row i: 0 where ignored (the row is not read), NaN where the target is outside [0, V)."""
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    STEP: tl.constexpr = LANES * PER_LANE
    scored = target != ignore_index
    outside = (target < 0) | (target >= V)
    columns = tl.where(scored, V, 0)
    log2e_t = LOG2E / row.temperature
    y = tl.where(scored & ~outside, target, 0).to(tl.int32)
    x_y, _ = load_logits(row, y, y < columns)

    # the lanes' sums: whole tiles without a mask, then the rest
    groups = tl.arange(0, LANES) * PER_LANE
    lane = tl.arange(0, PER_LANE)
    zero = tl.zeros((LANES,), tl.float32)
    sums = Sums(tl.full((LANES,), LOWEST, tl.float32), zero, zero, zero, zero, groups)
    main = columns // STEP * STEP
    for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
        x, _slope = load_logits(row, v + groups[:, None] + lane[None, :], None)
        sums = _add(_add_total(sums, x, stats), x, v + groups, log2e_t, stats)
    if main < columns:
        cols = main + groups[:, None] + lane[None, :]
        x, _slope = load_logits(row, cols, cols < columns)
        sums = _add_total(sums, x, stats)  # beyond the row x is 0
        sums = _add(sums, tl.where(cols < columns, x, float("-inf")), main + groups, log2e_t, stats)

    # the lanes meet
    row_max = tl.max(sums.m, 0)
    step = sums.m - row_max
    decay = tl.exp2(step * log2e_t)
    mass = tl.sum(sums.s * decay, 0)
    dead = mass == 0.0
    mass = tl.where(dead, 1.0, mass)
    log_sum = tl.log(mass)
    if stats.entropy is not None:
        e = tl.sum(tl.where(decay > 0.0, (sums.e + step * sums.s) * decay, 0.0), 0)
        _store(stats.entropy + i, log_sum - e / mass / row.temperature, scored, outside)
    if stats.log_sum_sq_probs is not None:
        squares = tl.log(tl.sum(sums.q * decay * decay, 0)) - 2.0 * log_sum
        _store(stats.log_sum_sq_probs + i, squares, scored, outside)
    if stats.mean_logit is not None:
        _store(stats.mean_logit + i, tl.sum(sums.total, 0) / columns / row.temperature, scored, outside)
    if stats.is_top1 is not None:
        # the first group of columns that holds the maximum, and in it the first such column
        cols = tl.min(tl.where(sums.m == row_max, sums.argmax, columns), 0) + lane
        x, _slope = load_logits(row, cols, cols < columns)
        x = tl.where(cols < columns, x, float("-inf"))
        top1 = tl.min(tl.where(x == tl.max(x, 0), cols, columns), 0) == y
        tl.store(stats.is_top1 + i, top1 & scored & ~outside)
    # a fused multiply-add may leave the largest weight a rounding below 1, and the sum with it
    logps = tl.minimum((x_y - row_max) / row.temperature - log_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)
    logps = _store(stats.logps + i, logps, scored, outside)
    row_max = _store(stats.row_max + i, tl.where(dead, float("-inf"), row_max), scored, outside)
    log_sum = _store(stats.log_sum + i, log_sum, scored, outside)
    return logps, row_max, log_sum


@triton.jit
def _gradient(entry, x, slope, cols, has_target, softcap):
    log2_p = (x - entry.row_max) * entry.log2e_t - entry.log2_sum
    p = tl.exp2(log2_p)
    g = p
    if has_target:  # one tile of the row: the others do not pay for the comparison
        g = tl.where(cols == entry.y, entry.at_target, p)
    if entry.c is not None:
        g = g * entry.c
    if entry.e is not None:
        g += p * (entry.e * (tl.maximum(log2_p, -1000.0) * LN2 + entry.entropy))  # p is 0 from -150 down
    if softcap is not None:
        g = g * slope
    return g


@triton.jit
def write_gradient(row, out_ptr, given, V, TILE: tl.constexpr):
    """Writes ``g`` of V columns. A row that is not scored is not read."""
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    STEP: tl.constexpr = LANES * PER_LANE
    scored = given.scored
    # below a maximum of +inf every probability is 0: in a row that is ignored, or that has no finite logit
    row_max = tl.where(scored & (given.row_max > float("-inf")), given.row_max, float("inf"))
    log2_sum = tl.where(scored, given.log_sum * LOG2E, 0.0)  # NaN where the target is outside the vocabulary
    at_target = tl.where(scored & (given.logps != float("-inf")), expm1(given.logps), 0.0)
    log2e_t = LOG2E / tl.where(scored, row.temperature, 1.0)
    entropy, c, e = given.entropy, given.c, given.e
    if c is not None:
        c = tl.where(scored, c, 0.0)
    if e is not None:
        entropy = tl.where(scored, entropy, 0.0)
        e = tl.where(scored, e, 0.0)
    y = given.y.to(tl.int32)  # of a target beyond 32 bits the whole row is NaN
    entry = Entry(y, at_target, row_max, log2_sum, log2e_t, entropy, c, e)
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    main = V // STEP * STEP
    for v in tl.range(0, main, STEP, num_stages=TILE.num_stages):
        cols = v + lane
        x, slope = load_logits(row, cols, scored)
        g = _gradient(entry, x, slope, cols, (y >= v) & (y < v + STEP), row.form.softcap)
        tl.store(out_ptr + cols, g.to(dtype))
    if main < V:
        cols = main + lane
        x, slope = load_logits(row, cols, (cols < V) & scored)
        g = _gradient(entry, x, slope, cols, y >= main, row.form.softcap)
        tl.store(out_ptr + cols, g.to(dtype), mask=cols < V)
