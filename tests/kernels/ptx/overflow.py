"""Addresses that wrapped: 32-bit sums and products that do not fit, followed to the address of an access.

A backward slice over the registers finds the instructions whose results reach the address of a global load or store;
only they are watched. A lane whose value wrapped is marked, the mark follows the value, and an access through it is a
fault, even where the wrapped address happens to lie inside a tensor. Lanes that are masked off may wrap.
"""

import re
from collections.abc import Callable

import numpy as np

from ptx.batch import Batch
from ptx.collectives import Step
from ptx.parsing import Program
from ptx.registers import Array, Operands, parts

_FLOWS = re.compile(r"(add|sub|mul|mad|shl|shr|and|or|xor|min|max|mov|selp|cvt|neg|not|bfe|bfi)\.")
_EXACT: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
}

_LIMIT = np.int64(1 << 31)


def watched(program: Program) -> set[int]:
    """Returns the positions of the instructions whose results flow into a global address."""
    wanted: set[str] = set()
    for instruction in program.code:
        if re.match(r"(ld|st)\.global", instruction.opcode):
            wanted |= set(re.findall(r"\[\s*([^\s+\]]+)", " ".join(instruction.operands)))
    out: set[int] = set()
    while True:
        found = set()
        for number, instruction in enumerate(program.code):
            if number in out or not _FLOWS.match(instruction.opcode) or not instruction.operands:
                continue
            targets = parts(instruction.operands[0]) or [instruction.operands[0]]
            if wanted.intersection(targets):
                found.add(number)
                wanted |= set(_sources(instruction.opcode, instruction.operands))
        if not found:
            return out
        out |= found


def _sources(opcode: str, operands: tuple[str, ...]) -> list[str]:
    values = operands[1:3] if opcode.startswith("selp") else operands[1:]
    return [name for operand in values for name in (parts(operand) or [operand])]


def watch(step: Step, program: Program, number: int, operands: Operands) -> Step:
    """Returns the step of a watched instruction with the marks of its lanes."""
    instruction = program.code[number]
    base, *rest = instruction.opcode.split(".")
    targets = [operands.slots[t] for t in parts(instruction.operands[0]) or [instruction.operands[0]] if t != "_"]
    sources = [operands.slots[s] for s in _sources(instruction.opcode, instruction.operands) if s in operands.slots]
    exact = None
    if rest[-1] in ("s32", "u32", "b32") and "wide" not in rest and "hi" not in rest:
        exact = _EXACT.get(base)
        if base == "shl":
            exact = lambda a, by: a << np.minimum(by, 31)  # noqa: E731
    if exact is not None:
        # PTX names a signed sum add.s32, and by habit an unsigned one too: what counts is the value as a signed number
        readers = [operands.reader(operand, "s32") for operand in instruction.operands[1:]]

    def marked(batch: Batch) -> Array | None:
        """Which of the chosen lanes have a result that wrapped, or that comes from one; None: no lane."""
        out = None
        for source in sources:
            if source in batch.overflowed:
                mark = batch.of(batch.overflowed[source])
                out = mark if out is None else out | mark
        if exact is not None:
            value = exact(*(np.asarray(read(batch), np.int64) for read in readers))
            wrapped = (value >= _LIMIT) | (value < -_LIMIT)
            if wrapped.any():
                out = wrapped if out is None else out | wrapped
        return out

    read_guard = None if instruction.guard is None else operands.reader(instruction.guard, "pred")

    def both(batch: Batch) -> None:
        marks = marked(batch)
        step(batch)
        if marks is None and not any(target in batch.overflowed for target in targets):
            return
        new = np.broadcast_to(False if marks is None else marks, (batch.count,))
        for target in targets:
            row = batch.overflowed.setdefault(target, np.zeros(batch.size, bool))
            written = new
            if read_guard is not None:
                active = read_guard(batch) ^ instruction.negated
                written = np.where(active, new, batch.of(row))
            if batch.chosen is None:
                row[:] = written
            else:
                row[batch.chosen] = written
            if not row.any():
                del batch.overflowed[target]

    return both
