"""Elementwise mathematics of the kernels, without libdevice: accurate where the textbook form cancels."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the most negative float32


@triton.jit
def expm1(x):
    """Returns ``exp(x) - 1`` for x <= 0: its series near 0, where the subtraction would cancel."""
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(x > -0.5, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log2(x):
    """Returns ``log2 x`` of a float32 >= 0, to 5e-8; -127 at 0, so that ``0 log 0 = 0``; NaN gives some number."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of a mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    series = -0.14574444 * f + 0.23689037
    series = series * f - 0.25006905
    series = series * f + 0.28670746
    series = series * f - 0.36008722
    series = series * f + 0.48093945
    series = series * f - 0.72135717
    series = series * f + 1.44269478
    return exponent.to(tl.float32) + f * series


@triton.jit
def tanh(x):
    """Returns ``tanh x`` and ``(1 - t)(1 + t)``: a polynomial below 0.6 (error 3e-9), ``q = exp(-2 |x|)`` beyond."""
    q = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    r = tl.rsqrt((1.0 + q) * (1.0 + q))  # 1 / (1 + q) in one instruction: a division takes seven
    qr = q * r
    far = 1.0 - 2.0 * qr
    square = x * x
    near = -0.005905868 * square + 0.020805385
    near = near * square - 0.053786684
    near = near * square + 0.133319587
    near = near * square - 0.333332986
    near = x + x * square * near
    is_near = tl.abs(x) < 0.6
    t = tl.where(is_near, near, tl.where(x < 0.0, -far, far))
    return t, tl.where(is_near, 1.0 - near * near, 4.0 * qr * r)
