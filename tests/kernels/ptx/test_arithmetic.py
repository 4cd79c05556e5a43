"""Every instruction that the machine knows, against Python's integers and exact fractions, lane by lane."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx import snippets
from ptx.machine import Kernel, Run
from ptx.registers import KINDS
from ptx.semantics import TABLE, Semantics

LANES = 256
Value = Any  # an int, or a float, or a pair of them

# ---------------------------------------------------------------------------------------------- formats, from scratch

_FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def rounded(value: Fraction, kind: str) -> float:
    """Returns a nonzero exact number rounded to nearest even in a format of so many bits and exponents."""
    bits, least, most = _FORMATS[kind]
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


# --------------------------------------------------------------------------------------- what instructions should do


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
        single = entry._replace(sources=tuple(k[:-2] for k in entry.sources), results=(entry.results[0].removesuffix("x2"),))
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
        return wrap(values[0] * values[1] >> 32, kind)
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


# ------------------------------------------------------------------------------------------------------------ inputs


def inputs(entry: Semantics, opcode: str) -> list[np.ndarray]:
    """Returns bits of the operands: corner cases against one another, then random ones of all magnitudes."""
    rng = np.random.default_rng(len(opcode))
    out = []
    for number, kind in enumerate(entry.sources):
        width = 8 * KINDS[kind].size
        bits = rng.integers(0, 1 << 63, LANES, dtype=np.uint64) * 2 + rng.integers(0, 2, LANES, dtype=np.uint64)
        if kind == "pred":
            out.append(bits & np.uint64(1))
            continue
        bits = bits >> np.uint64(64 - width)
        if kind[0] == "f" or kind == "bf16":
            corners = float_corners(kind)
            near = moderate(rng, kind)  # sums of numbers of one size, halfway cases
            bits[96:] = near[96:]
        else:
            corners = [0, 1, 2, 5, 31, 32, 33, 63, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 1 << (width // 2)]
            bits[128:] >>= rng.integers(0, width, LANES - 128, dtype=np.uint64)
        for i in range(96):
            corner = corners[(i if number == 0 else i // len(corners) ** number + i * number) % len(corners)]
            bits[i] = corner & ((1 << width) - 1)
        out.append(bits)
    return out


def float_corners(kind: str) -> list[int]:
    single = kind.removesuffix("x2")
    bits, least, _ = _FORMATS[single]
    total = 8 * KINDS[single].size
    one = (-least + 1 - 1 + 1) << (bits - 1)  # the exponent of 1.0 is the bias
    infinity = ((1 << (total - bits)) - 1) << (bits - 1)
    sign = 1 << (total - 1)
    plain = [0, 1, (1 << (bits - 1)) - 1, 1 << (bits - 1), one, one + 1, one - 1, infinity - 1, infinity, infinity + 1]
    plain += [one + (1 << (bits - 2)), sign, sign | 1, sign | one, sign | infinity, sign | (one + 3)]
    return [value | value << total for value in plain] if kind.endswith("x2") else plain


def moderate(rng: np.random.Generator, kind: str) -> np.ndarray:
    single = kind.removesuffix("x2")
    values = (rng.integers(-64, 65, LANES) * 2.0 ** rng.integers(-12, 8, LANES)).astype(np.float64)
    encoded = {
        "f16": lambda v: v.astype(np.float16).view(np.uint16),
        "bf16": lambda v: (v.astype(np.float32).view(np.uint32) >> 16),
        "f32": lambda v: (v + rng.normal(size=LANES)).astype(np.float32).view(np.uint32),
        "f64": lambda v: v.view(np.uint64),
    }[single](values)
    out = encoded.astype(np.uint64)
    return out | out[::-1] << np.uint64(8 * KINDS[single].size) if kind.endswith("x2") else out


def register(kind: str, number: int) -> str:
    return {1: "%p", 2: "%rs", 4: "%r", 8: "%rd"}[KINDS[kind].size] + str(number)


def execute(opcode: str, entry: Semantics, operands: list[np.ndarray], settings: Run | None = None) -> list[np.ndarray]:
    """Runs one instruction on all lanes and returns the bits of its results."""
    lines = ["mov.u32 %r60, %tid.x;", "mul.wide.u32 %rd60, %r60, 8;"]
    names = []
    for i, kind in enumerate(entry.sources):
        lines.append(f"ld.param.b64 %rd50, [p{i}];\nadd.s64 %rd50, %rd50, %rd60;\nld.global.b64 %rd{i + 40}, [%rd50];")
        name = register(kind, i + 1)
        if kind in ("u8", "s8"):
            name = f"%rs{i + 1}"
        if kind == "pred":
            lines.append(f"setp.ne.b64 {name}, %rd{i + 40}, 0;")
        else:
            width = int(name[1:3] == "rs") * 16 or 8 * KINDS[kind].size
            lines.append(f"cvt.u{width}.u64 {name}, %rd{i + 40};" if width < 64 else f"mov.b64 {name}, %rd{i + 40};")
        names.append(name)
    if opcode == "lop3.b32":  # its table is a constant
        names[-1] = str(int(operands[-1][0]) & 255)
    targets = [f"%rs{11 + i}" if kind in ("u8", "s8") else register(kind, 11 + i) for i, kind in enumerate(entry.results)]
    lines.append(f"{opcode} {'|'.join(targets)}, {', '.join(names)};")
    for i, (target, kind) in enumerate(zip(targets, entry.results, strict=True)):
        lines.append(f"ld.param.b64 %rd50, [p{len(operands) + i}];\nadd.s64 %rd50, %rd50, %rd60;")
        if kind == "pred":
            lines.append(f"selp.b64 %rd51, 1, 0, {target};")
        else:
            width = 16 if kind in ("u8", "s8") else 8 * KINDS[kind].size
            lines.append(f"cvt.u64.u{width} %rd51, {target};" if width < 64 else f"mov.b64 %rd51, {target};")
        lines.append("st.global.b64 [%rd50], %rd51;")
    results = [np.zeros(LANES, np.uint64) for _ in entry.results]
    snippets.run("\n".join(lines), *operands, *results, threads=LANES, settings=settings)
    return results


def same(got: Value, want: Value) -> bool:
    if isinstance(want, tuple):
        return all(map(same, got, want))
    if isinstance(want, float):
        both_nan = math.isnan(got) and math.isnan(want)
        return both_nan or (got == want and math.copysign(1, got) == math.copysign(1, want))
    return bool(got == want)


@pytest.mark.parametrize(("opcode", "sources"), sorted(TABLE), ids=lambda value: str(value))
def test_every_instruction(opcode: str, sources: int) -> None:
    entry = TABLE[opcode, sources]
    operands = inputs(entry, opcode)
    if opcode == "lop3.b32":
        operands[-1][:] = 0b10010110
    results = execute(opcode, entry, operands)
    small = [kind in ("u8", "s8") for kind in entry.sources]
    for lane in range(LANES):
        bits = [int(operand[lane]) & (0xFF if byte else -1) for operand, byte in zip(operands, small, strict=True)]
        values = tuple(decode(b, kind) for b, kind in zip(bits, entry.sources, strict=True))
        want = expected(opcode, entry, values)
        if len(results) == 2:
            got: Value = tuple(bool(result[lane]) for result in results)
        else:
            kind = entry.results[0]
            mask = 0xFF if kind in ("u8", "s8") else -1
            got = decode(int(results[0][lane]) & mask, kind)
        assert same(got, want), f"{opcode} of {values} is {got}, expected {want}"


def test_numpy_agrees_where_it_has_the_instruction() -> None:
    """The same numbers from numpy: an oracle of another make."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, LANES)).astype(np.float32)
    for opcode, function in {"add.f32": np.add, "mul.f32": np.multiply, "max.f32": np.fmax, "sub.f32": np.subtract}.items():
        bits = [x.view(np.uint32).astype(np.uint64) for x in (a, b)]
        got = execute(opcode, TABLE[opcode, 2], bits)[0].astype(np.uint32).view(np.float32)
        assert np.array_equal(got, function(a, b))


def test_products_are_rounded_once() -> None:
    """Where rounding the product first, or the sum to float64 first, gives another result."""
    a = np.float32(1 + 2**-12)
    c = np.float32(-(1 + 2**-11))
    bits = [np.full(LANES, x.view(np.uint32), np.uint64) for x in (a, a, c)]
    got = execute("fma.rn.f32", TABLE["fma.rn.f32", 3], bits)[0].astype(np.uint32).view(np.float32)
    assert (got == 2.0**-24).all()
    half, tiny = np.float32(1 + 2**-23), np.float32(2.0**-60)  # (1 + 2^-23)(1/2) + 1 is halfway, but for the last term
    product = Fraction(float(half)) * Fraction(2) ** -24 + Fraction(1)
    assert rounded(product, "f32") == 1 + 2**-23
    bits = [np.full(LANES, x.view(np.uint32), np.uint64) for x in (half, np.float32(2**-24), np.float32(1))]
    got = execute("fma.rn.f32", TABLE["fma.rn.f32", 3], bits)[0].astype(np.uint32).view(np.float32)
    assert (got == np.float32(1 + 2**-23)).all()
    bits = [np.full(LANES, x.view(np.uint32), np.uint64) for x in (tiny, tiny, np.float32(1 + 2**-23))]
    got = execute("fma.rn.f32", TABLE["fma.rn.f32", 3], bits)[0].astype(np.uint32).view(np.float32)
    assert (got == np.float32(1 + 2**-23)).all()


APPROXIMATE = sorted(key for key, entry in TABLE.items() if entry.error is not None)


@pytest.mark.parametrize(("opcode", "sources"), APPROXIMATE, ids=lambda value: str(value))
def test_approximate_results_are_off_within_the_manuals_bounds(opcode: str, sources: int) -> None:
    entry = TABLE[opcode, sources]
    rng = np.random.default_rng(1)
    values = [(2.0 ** rng.uniform(-3, 3, LANES)).astype(np.float32) for _ in range(sources)]
    bits = [value.view(np.uint32).astype(np.uint64) for value in values]
    plain, first, again, second = (
        execute(opcode, entry, bits, Run(approximate=seed))[0].astype(np.uint32).view(np.float32).astype(np.float64)
        for seed in (None, 1, 1, 2)
    )
    base = opcode.split(".")[0]
    wide = [value.astype(np.float64) for value in values]
    truth = {"div": lambda a, b: a / b, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)}
    truth |= {"ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh}
    true = truth[base](*wide)
    ulp = np.spacing(np.abs(plain).astype(np.float32)).astype(np.float64)
    bound = {
        "div": 2 * ulp,
        "rcp": ulp,
        "ex2": 2 * ulp,
        "sqrt": 2.0**-23 * np.abs(true),
        "rsqrt": 2.0**-22.9 * np.abs(true),
        "lg2": 2.0**-22 * np.where((wide[0] > 0.5) & (wide[0] < 2), 1, np.abs(true)),
        "tanh": 2.0**-11 * np.abs(true),
    }[base]
    assert (np.abs(first - true) <= bound * (1 + 1e-6)).all()
    assert (np.abs(first - true) / bound).max() > 0.9  # and they reach it
    assert (first != plain).mean() > 0.2
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_exact_results_of_approximations_stay_exact() -> None:
    """2^0 and infinities are in the manual's tables."""
    bits = [np.full(LANES, 0, np.uint64)]
    for value, want in ((0.0, 1.0), (-0.0, 1.0), (np.inf, np.inf), (-np.inf, 0.0)):
        bits = [np.full(LANES, np.float32(value).view(np.uint32), np.uint64)]
        got = execute("ex2.approx.ftz.f32", TABLE["ex2.approx.ftz.f32", 1], bits, Run(approximate=1))[0]
        assert (got.astype(np.uint32).view(np.float32) == want).all()


def test_an_unknown_instruction_is_refused_before_anything_runs() -> None:
    from ptx.faults import UnknownInstruction

    for text in (
        "sad.u32 %r1, %r2, %r3, %r4;",
        "add.sat.s32 %r1, %r2, %r3;",
        "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "max.f32 %r1, %r2, %r3, %r4, %r5;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "atom.global.add.u32 %r1, [%rd1], %r2;",
        "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%rd1];",
        "ld.local.b32 %r1, [%r2];",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31;",
        "mov.b32 %r1, unknown_symbol;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
        "bra nowhere;",
        "add.s32 %rd1, %r2, %r3;",
        "cp.async.cg.shared.global [%r1], [%rd1], 16;",
    ):
        with pytest.raises(UnknownInstruction):
            Kernel(snippets.module(text, 1))
