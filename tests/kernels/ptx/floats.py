"""Floating-point instructions, and the errors that the PTX manual (ISA 9.1) allows of the approximate ones."""

from collections.abc import Callable

import numpy as np

from ptx import formats
from ptx.formats import flush, fma, from_bf16, narrow_fma, to_bf16, to_f16
from ptx.integers import COMPARISONS
from ptx.registers import Array
from ptx.semantics import define

Function = Callable[..., Array]


def _flushed(function: Function) -> Function:
    """The ``.ftz`` form: subnormal inputs and results are zero."""
    return lambda *operands: flush(function(*map(flush, operands)))


def _both(opcode: str, results: str, sources: str, function: Function, error: Function | None = None) -> None:
    """Defines an instruction of float32 and its ``.ftz`` form, which stands before the type."""
    name, _, kind = opcode.rpartition(".")
    define(opcode, results, sources, function, error)
    define(f"{name}.ftz.{kind}", results, sources, _flushed(function), error)


def _minmax(larger: bool, nan: bool) -> Function:
    """Without ``.NaN`` a NaN loses against a number; +0 is above -0, which numpy leaves open."""
    plain = {(True, False): np.fmax, (True, True): np.maximum, (False, False): np.fmin, (False, True): np.minimum}
    choose = plain[larger, nan]

    def function(a: Array, b: Array) -> Array:
        out = choose(a, b)
        zero = (out == 0) & (a == b)
        if np.any(zero):
            negative = (np.signbit(a) & np.signbit(b)) if larger else (np.signbit(a) | np.signbit(b))
            out = np.where(zero, np.where(negative, out.dtype.type(-0.0), out.dtype.type(0.0)), out)
        return out

    return function


def _of_three(choose: Function) -> Function:
    return lambda a, b, c: choose(choose(a, b), c)


def _through_float64(function: Function) -> Function:
    """Rounds a float64 result to float32: correct to within 2^-29 ulp of half an ulp."""
    return lambda *operands: np.asarray(function(*(np.asarray(x, np.float64) for x in operands))).astype(np.float32)


def ulps(count: float) -> Function:
    """An error of so many units in the last place of the correctly rounded result."""
    return lambda exact, *operands: count * np.spacing(np.abs(exact)).astype(np.float64)


def relative(bound: float) -> Function:
    """An error relative to the result. Half an ulp of it is the rounding's."""
    return lambda exact, *operands: (bound - 2.0**-24) * np.abs(exact).astype(np.float64)


def _lg2_error(exact: Array, a: Array) -> Array:
    scale = np.where((a > 0.5) & (a < 2), 1.0, np.abs(exact).astype(np.float64))
    return 2.0**-22 * scale - 2.0**-24 * np.abs(exact).astype(np.float64)


def _ex2_error(exact: Array, a: Array) -> Array:
    """2 ulp; the manual's table has 1 for an argument of 0 (or subnormal)."""
    return np.where(np.abs(a) < formats.TINY, 0.0, ulps(2)(exact))


def _half(function: Function, decode: Function, encode: Function) -> Function:
    """An instruction of 16-bit numbers by way of float32, whose 24 bits hold more than twice theirs."""
    return lambda *operands: encode(function(*map(decode, operands)))


def unordered(compare: Function) -> Function:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _ordered_ne(a: Array, b: Array) -> Array:
    return (a != b) & ~np.isnan(a) & ~np.isnan(b)


FLOAT_COMPARISONS: dict[str, Function] = {
    **{name: compare for name, compare in COMPARISONS.items() if name != "ne"},
    **{f"{name}u": unordered(compare) for name, compare in COMPARISONS.items()},
    "ne": _ordered_ne,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_ARITHMETIC: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _define_float32() -> None:
    for name, function in _ARITHMETIC.items():
        for rounding in ("", ".rn"):
            _both(f"{name}{rounding}.f32", "f32", "f32 f32", function)
            _both(f"{name}{rounding}.f32x2", "f32x2", "f32x2 f32x2", function)
    _both("fma.rn.f32", "f32", "f32 f32 f32", fma)
    _both("fma.rn.f32x2", "f32x2", "f32x2 f32x2 f32x2", fma)
    _both("neg.f32", "f32", "f32", np.negative)
    _both("abs.f32", "f32", "f32", np.abs)
    define("copysign.f32", "f32", "f32 f32", lambda a, b: np.copysign(b, a))
    for name, larger in (("max", True), ("min", False)):
        _both(f"{name}.f32", "f32", "f32 f32", _minmax(larger, False))
        define(f"{name}.NaN.f32", "f32", "f32 f32", _minmax(larger, True))
        define(f"{name}.ftz.NaN.f32", "f32", "f32 f32", _flushed(_minmax(larger, True)))
        for nan in (False, True):  # of three numbers, on sm_100
            define(f"{name}{'.NaN' * nan}.f32", "f32", "f32 f32 f32", _of_three(_minmax(larger, nan)))
    divide, root = _through_float64(np.divide), _through_float64(np.sqrt)
    invert = _through_float64(np.reciprocal)
    _both("div.rn.f32", "f32", "f32 f32", divide)
    _both("div.full.f32", "f32", "f32 f32", divide, ulps(2))
    _both("rcp.rn.f32", "f32", "f32", invert)
    _both("rcp.approx.f32", "f32", "f32", invert, ulps(1))
    _both("sqrt.rn.f32", "f32", "f32", root)
    _both("sqrt.approx.f32", "f32", "f32", root, relative(2.0**-23))
    _both("rsqrt.approx.f32", "f32", "f32", _through_float64(lambda a: 1 / np.sqrt(a)), relative(2.0**-22.9))
    _both("ex2.approx.f32", "f32", "f32", _through_float64(np.exp2), _ex2_error)
    _both("lg2.approx.f32", "f32", "f32", _through_float64(np.log2), _lg2_error)
    define("tanh.approx.f32", "f32", "f32", _through_float64(np.tanh), relative(2.0**-11))
    for name, compare in FLOAT_COMPARISONS.items():
        _both(f"setp.{name}.f32", "pred", "f32 f32", compare)
        define(f"setp.{name}.f64", "pred", "f64 f64", compare)


def _define_float64() -> None:
    for name, function in _ARITHMETIC.items():
        for rounding in ("", ".rn"):
            define(f"{name}{rounding}.f64", "f64", "f64 f64", function)
    define("div.rn.f64", "f64", "f64 f64", np.divide)
    define("sqrt.rn.f64", "f64", "f64", np.sqrt)
    define("neg.f64", "f64", "f64", np.negative)
    define("abs.f64", "f64", "f64", np.abs)
    define("max.f64", "f64", "f64 f64", _minmax(True, False))
    define("min.f64", "f64", "f64 f64", _minmax(False, False))


def _widen(values: Array) -> Array:
    return np.asarray(values).astype(np.float32)


def _define_half() -> None:
    """Arithmetic of float16, bfloat16 and pairs of them; sums of one of them and a float32 (sm_100)."""
    forms: dict[str, tuple[Function, Function]] = {"f16": (_widen, to_f16), "bf16": (from_bf16, to_bf16)}
    for kind, (decode, encode) in forms.items():
        for suffix in ("", "x2"):
            whole = kind + suffix
            for name, function in _ARITHMETIC.items():
                for rounding in ("", ".rn"):
                    half = _half(function, decode, encode)
                    define(f"{name}{rounding}.{whole}", whole, f"{whole} {whole}", half)
            define(f"fma.rn.{whole}", whole, f"{whole} {whole} {whole}", _half(narrow_fma, decode, encode))
            define(f"neg.{whole}", whole, whole, _half(np.negative, decode, encode))
            define(f"abs.{whole}", whole, whole, _half(np.abs, decode, encode))
            for name, larger in (("max", True), ("min", False)):
                for nan in (False, True):
                    extreme = _half(_minmax(larger, nan), decode, encode)
                    define(f"{name}{'.NaN' * nan}.{whole}", whole, f"{whole} {whole}", extreme)
        for name, compare in FLOAT_COMPARISONS.items():
            define(f"setp.{name}.{kind}", "pred", f"{kind} {kind}", _half(compare, decode, lambda truth: truth))
            pair = f"{kind}x2"
            define(f"setp.{name}.{pair}", "pred pred", f"{pair} {pair}", _half(compare, decode, _halves))
        for name in ("add", "sub"):
            mixed = _mixed(_ARITHMETIC[name], decode)
            define(f"{name}.rn.f32.{kind}", "f32", f"{kind} f32", mixed)


def _halves(truth: Array) -> tuple[Array, Array]:
    """Of a pair's comparison: the low half, the high half."""
    return truth[..., 0], truth[..., 1]


def _mixed(function: Function, decode: Function) -> Function:
    return lambda narrow, wide: function(decode(narrow), wide)


_define_float32()
_define_float64()
_define_half()
