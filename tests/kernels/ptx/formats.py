"""Floating-point formats and exact rounding: bfloat16, subnormal numbers flushed, sums and products rounded once."""

import numpy as np

from ptx.registers import Array

TINY = np.float32(2.0**-126)  # the smallest normal float32
_HALFWAY, _BELOW = np.int64(1 << 28), np.int64((1 << 29) - 1)  # of a float64 between two float32


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array) -> Array:
    """Returns bit patterns, rounded to nearest even; every NaN is the canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out = np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
    return out.reshape(np.shape(values))


def to_f16(values: Array) -> Array:
    """Rounds to nearest even; every NaN is the canonical one."""
    out = np.atleast_1d(np.asarray(values)).astype(np.float16)
    out.view(np.uint16)[np.isnan(out)] = 0x7FFF
    return out.reshape(np.shape(values))


def flush(values: Array) -> Array:
    """Replaces subnormal numbers by zeros of their sign."""
    small = np.abs(values) < TINY
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values


def to_odd(a: Array, b: Array) -> Array:
    """Returns a + b of float64 rounded to odd: rounding it again to less than 51 bits is rounding the exact sum."""
    s = np.atleast_1d(a + b)
    rest = s - a
    error = (a - (s - rest)) + (b - rest)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & ((bits & 1) == 0)
    away = (error > 0) == (s > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64).reshape(np.shape(a + b))


def fma(a: Array, b: Array, c: Array) -> Array:
    """Returns ``a b + c`` of float32, rounded once.

    The product is exact in float64. Rounding the sum twice differs from rounding it once only where the first rounding
    ends halfway between two float32, or where the result is subnormal: those are done again.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = np.atleast_1d(np.add(product, c, dtype=np.float64))
    out = total.astype(np.float32)
    tiny = np.abs(out) < TINY
    if ((total.view(np.int64) & _BELOW) == _HALFWAY).any() or (tiny.any() and total[tiny].any()):
        wide = np.broadcast_arrays(product, np.asarray(c, np.float64))
        out = to_odd(*wide).astype(np.float32)
    return out.reshape(np.shape(product + c))


def narrow_fma(a: Array, b: Array, c: Array) -> Array:
    """Returns ``a b + c`` of 16-bit numbers given as float32, as a float32 rounded to odd."""
    total = np.atleast_1d(to_odd(*np.broadcast_arrays(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))))
    out = total.astype(np.float32)
    bits = out.view(np.int32)
    inexact = np.isfinite(out) & (out != total) & ((bits & 1) == 0)
    away = np.abs(total) > np.abs(out)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).astype(np.int32).view(np.float32)
