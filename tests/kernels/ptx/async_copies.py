"""Asynchronous copies from global to shared memory (``cp.async``), as late as they may come.

A copy reads when it is issued and lands when its lane waits for its group: between the two nobody may touch where it
goes, whatever barriers there are.
"""

import re

import numpy as np

from ptx.accesses import ADDRESS, Form, GlobalTouch, Touch, check_shared, enter_shared, load_active
from ptx.batch import Batch, Copy
from ptx.collectives import Step, predicate
from ptx.faults import Misaligned, UnknownInstruction
from ptx.parsing import Instruction
from ptx.registers import Array, Operands

_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?")


def compile_copy(number: int, instruction: Instruction, operands: Operands, granule: int) -> Step | None:
    """Returns what executes a copy, the end of a group or a wait; None where the instruction is none of them."""
    opcode, arguments = instruction.opcode, instruction.operands
    if opcode == "cp.async.commit_group" and not arguments:
        return _commit
    if opcode == "cp.async.wait_all" and not arguments:
        return lambda batch: _land(batch, 0)
    if opcode == "cp.async.wait_group" and len(arguments) == 1 and arguments[0].isdigit():
        return lambda batch: _land(batch, int(arguments[0]))
    if _COPY.fullmatch(opcode) and len(arguments) in (3, 4) and int(arguments[2], 0) in (4, 8, 16):
        return _copy(number, instruction, operands, granule)
    return None


def _commit(batch: Batch) -> None:
    if batch.chosen is None:
        batch.groups += 1
    else:
        batch.groups[batch.chosen] += 1


def _copy(number: int, instruction: Instruction, operands: Operands, granule: int) -> Step:
    size = int(instruction.operands[2], 0)
    place = ADDRESS.fullmatch(instruction.operands[0])
    if place is None:
        raise UnknownInstruction(str(instruction))
    base, shift = operands.reader(place[1], "u32"), int(place[2] or "0", 0)
    form = Form("global", size // 4, "b32")
    source: Touch = GlobalTouch(number, instruction, operands, form, instruction.operands[1], granule, True)
    given = operands.reader(instruction.operands[3], "u32") if len(instruction.operands) == 4 else None
    guard, where = predicate(instruction, operands), str(instruction)

    def step(batch: Batch) -> None:
        mask = guard(batch)
        on = np.ones(batch.count, bool) if mask is None else mask
        if not on.any():
            return
        length = np.full(batch.count, size) if given is None else np.broadcast_to(given(batch), (batch.count,))
        read = on & (length > 0)
        if ((length != size) & (length != 0) & on).any():
            raise UnknownInstruction(f"{where} of part of its bytes")
        words = np.zeros((batch.count, form.words), np.uint32)  # what is not read is zero
        if read.any():
            words = load_active(batch, read, source, form)
        address = np.broadcast_to(base(batch), (batch.count,)).astype(np.int64)[on] + shift
        if (address % size).any():
            raise Misaligned(f"misaligned: {where} writes to addresses that are no multiples of {size}")
        check_shared(batch, address, size, where)
        offset = batch.of(batch.shared_base)[on] + address
        _fly(batch, offset, size, batch.of(batch.identity)[on], where)
        lanes = (np.arange(batch.size) if batch.chosen is None else batch.chosen)[on]
        batch.copies.append(Copy(lanes, batch.groups[lanes], offset, words[on], where))

    return step


def _granules(batch: Batch, offset: Array, size: int) -> Array:
    granule = batch.shared.shadow.granule
    return offset[:, None] // granule + np.arange(max(size // granule, 1))


def _fly(batch: Batch, offset: Array, size: int, identity: Array, where: str) -> None:
    """Enters the write of a copy when it is issued, and forbids its destination."""
    index = _granules(batch, offset, size)
    enter_shared(batch, index, identity, False, where)
    if batch.shared.in_flight is None:
        batch.shared.in_flight = np.zeros(len(batch.shared.shadow.writer), bool)
    batch.shared.in_flight[index] = True


def _land(batch: Batch, pending: int) -> None:
    """Lands the copies of the chosen lanes, except of the last so many groups."""
    waiting = np.zeros(batch.size, bool)
    waiting[slice(None) if batch.chosen is None else batch.chosen] = True
    left = []
    for copy in batch.copies:
        lands = waiting[copy.lanes] & (copy.group < batch.groups[copy.lanes] - pending)
        if lands.any():
            size = 4 * copy.words.shape[1]
            index = _granules(batch, copy.offset[lands], size)
            assert batch.shared.in_flight is not None
            batch.shared.in_flight[index] = False
            enter_shared(batch, index, batch.identity[copy.lanes[lands]], False, copy.where)
            batch.shared.store(copy.offset[lands], 4, copy.words[lands])
        if not lands.all():
            rest = ~lands
            lanes, group, offset, words, where = copy
            left.append(Copy(lanes[rest], group[rest], offset[rest], words[rest], where))
    batch.copies = left
