"""Every instruction that the machine knows, against Python's integers and exact fractions, lane by lane."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx import snippets
from ptx.machine import Kernel, Run
from ptx.reference import FORMATS, Value, decode, expected, rounded
from ptx.registers import KINDS
from ptx.semantics import TABLE, Semantics

LANES = 256


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
            corners = [
                0,
                1,
                2,
                5,
                31,
                32,
                33,
                63,
                (1 << width) - 1,
                1 << (width - 1),
                (1 << (width - 1)) - 1,
                1 << (width // 2),
            ]
            bits[128:] >>= rng.integers(0, width, LANES - 128, dtype=np.uint64)
        for i in range(96):
            corner = corners[(i if number == 0 else i // len(corners) ** number + i * number) % len(corners)]
            bits[i] = corner & ((1 << width) - 1)
        out.append(bits)
    return out


def float_corners(kind: str) -> list[int]:
    single = kind.removesuffix("x2")
    bits, least, _ = FORMATS[single]
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
        "bf16": lambda v: v.astype(np.float32).view(np.uint32) >> 16,
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
    targets = [
        f"%rs{11 + i}" if kind in ("u8", "s8") else register(kind, 11 + i) for i, kind in enumerate(entry.results)
    ]
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
    for opcode, function in {
        "add.f32": np.add,
        "mul.f32": np.multiply,
        "max.f32": np.fmax,
        "sub.f32": np.subtract,
    }.items():
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
        execute(opcode, entry, bits, Run(approximate=seed, divisions=True))[0]
        .astype(np.uint32)
        .view(np.float32)
        .astype(np.float64)
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
        "cp.async.bulk.commit_group;",
    ):
        with pytest.raises(UnknownInstruction):
            Kernel(snippets.module(text, 1))
