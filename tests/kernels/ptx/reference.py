"""Computes what each instruction should, lane by lane, with Python's integers and exact fractions: written after the
manual, and independent of the machine's numpy."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from ptx.registers import KINDS
from ptx.semantics import Semantics

Value = Any  # an int, or a float, or a pair of them

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def rounded(value: Fraction, kind: str) -> float:
    """Returns a nonzero exact number rounded to nearest even in a format of so many bits and exponents."""
    bits, least, most = FORMATS[kind]
    exponent = max(abs(value.numerator).bit_length() - value.denominator.bit_length(), least)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent and exponent > least:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    out = round(value / unit) * unit
    sign = -1.0 if value < 0 else 1.0
    return math.copysign(math.inf if abs(out) >= Fraction(2) ** (most + 1) else float(out), sign)


def nearest(value: float | Fraction, kind: str) -> float:
    if isinstance(value, Fraction):
        return rounded(value, kind) if value else 0.0
    return value if not math.isfinite(value) or value == 0 else rounded(Fraction(value), kind)


def decode(bits: int, kind: str) -> Value:
    if kind == "pred":
        return bool(bits)
    if kind.endswith("x2"):
        half, width = kind[:-2], 4 * KINDS[kind].size
        return decode(bits & ((1 << width) - 1), half), decode(bits >> width, half)
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    size = KINDS[kind].size
    if kind[0] == "f":
        return struct.unpack({2: "<e", 4: "<f", 8: "<d"}[size], bits.to_bytes(size, "little"))[0]
    return int.from_bytes(bits.to_bytes(size, "little"), "little", signed=kind[0] == "s")


def wrap(value: int, kind: str) -> int:
    width = 8 * KINDS[kind].size
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def exact(operation: Callable[..., Any], *values: float) -> float | Fraction:
    """The operation on exact fractions; on Python's floats where a value or the result is 0, infinite or NaN."""
    try:
        plain = operation(*values)
    except ZeroDivisionError:
        signs = math.copysign(1, values[-1]) * (math.copysign(1, values[0]) if len(values) > 1 else 1)
        zero_by_zero = len(values) > 1 and (values[0] == 0 or math.isnan(values[0]))
        return math.nan if zero_by_zero else math.copysign(math.inf, signs)
    except (ValueError, OverflowError):
        return math.nan
    if all(map(math.isfinite, values)):
        whole = operation(*map(Fraction, values))
        return whole if whole else plain
    return plain


def clamp_shift(a: int, by: int, kind: str, left: bool) -> int:
    width = 8 * KINDS[kind].size
    by = min(by, 64)
    return wrap(a << by if left else a >> by, kind) if left or kind[0] == "s" or by < width else 0


def extract(a: int, start: int, length: int, kind: str) -> int:
    """The manual's definition of bfe, bit by bit."""
    width = 8 * KINDS[kind].size
    start, length = start & 255, length & 255
    sign = 0 if kind[0] == "u" or length == 0 else (a >> min(start + length - 1, width - 1)) & 1
    out = 0
    for i in range(width):
        out |= ((a >> (start + i)) & 1 if i < length and start + i < width else sign) << i
    return wrap(out, kind)


def insert(a: int, b: int, start: int, length: int) -> int:
    start, length = start & 255, length & 255
    for i in range(32):
        if i < length and start + i < 32:
            b = b & ~(1 << (start + i)) | ((a >> i) & 1) << (start + i)
    return b


def permute(a: int, b: int, selector: int) -> int:
    source = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = source[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def highest(a: int, kind: str) -> int:
    a = ~a if a < 0 else a
    return a.bit_length() - 1 if a else 0xFFFFFFFF


def divided(a: int, b: int, kind: str, remainder: bool) -> int:
    if b == 0:
        return wrap(-1, kind)
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return wrap(a - quotient * b if remainder else quotient, kind)


def choose_extreme(values: tuple[float, ...], larger: bool, nan: bool) -> float:
    if any(map(math.isnan, values)) and (nan or all(map(math.isnan, values))):
        return math.nan
    numbers = [value for value in values if not math.isnan(value)]
    return (max if larger else min)(numbers, key=lambda x: (x, math.copysign(1, x)))


def to_integer(value: float, rounding: str, kind: str) -> int:
    info = np.iinfo(KINDS[kind].dtype)
    if math.isnan(value):
        return 0 if info.bits < 64 else wrap(1 << 63, kind)
    if math.isinf(value):
        return int(info.max if value > 0 else info.min)
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding](value)
    return min(max(whole, int(info.min)), int(info.max))


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_COMPARE |= {"lo": _COMPARE["lt"], "ls": _COMPARE["le"], "hi": _COMPARE["gt"], "hs": _COMPARE["ge"]}
_INTEGER: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "abs": abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
}
_REAL: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "neg": lambda a: -a,
    "abs": abs,
}


def root(a: float) -> float:
    return math.nan if a < 0 else math.sqrt(a)


_TRANSCENDENTAL: dict[str, Callable[[float], float]] = {
    "sqrt": root,
    "rsqrt": lambda a: math.copysign(math.inf, a) if a == 0 else (math.nan if a < 0 else 1 / math.sqrt(a)),
    "ex2": lambda a: a if math.isnan(a) else (math.inf if a > 1023 else 2.0**a),
    "lg2": lambda a: -math.inf if a == 0 else (math.nan if a < 0 else math.log2(a)),
    "tanh": math.tanh,
}


def expected(opcode: str, entry: Semantics, values: tuple[Value, ...]) -> Value:
    """Returns what an instruction should write, for one lane."""
    base, *form = opcode.split(".")
    kind = entry.sources[0]
    if kind.endswith("x2"):  # two numbers at once
        single = entry._replace(
            sources=tuple(k[:-2] for k in entry.sources), results=(entry.results[0].removesuffix("x2"),)
        )
        halves = [expected(opcode.replace("x2", ""), single, tuple(value[i] for value in values)) for i in (0, 1)]
        return tuple(halves)
    if "ftz" in form:
        values = tuple(math.copysign(0, v) if abs(v) < 2.0**-126 else v for v in values)
        out = expected(opcode.replace(".ftz", ""), entry, values)
        return math.copysign(0.0, out) if isinstance(out, float) and abs(out) < 2.0**-126 else out
    result = entry.results[0]
    if base == "selp":
        return values[0] if values[2] else values[1]
    if base == "setp":
        return compared(form[0], kind, *values)
    if base == "cvt":
        return converted(form, result, kind, values)
    if result == "pred":
        return bool(_INTEGER[base](*map(int, values)) & 1)
    if base in _TRANSCENDENTAL:
        return nearest(_TRANSCENDENTAL[base](values[0]), "f32" if result == "f32" else result)
    if base == "copysign":
        return math.copysign(values[1], values[0])
    if result[0] == "f" or result == "bf16":
        if base in ("min", "max"):
            return choose_extreme(values, base == "max", "NaN" in form)
        return nearest(exact(_REAL[base], *values), result)
    return integer(base, form, kind, result, values)


def integer(base: str, form: list[str], kind: str, result: str, values: tuple[int, ...]) -> int:
    unsigned = [value & 0xFFFFFFFF for value in values]
    if base in ("shl", "shr"):
        return clamp_shift(*values, kind, base == "shl")
    if base == "bfe":
        return extract(*values, kind)
    if base in ("div", "rem"):
        return divided(*values, kind, base == "rem")
    if form[0] == "hi":
        return wrap(values[0] * values[1] >> 8 * KINDS[kind].size, kind)
    if base == "bfind":
        return highest(values[0], kind)
    if base == "shf":
        amount = min(unsigned[2], 32) if form[1] == "clamp" else unsigned[2] & 31
        both = unsigned[0] | unsigned[1] << 32
        return ((both << amount) >> 32 if form[0] == "l" else both >> amount) & 0xFFFFFFFF
    special: dict[str, Callable[..., int]] = {
        "popc": lambda a: bin(a).count("1"),
        "clz": lambda a: 8 * KINDS[kind].size - a.bit_length(),
        "brev": lambda a: int(f"{a:032b}"[::-1], 2),
        "bfi": insert,
        "prmt": permute,
        "lop3": lambda a, b, c, t: sum(
            ((t >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1))) & 1) << i for i in range(32)
        ),
    }
    return special[base](*values) if base in special else wrap(_INTEGER[base](*values), result)


def compared(how: str, kind: str, a: Any, b: Any) -> bool:
    if kind[0] != "f" and kind != "bf16":
        return _COMPARE[how](a, b)
    nan = math.isnan(a) or math.isnan(b)
    if how in ("num", "nan"):
        return nan == (how == "nan")
    if how.endswith("u") and how != "u":
        return nan or _COMPARE[how[:-1]](a, b)
    return not nan and _COMPARE[how](a, b)


def converted(form: list[str], result: str, kind: str, values: tuple[Any, ...]) -> Any:
    if result.endswith("x2"):
        values = tuple(0.0 if "relu" in form and v < 0 else v for v in values)
        return nearest(values[1], result[:-2]), nearest(values[0], result[:-2])
    floats = result[0] == "f" or result == "bf16"
    if kind[0] == "f" or kind == "bf16":
        if form[0] in ("rni", "rzi", "rmi", "rpi"):
            if not floats:
                return to_integer(values[0], form[0], result)
            whole = float(to_integer(values[0], form[0], "s64")) if abs(values[0]) < 2**53 else values[0]
            return math.copysign(whole, values[0])
        return nearest(values[0], result)
    return nearest(Fraction(values[0]), result) if floats else wrap(values[0], result)
