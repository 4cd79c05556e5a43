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


def _both(opcode: str, results: str, sources: str, function: Function) -> None:
    """Defines an instruction of float32 and its ``.ftz`` form, which stands before the type."""
    name, _, kind = opcode.rpartition(".")
    define(opcode, results, sources, function)
    define(f"{name}.ftz.{kind}", results, sources, _flushed(function))


def _rounded(exact: Function) -> Function:
    """Rounds a float64 result to float32: correct but within 2^-29 ulp of halfway between two numbers."""
    return lambda *operands: np.asarray(exact(*operands)).astype(np.float32)


def _wide(function: Function) -> Function:
    return lambda *operands: function(*(np.asarray(x, np.float64) for x in operands))


def _approximation(opcode: str, sources: str, function: Function, error: Function) -> None:
    """Defines an approximation and its ``.ftz`` form; without errors asked for it is rounded correctly."""
    name, _, kind = opcode.rpartition(".")
    exact = _wide(function)
    define(opcode, "f32", sources, _rounded(exact), exact, error)
    define(
        f"{name}.ftz.{kind}",
        "f32",
        sources,
        _flushed(_rounded(exact)),
        lambda *operands: exact(*map(flush, operands)),
        lambda true, *operands: np.where(np.abs(true) < formats.TINY, 0.0, error(true, *map(flush, operands))),
    )


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


def ulps(count: float) -> Function:
    """An error of so many units in the last place of the result."""
    return lambda true, *operands: count * np.spacing(np.abs(true).astype(np.float32)).astype(np.float64)


def relative(bound: float) -> Function:
    """An error relative to the result."""
    return lambda true, *operands: bound * np.abs(true)


def _lg2_error(true: Array, a: Array) -> Array:
    """2^-22: relative, and absolute between 1/2 and 2."""
    return 2.0**-22 * np.where((a > 0.5) & (a < 2), 1.0, np.abs(true))


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
    _both("div.rn.f32", "f32", "f32 f32", _rounded(_wide(np.divide)))
    _both("rcp.rn.f32", "f32", "f32", _rounded(_wide(np.reciprocal)))
    _both("sqrt.rn.f32", "f32", "f32", _rounded(_wide(np.sqrt)))
    _approximation("div.full.f32", "f32 f32", np.divide, ulps(2))
    _approximation("rcp.approx.f32", "f32", np.reciprocal, ulps(1))
    _approximation("sqrt.approx.f32", "f32", np.sqrt, relative(2.0**-23))
    _approximation("rsqrt.approx.f32", "f32", lambda a: 1 / np.sqrt(a), relative(2.0**-22.9))
    _approximation("ex2.approx.f32", "f32", np.exp2, ulps(2))
    _approximation("lg2.approx.f32", "f32", np.log2, _lg2_error)
    tanh = _wide(np.tanh)
    define("tanh.approx.f32", "f32", "f32", _rounded(tanh), tanh, relative(2.0**-11))
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
