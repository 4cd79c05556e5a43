"""Loads and stores of eight by eight matrices of 16-bit numbers: ``ldmatrix``, ``stmatrix``.

Lanes 8 i to 8 i + 7 point to the rows of matrix i in shared memory; each lane holds two numbers of each matrix.
"""

import re
from collections.abc import Callable

import numpy as np

from ptx.accesses import ADDRESS, check_shared, enter_shared
from ptx.batch import Batch
from ptx.collectives import Step, predicate, together
from ptx.faults import Misaligned, Race, UnknownInstruction
from ptx.parsing import Instruction
from ptx.registers import Array, Operands, parts


def compile_matrix(number: int, instruction: Instruction, operands: Operands, granule: int) -> Step | None:
    """Returns what executes a load or store of matrices; None where the instruction is neither."""
    if not instruction.opcode.startswith(("ldmatrix.", "stmatrix.")):
        return None
    found = re.fullmatch(
        r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", instruction.opcode
    )
    if found is None or len(instruction.operands) != 2:
        raise UnknownInstruction(str(instruction))
    load, count, transposed = found[1] == "ld", int(found[2]), found[3] is not None
    names, address = instruction.operands if load else reversed(instruction.operands)
    registers = parts(names) or [names]
    at = ADDRESS.fullmatch(address)
    if at is None or len(registers) != count:
        raise UnknownInstruction(str(instruction))
    base, shift = operands.reader(at[1], "u32"), int(at[2] or "0", 0)
    access: list[Callable[..., Array]] = [(operands.writer if load else operands.reader)(n, "b16x2") for n in registers]
    guard, where = predicate(instruction, operands), str(instruction)
    lane = np.arange(32)
    # the row and the columns of the two numbers that a lane holds of each matrix
    row = np.stack([2 * (lane % 4), 2 * (lane % 4) + 1], 1) if transposed else np.stack([lane // 4] * 2, 1)
    column = np.stack([lane // 4] * 2, 1) if transposed else np.stack([2 * (lane % 4), 2 * (lane % 4) + 1], 1)

    def step(batch: Batch) -> None:
        mask = guard(batch)
        rows = together(batch, base(batch), mask, where).astype(np.int64) + shift
        on = np.ones(len(rows), bool) if mask is None else mask.reshape(-1, 32)[:, 0]
        if (rows[on, : 8 * count] % 16).any():
            raise Misaligned(f"misaligned: a row of {where} does not begin at a multiple of 16")
        check_shared(batch, rows[on, : 8 * count], 16, where)
        identity = batch.of(batch.identity).reshape(-1, 32)[on].ravel()
        start = batch.of(batch.shared_base).reshape(-1, 32)[on]
        for i, register in enumerate(access):
            offset = start[:, :, None] + rows[on][:, 8 * i + row] + 2 * column
            offset = offset.reshape(-1, 2)
            index = offset // granule if granule >= 2 else (offset[:, :, None] + np.arange(2)).reshape(len(offset), 4)
            contested = enter_shared(batch, index, identity, load, where)
            if contested is not None:
                raise Race(f"race: lanes of one warp write one place in {where}")
            if load:
                values = np.zeros((len(on), 32, 2), np.uint16)
                values[on] = batch.shared.words[2][offset // 2].reshape(-1, 32, 2)
                register(batch, values.reshape(-1, 2), mask)
            else:
                values = register(batch).reshape(-1, 32, 2)[on].reshape(-1, 2)
                batch.shared.words[2][offset // 2] = values

    return step
