"""Conversions (``cvt``): between integers, between integers and floats, to narrower and wider floats."""

from collections.abc import Callable
from functools import partial

import numpy as np

from ptx.formats import flush, from_bf16, to_bf16, to_f16
from ptx.registers import KINDS, Array
from ptx.semantics import define

_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(kind: str, rounding: Callable[[Array], Array], values: Array) -> Array:
    """Rounds and saturates; NaN is 0, in 64 bits the highest bit alone."""
    info = np.iinfo(KINDS[kind].dtype)
    rounded = rounding(np.asarray(values, np.float64))
    inside = np.where((rounded > info.min) & (rounded < info.max), rounded, 0.0)
    out = inside.astype(KINDS[kind].dtype)
    out = np.where(rounded >= float(info.max), info.max, np.where(rounded <= float(info.min), info.min, out))
    nan = 0 if info.bits < 64 else info.min or 1 << 63
    return np.where(np.isnan(rounded), nan, out).astype(KINDS[kind].dtype)


def _cast(kind: str, values: Array) -> Array:
    return np.asarray(values).astype(KINDS[kind].dtype)


def _pair(encode: Callable[[Array], Array], high: Array, low: Array) -> Array:
    """The second operand goes into the low half."""
    return np.stack(np.broadcast_arrays(encode(low), encode(high)), -1)


def _relu(values: Array) -> Array:
    """Negative numbers become +0; NaN stays."""
    return np.where(np.asarray(values) < 0, np.float32(0), values)


def _define_all() -> None:
    for source in _INTEGERS:
        for target in _INTEGERS:
            define(f"cvt.{target}.{source}", target, source, partial(_cast, target))
        for wide in ("f32", "f64"):
            define(f"cvt.rn.{wide}.{source}", wide, source, partial(_cast, wide))
    for name, rounding in _ROUNDINGS.items():
        for target in _INTEGERS[2:]:
            define(f"cvt.{name}.{target}.f32", target, "f32", partial(_to_integer, target, rounding))
            define(
                f"cvt.{name}.ftz.{target}.f32",
                target,
                "f32",
                lambda a, target=target, rounding=rounding: _to_integer(target, rounding, flush(a)),
            )
        define(f"cvt.{name}.f32.f32", "f32", "f32", rounding)
        define(f"cvt.{name}.ftz.f32.f32", "f32", "f32", lambda a, rounding=rounding: rounding(flush(a)))
    for kind, encode in (("f16", to_f16), ("bf16", to_bf16)):
        define(f"cvt.rn.{kind}.f32", kind, "f32", encode)
        define(f"cvt.rn.{kind}x2.f32", f"{kind}x2", "f32 f32", partial(_pair, encode))
        define(f"cvt.rn.relu.{kind}x2.f32", f"{kind}x2", "f32 f32", lambda a, b, e=encode: _pair(e, _relu(a), _relu(b)))
    define("cvt.f32.f16", "f32", "f16", partial(_cast, "f32"))
    define("cvt.f32.bf16", "f32", "bf16", from_bf16)
    define("cvt.f64.f32", "f64", "f32", partial(_cast, "f64"))
    define("cvt.rn.f32.f64", "f32", "f64", partial(_cast, "f32"))


_define_all()
