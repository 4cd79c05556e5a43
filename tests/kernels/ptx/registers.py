"""Registers: a value for each lane, seen as what an instruction takes it for; and how operands are read and written.

A lane is one thread of one program. All lanes of a batch lie in one row per register, so that an instruction is one
numpy operation on the rows. When only part of the lanes executes it, ``Lanes.chosen`` holds their indices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parsing import Program

Array = Any  # numpy arrays and scalars: both stand for an operand


class Kind(NamedTuple):
    """How the bytes of a register are seen: ``parts`` numbers of ``dtype``."""

    size: int
    dtype: Any
    parts: int = 1


KINDS = {
    "pred": Kind(1, np.bool_),
    "b8": Kind(1, np.uint8),
    "u8": Kind(1, np.uint8),
    "s8": Kind(1, np.int8),
    "b16": Kind(2, np.uint16),
    "u16": Kind(2, np.uint16),
    "s16": Kind(2, np.int16),
    "f16": Kind(2, np.float16),
    "bf16": Kind(2, np.uint16),  # bit patterns: numpy has no bfloat16
    "b32": Kind(4, np.uint32),
    "u32": Kind(4, np.uint32),
    "s32": Kind(4, np.int32),
    "f32": Kind(4, np.float32),
    "f16x2": Kind(4, np.float16, 2),
    "bf16x2": Kind(4, np.uint16, 2),
    "b16x2": Kind(4, np.uint16, 2),
    "b64": Kind(8, np.uint64),
    "u64": Kind(8, np.uint64),
    "s64": Kind(8, np.int64),
    "f64": Kind(8, np.float64),
    "f32x2": Kind(8, np.float32, 2),
    "b32x2": Kind(8, np.uint32, 2),
    "b16x4": Kind(8, np.uint16, 4),
}
_WORDS: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_NOISE = 0x7FC0DEAD7FC0DEAD  # what stands in a register that nobody wrote: NaN as float32, large as an integer
_SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid")


class Lanes(Protocol):
    """What operands need of the running batch: its rows, the chosen lanes (None: all), the special registers."""

    rows: dict[str, list[Array]]
    chosen: Array | None
    special: dict[str, Array]


def register_rows(program: Program, lanes: int) -> dict[str, list[Array]]:
    """Returns, for every kind, the rows of its registers, in the order of `slots`."""
    counts: dict[int, int] = {}
    for kind in program.registers.values():
        counts[_size(kind)] = counts.get(_size(kind), 0) + 1
    rows: dict[str, list[Array]] = {"pred": list(np.zeros((counts.get(1, 0), lanes), np.bool_))}
    for size, unsigned in _WORDS.items():
        noise = _NOISE & ((1 << 8 * size) - 1)
        bank = np.full((counts.get(size, 0), lanes), noise, unsigned)
        for name, form in KINDS.items():
            if form.size == size:
                shape = bank.shape if form.parts == 1 else (*bank.shape, form.parts)
                rows[name] = list(bank.view(form.dtype).reshape(shape))
    return rows


def slots(program: Program) -> dict[str, int]:
    """Returns the position of each register among those of its size."""
    taken: dict[int, int] = {}
    out = {}
    for name, kind in program.registers.items():
        size = _size(kind)
        out[name] = taken.get(size, 0)
        taken[size] = out[name] + 1
    return out


def _size(kind: str) -> int:
    if kind not in KINDS:
        raise UnknownInstruction(f"a register of type .{kind}")
    return KINDS[kind].size


def immediate(text: str, kind: str) -> Array | None:
    """Returns a constant as a value of a kind, or None where the text is no constant. Integers wrap, as in PTX."""
    form = KINDS[kind]
    if text[:2] in ("0f", "0d") and form.dtype in (np.float32, np.uint32, np.int32, np.float64, np.uint64, np.int64):
        bits = int(text[2:], 16)
    elif kind == "pred" and text in ("0", "1", "-1", "true", "false"):
        return np.bool_(text not in ("0", "false"))
    else:
        try:
            bits = int(text.removesuffix("U"), 0)
        except ValueError:
            return None
    word = np.dtype(f"u{form.size}").type(bits & ((1 << 8 * form.size) - 1))
    value = np.array([word]).view(form.dtype)
    return value[0] if form.parts == 1 else value


class Operands:
    """Makes the functions that read and write the operands of a program's instructions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots = slots(program)

    def is_register(self, text: str) -> bool:
        return text in self.slots

    def size(self, text: str) -> int:
        """Returns the bytes of a register."""
        return _size(self.program.registers[text])

    def reader(self, text: str, kind: str, low: bool = False) -> Callable[[Lanes], Array]:
        """Returns a function from the batch to the operand's values in the chosen lanes (a scalar for a constant).

        ``low``: a register may be wider than its kind, which then is its low part.
        """
        if text.startswith("!"):
            plain = self.reader(text[1:], kind)
            return lambda lanes: ~plain(lanes)
        if low and text in self.slots and self.size(text) > KINDS[kind].size:
            return self._low(text, kind)
        if text in self.slots:
            self._check(text, kind)
            slot = self.slots[text]

            def read(lanes: Lanes) -> Array:
                row = lanes.rows[kind][slot]
                return row if lanes.chosen is None else row[lanes.chosen]

            return read
        if text in self.program.symbols:
            return self._constant(np.array([self.program.symbols[text]]).astype(KINDS[kind].dtype)[0])
        if text.startswith(_SPECIAL) and KINDS[kind].size == 4:
            return lambda lanes: _chosen(lanes, lanes.special[text]).view(KINDS[kind].dtype)
        value = immediate(text, kind)
        if value is None:
            raise UnknownInstruction(f"operand `{text}` taken as .{kind}")
        return self._constant(value)

    def writer(self, text: str, kind: str) -> Callable[[Lanes, Array, Array | None], None]:
        """Returns a function that writes values, where the mask (None: everywhere) says so."""
        if text == "_":
            return lambda lanes, value, mask: None
        if text not in self.slots:
            raise UnknownInstruction(f"destination `{text}`")
        self._check(text, kind)
        slot = self.slots[text]
        parts = KINDS[kind].parts

        def write(lanes: Lanes, value: Array, mask: Array | None) -> None:
            row = lanes.rows[kind][slot]
            if lanes.chosen is None:
                if mask is None:
                    row[...] = value
                else:
                    np.copyto(row, value, where=mask if parts == 1 else mask[:, None])
            elif mask is None:
                row[lanes.chosen] = value
            else:
                value = np.broadcast_to(value, mask.shape if parts == 1 else (*mask.shape, parts))
                row[lanes.chosen[mask]] = value[mask]

        return write

    def _low(self, text: str, kind: str) -> Callable[[Lanes], Array]:
        whole = self.reader(text, f"u{8 * self.size(text)}")
        word, dtype = np.dtype(f"u{KINDS[kind].size}"), KINDS[kind].dtype
        return lambda lanes: whole(lanes).astype(word).view(dtype)

    def _check(self, text: str, kind: str) -> None:
        if self.size(text) != KINDS[kind].size:
            raise UnknownInstruction(f"register `{text}` of {self.size(text)} bytes taken as .{kind}")

    @staticmethod
    def _constant(value: Array) -> Callable[[Lanes], Array]:
        return lambda lanes: value


def _chosen(lanes: Lanes, values: Array) -> Array:
    return values if lanes.chosen is None else values[lanes.chosen]


def parts(operand: str) -> list[str] | None:
    """Returns the registers of ``{a, b}``, or None for a single operand."""
    if not operand.startswith("{"):
        return None
    return [name.strip() for name in operand.strip("{} ").split(",")]
