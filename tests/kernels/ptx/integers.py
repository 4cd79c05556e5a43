"""Integer, logical and comparison instructions. Arithmetic wraps, as on a GPU and in numpy."""

from collections.abc import Callable
from functools import partial

import numpy as np

from ptx.registers import KINDS, Array
from ptx.semantics import define

WIDTHS = (16, 32, 64)
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _shift(kind: str, left: bool) -> Callable[[Array, Array], Array]:
    """A shift by the width or more leaves 0, or copies of the sign."""
    dtype, width = KINDS[kind].dtype, 8 * KINDS[kind].size
    move = np.left_shift if left else np.right_shift

    def shift(a: Array, amount: Array) -> Array:
        out = move(a, np.minimum(amount, width - 1).astype(dtype))
        far = amount >= width
        if left or kind[0] != "s":
            out = np.where(far, dtype(0), out)
        return out

    return shift


def _high(kind: str) -> Callable[[Array, Array], Array]:
    wide = np.int64 if kind[0] == "s" else np.uint64

    def high(a: Array, b: Array) -> Array:
        return (np.multiply(a, b, dtype=wide) >> wide(8 * KINDS[kind].size)).astype(KINDS[kind].dtype)

    return high


def _wide(kind: str, wide: str, *operands: Array) -> Array:
    """The product in twice the width, and with a third operand the sum."""
    product = np.multiply(operands[0], operands[1], dtype=KINDS[wide].dtype)
    return product if len(operands) == 2 else product + operands[2]


def _divide(kind: str, remainder: bool, a: Array, b: Array) -> Array:
    """Towards zero; by zero all bits are set (the manual leaves the value open)."""
    dtype = KINDS[kind].dtype
    safe = np.where(b == 0, dtype(1), b)
    rest = np.fmod(a, safe)
    out = rest if remainder else (a - rest) // safe
    return np.where(b == 0, ~dtype(0), out)


def _popc(a: Array) -> Array:
    return np.bitwise_count(np.asarray(a)).astype(np.uint32)


def _highest(a: Array) -> Array:
    """The position of the highest bit of unsigned values; all bits set where there is none."""
    wide = np.asarray(a).astype(np.uint64)
    position = np.zeros(wide.shape, np.uint32)
    rest = wide
    for step in (32, 16, 8, 4, 2, 1):
        above = rest >> np.uint64(step)
        position += np.where(above > 0, np.uint32(step), np.uint32(0))
        rest = np.where(above > 0, above, rest)
    return np.where(wide == 0, np.uint32(0xFFFFFFFF), position)


def _clz(width: int, a: Array) -> Array:
    return np.where(np.asarray(a) == 0, np.uint32(width), np.uint32(width - 1) - _highest(a)).astype(np.uint32)


def _bfind(kind: str, a: Array) -> Array:
    """The highest bit, of negative numbers the highest that differs from the sign."""
    if kind[0] == "s":
        a = np.where(np.asarray(a) < 0, ~np.asarray(a), a)
    return _highest(np.asarray(a).view(KINDS["u" + kind[1:]].dtype))


def _brev(a: Array) -> Array:
    out = np.zeros(np.shape(a), np.uint32)
    for bit in range(32):
        out = (out << np.uint32(1)) | ((np.asarray(a) >> np.uint32(bit)) & np.uint32(1))
    return out


def _bfe(kind: str, a: Array, start: Array, length: Array) -> Array:
    """``length`` bits from ``start``; a signed field is filled with its highest bit that exists."""
    width, dtype = 8 * KINDS[kind].size, KINDS[kind].dtype
    start, length = (np.minimum(value & np.uint32(255), 64).astype(np.uint64) for value in (start, length))
    bits = np.asarray(a).view(f"u{width // 8}").astype(np.uint64)
    one = np.uint64(1)

    def low(value: Array, count: Array) -> Array:
        return np.where(count >= 64, value, value & ((one << np.minimum(count, np.uint64(63))) - one))

    field = low(np.where(start >= 64, 0, bits >> np.minimum(start, np.uint64(63))).astype(np.uint64), length)
    if kind[0] == "s":
        last = np.minimum(start + length - one, np.uint64(width - 1))
        sign = np.where(length > 0, (bits >> last) & one, 0).astype(np.uint64)
        held = np.where(start >= width, 0, np.minimum(length, np.uint64(width) - np.minimum(start, width)))
        field = field | np.where(
            sign > 0, ~low(~np.uint64(0) + np.zeros_like(field), held.astype(np.uint64)), 0
        ).astype(np.uint64)
    return field.astype(f"u{width // 8}").view(dtype)


def _bfi(field: Array, into: Array, start: Array, length: Array) -> Array:
    start, length = ((value & np.uint32(255)).astype(np.uint64) for value in (start, length))
    one = np.uint64(1)
    ones = (one << np.minimum(length, np.uint64(32))) - one
    mask = np.where(start >= 32, 0, ones << np.minimum(start, np.uint64(32))).astype(np.uint64)
    moved = np.asarray(field).astype(np.uint64) << np.minimum(start, np.uint64(32))
    return ((np.asarray(into).astype(np.uint64) & ~mask) | (moved & mask)).astype(np.uint32)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes chosen among the eight of (b, a) by the nibbles of the selector; bit 3 spreads a byte's sign."""
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for i in range(4):
        nibble = (np.asarray(selector) >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits: bit ``4 a + 2 b + c`` of the table."""
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if (int(table) >> i) & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _funnel(left: bool, clamp: bool, low: Array, high: Array, amount: Array) -> Array:
    """The upper (left) or lower half of the 64 bits (high, low), shifted."""
    amount = np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)
    both = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
    amount = amount.astype(np.uint64)
    return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)


def _select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _define_all() -> None:
    for width in WIDTHS:
        for sign in "su":
            kind = f"{sign}{width}"
            for name, function in {
                "add": np.add,
                "sub": np.subtract,
                "mul.lo": np.multiply,
                "min": np.minimum,
                "max": np.maximum,
            }.items():
                define(f"{name}.{kind}", kind, f"{kind} {kind}", function)
            define(f"mad.lo.{kind}", kind, f"{kind} {kind} {kind}", lambda a, b, c: a * b + c)
            define(f"shr.{kind}", kind, f"{kind} u32", _shift(kind, left=False))
            define(f"div.{kind}", kind, f"{kind} {kind}", partial(_divide, kind, False))
            define(f"rem.{kind}", kind, f"{kind} {kind}", partial(_divide, kind, True))
            for name, compare in COMPARISONS.items():
                define(f"setp.{name}.{kind}", "pred", f"{kind} {kind}", compare)
        define(f"neg.s{width}", f"s{width}", f"s{width}", np.negative)
        define(f"abs.s{width}", f"s{width}", f"s{width}", np.abs)
        bits = f"b{width}"
        for name, plain in _UNSIGNED.items():
            define(f"setp.{name}.u{width}", "pred", f"u{width} u{width}", COMPARISONS[plain])
        for name in ("eq", "ne"):
            define(f"setp.{name}.{bits}", "pred", f"{bits} {bits}", COMPARISONS[name])
        for name, logical in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
            define(f"{name}.{bits}", bits, f"{bits} {bits}", logical)
        define(f"not.{bits}", bits, bits, np.invert)
        define(f"shl.{bits}", bits, f"{bits} u32", _shift(bits, left=True))
        define(f"shr.{bits}", bits, f"{bits} u32", _shift(bits, left=False))
    for kind, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        define(f"mul.wide.{kind}", wide, f"{kind} {kind}", partial(_wide, kind, wide))
        define(f"mad.wide.{kind}", wide, f"{kind} {kind} {wide}", partial(_wide, kind, wide))
    for kind in ("s16", "u16", "s32", "u32"):
        define(f"mul.hi.{kind}", kind, f"{kind} {kind}", _high(kind))
    for kind in ("s32", "u32", "s64", "u64"):
        define(f"bfe.{kind}", kind, f"{kind} u32 u32", partial(_bfe, kind))
        define(f"bfind.{kind}", "u32", kind, partial(_bfind, kind))
    for width in (32, 64):
        define(f"popc.b{width}", "u32", f"b{width}", _popc)
        define(f"clz.b{width}", "u32", f"b{width}", partial(_clz, width))
    define("brev.b32", "b32", "b32", _brev)
    define("bfi.b32", "b32", "b32 b32 u32 u32", _bfi)
    define("prmt.b32", "b32", "b32 b32 b32", _prmt)
    define("lop3.b32", "b32", "b32 b32 b32 b32", _lop3)
    for name, left in (("l", True), ("r", False)):
        for mode, clamp in (("wrap", False), ("clamp", True)):
            define(f"shf.{name}.{mode}.b32", "b32", "b32 b32 u32", partial(_funnel, left, clamp))
    for name, truth in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        define(f"{name}.pred", "pred", "pred pred", truth)
    define("not.pred", "pred", "pred", np.logical_not)
    for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        define(f"selp.{kind}", kind, f"{kind} {kind} pred", _select)


_define_all()
