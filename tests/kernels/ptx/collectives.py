"""What the lanes of a warp do together: shuffles, reductions, votes, the warp's barrier."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.batch import Batch
from ptx.faults import Divergence, UnknownInstruction
from ptx.floats import _minmax
from ptx.parsing import Instruction
from ptx.registers import KINDS, Array, Operands

Step = Callable[[Batch], None]
ALL = 0xFFFFFFFF
_REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def compile_collective(instruction: Instruction, operands: Operands) -> Step | None:
    """Returns what executes a warp's instruction; None where it is not one."""
    base, *rest = instruction.opcode.split(".")
    if rest[:1] == ["sync"] and base == "shfl":
        return _shuffle(instruction, operands, *rest[1:])
    if rest[:1] == ["sync"] and base == "redux":
        return _reduction(instruction, operands, rest[1:])
    if rest[:1] == ["sync"] and base == "vote":
        return _vote(instruction, operands, rest[1:])
    if instruction.opcode == "bar.warp.sync":
        return _barrier(instruction, operands)
    return None


def together(batch: Batch, values: Array, mask: Array | None, where: str) -> Array:
    """Returns the values of whole warps, [warps, 32]; a warp takes part as one or not at all."""
    batch.whole_warps(where)
    if batch.threads % 32:
        raise Divergence(f"divergence: {where} needs whole warps, a program has {batch.threads} threads")
    if mask is not None:
        on = mask.reshape(-1, 32)
        if (on.any(1) != on.all(1)).any():
            raise Divergence(f"divergence: the predicate of {where} differs within a warp")
    return np.broadcast_to(values, (batch.count,)).reshape(-1, 32)


def _members(instruction: Instruction, operands: Operands, operand: str) -> Callable[[Batch], None]:
    """Checks at run time that all lanes are named."""
    read = operands.reader(operand, "u32")

    def check(batch: Batch) -> None:
        if np.any(read(batch) != np.uint32(ALL)):
            raise UnknownInstruction(f"{instruction} with some lanes of the warp only")

    return check


def predicate(instruction: Instruction, operands: Operands) -> Callable[[Batch], Array | None]:
    """Returns what evaluates ``@p`` or ``@!p`` in the chosen lanes; None: all of them."""
    if instruction.guard is None:
        return lambda batch: None
    read = operands.reader(instruction.guard, "pred")
    negated = instruction.negated

    def evaluate(batch: Batch) -> Array | None:
        mask = ~read(batch) if negated else read(batch)
        return None if mask.all() else mask

    return evaluate


def _shuffle(instruction: Instruction, operands: Operands, mode: str = "", kind: str = "") -> Step:
    if mode not in ("bfly", "up", "down", "idx") or kind != "b32" or len(instruction.operands) != 5:
        raise UnknownInstruction(str(instruction))
    target, _, valid = instruction.operands[0].partition("|")
    write = operands.writer(target, "b32")
    write_valid = operands.writer(valid, "pred") if valid else None
    value, by, clamp = (operands.reader(operand, "b32") for operand in instruction.operands[1:4])
    members = _members(instruction, operands, instruction.operands[4])
    guard = predicate(instruction, operands)
    where = str(instruction)
    known = None
    if not any(map(operands.is_register, instruction.operands[2:4])):
        known = _sources(mode, by(None), clamp(None))  # type: ignore[arg-type]

    def step(batch: Batch) -> None:
        mask = guard(batch)
        members(batch)
        values = together(batch, value(batch), mask, where)
        if known is not None:
            source, inside = (np.broadcast_to(x, values.shape) for x in known)
            write(batch, values[:, known[0]].ravel(), mask)
        else:
            shift, bounds = (np.broadcast_to(x(batch), (batch.count,)).reshape(-1, 32) for x in (by, clamp))
            source, inside = _sources(mode, shift, bounds)
            write(batch, np.take_along_axis(values, source, 1).ravel(), mask)
        if write_valid is not None:
            write_valid(batch, inside.ravel(), mask)

    return step


def _sources(mode: str, shift: Array, bounds: Array) -> tuple[Array, Array]:
    """Returns the lane that each lane of a warp reads, and whether that is the one it asked for."""
    lane = np.arange(32)
    shift, bounds = np.asarray(shift, np.int64) & 31, np.asarray(bounds, np.int64)
    segment, end = (bounds >> 8) & 31, bounds & 31
    highest = (lane & segment) | (end & ~segment)
    if mode == "up":
        source = lane - shift
        inside = source >= highest
    else:
        moved = {"down": lane + shift, "bfly": lane ^ shift, "idx": (lane & segment) | (shift & ~segment)}
        source = moved[mode]
        inside = source <= highest
    return np.where(inside, source, lane), inside


def _reduction(instruction: Instruction, operands: Operands, form: list[str]) -> Step:
    operation, kind = form[0], form[-1]
    known = kind in ("s32", "u32", "b32") and operation in _REDUCTIONS and len(form) == 2
    known &= (kind == "b32") == (operation in ("and", "or", "xor"))
    if kind == "f32" and operation in ("min", "max") and form[1:-1] in ([], ["NaN"]):
        combine: Any = _minmax(operation == "max", "NaN" in form)
    elif known:
        combine = _REDUCTIONS[operation]
    else:
        raise UnknownInstruction(str(instruction))
    write = operands.writer(instruction.operands[0], kind)
    value = operands.reader(instruction.operands[1], kind)
    members = _members(instruction, operands, instruction.operands[2])
    guard = predicate(instruction, operands)
    where = str(instruction)

    def step(batch: Batch) -> None:
        mask = guard(batch)
        members(batch)
        values = together(batch, value(batch), mask, where)
        while values.shape[1] > 1:
            half = values.shape[1] // 2
            values = combine(values[:, :half], values[:, half:])
        write(batch, np.repeat(values[:, 0].astype(KINDS[kind].dtype), 32), mask)

    return step


def _vote(instruction: Instruction, operands: Operands, form: list[str]) -> Step:
    if form not in (["ballot", "b32"], ["any", "pred"], ["all", "pred"]):
        raise UnknownInstruction(str(instruction))
    write = operands.writer(instruction.operands[0], form[1])
    value = operands.reader(instruction.operands[1], "pred")
    members = _members(instruction, operands, instruction.operands[2])
    guard = predicate(instruction, operands)
    where = str(instruction)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def step(batch: Batch) -> None:
        mask = guard(batch)
        members(batch)
        values = together(batch, value(batch), mask, where)
        if form[0] == "ballot":
            out = np.where(values, bit, np.uint32(0)).sum(1, dtype=np.uint32)
        else:
            out = values.any(1) if form[0] == "any" else values.all(1)
        write(batch, np.repeat(out, 32), mask)

    return step


def _barrier(instruction: Instruction, operands: Operands) -> Step:
    members = _members(instruction, operands, instruction.operands[0])
    where = str(instruction)
    if instruction.guard is not None:
        raise UnknownInstruction(f"{instruction} under a predicate")

    def step(batch: Batch) -> None:
        members(batch)
        batch.whole_warps(where)
        batch.synchronise_warps()

    return step
