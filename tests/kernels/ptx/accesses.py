"""Loads and stores: what they are allowed to touch, what they read and write, what they cost."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ptx.batch import Batch
from ptx.collectives import Step, predicate
from ptx.counting import bank_conflicts
from ptx.faults import AddressOverflow, Misaligned, OutOfBounds, Race, Uninitialised, UnknownInstruction
from ptx.memory import Storage
from ptx.parsing import Instruction
from ptx.registers import KINDS, Array, Operands, parts

_HINTS = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}
ADDRESS = re.compile(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]")


class Form(NamedTuple):
    """``ld.global.v4.b32``: the space, the words, the kind of one."""

    space: str
    words: int
    kind: str

    @property
    def word(self) -> int:
        return KINDS[self.kind].size

    @property
    def total(self) -> int:
        return self.word * self.words


def form_of(instruction: Instruction) -> Form | None:
    """Returns the form of an ``ld`` or ``st``; None for other instructions."""
    base, *rest = instruction.opcode.split(".")
    if base not in ("ld", "st"):
        return None
    space, kind = rest[0].partition("::")[0], rest[-1]
    middle = [word for word in rest[1:-1] if word not in _HINTS and not word.startswith(("L1::", "L2::"))]
    count = {(): 1, ("v2",): 2, ("v4",): 4, ("v8",): 8}.get(tuple(middle), 0)
    known = space in ("global", "shared", "param") and count and kind in KINDS and KINDS[kind].parts == 1
    if not known or kind == "pred" or "L2::cache_hint" in rest or len(instruction.operands) != 2:
        raise UnknownInstruction(str(instruction))
    form = Form(space, count, kind)
    if form.total > 16:
        raise UnknownInstruction(str(instruction))
    return form


def compile_access(number: int, instruction: Instruction, operands: Operands, granule: int) -> Step | None:
    """Returns what executes a load or store; None where the instruction is neither. ``number`` is its position,
    ``granule`` the bytes that shared memory is watched by."""
    form = form_of(instruction)
    if form is None:
        return None
    if form.space == "param":
        return _parameter(instruction, operands, form)
    load = instruction.opcode.startswith("ld")
    names, address = instruction.operands if load else reversed(instruction.operands)
    registers = parts(names) or [names]
    if len(registers) != form.words:
        raise UnknownInstruction(str(instruction))
    kind = GlobalTouch if form.space == "global" else SharedTouch
    touch = kind(number, instruction, operands, form, address, granule, load)
    return (_load if load else _store)(instruction, operands, form, registers, touch)


class Placed(NamedTuple):
    """Accesses in one region of memory: which of the active lanes (None: all), at which offsets, and of stores which
    granules of each lost to another lane (None: none)."""

    storage: Storage
    lanes: Array | None
    offset: Array
    contested: Array | None


class Touch:
    """Where the lanes of an access point, checked; the storage behind it."""

    wide = "u64"

    def __init__(
        self,
        number: int,
        instruction: Instruction,
        operands: Operands,
        form: Form,
        address: str,
        granule: int,
        load: bool,
    ) -> None:
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise UnknownInstruction(str(instruction))
        self.form, self.number, self.granule, self.where = form, number, granule, str(instruction)
        self.block = operands.program.block_of(number)
        self.load = load
        self.instruction = instruction
        self.slot = operands.slots.get(found[1])
        self.base = operands.reader(found[1], self.wide)
        self.offset = KINDS[self.wide].dtype(int(found[2] or "0", 0) & ((1 << 8 * KINDS[self.wide].size) - 1))

    def each(self, batch: Batch, mask: Array | None) -> Iterator[Placed]:
        """Checks and enters the accesses of the active lanes, and yields them by regions of memory."""
        raise NotImplementedError

    def addresses(self, batch: Batch, mask: Array | None) -> Array:
        """Returns the addresses of the active lanes, which are multiples of the width."""
        address = np.broadcast_to(self.base(batch) + self.offset, (batch.count,))
        if mask is not None:
            address = address[mask]
        bad = address & KINDS[self.wide].dtype(self.form.total - 1) != 0
        if bad.any():
            raise Misaligned(
                f"misaligned: {int(bad.sum())} addresses of {self.where} are no multiples of {self.form.total}, the "
                f"first is {int(address[bad][0]):#x}"
            )
        return address

    def granules(self, offset: Array, granule: int) -> Array:
        """Returns the granules that each access touches: [lanes, granules]."""
        first = offset // granule
        count = self.form.total // granule
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]


class GlobalTouch(Touch):
    def each(self, batch: Batch, mask: Array | None) -> Iterator[Placed]:
        overflowed = batch.overflowed.get(self.slot) if self.slot is not None else None
        if overflowed is not None:
            bad = batch.of(overflowed) if mask is None else batch.of(overflowed) & mask
            if bad.any():
                raise AddressOverflow(
                    f"32-bit overflow: the address of {self.where} depends on a sum or product that does not fit in 32 "
                    f"bits, in {int(bad.sum())} lanes"
                )
        address = self.addresses(batch, mask)
        identity, warp = batch.of(batch.identity), batch.of(batch.warp)
        if mask is not None:
            identity, warp = identity[mask], warp[mask]
        for region, lanes, offset in batch.memory.locate(address, self.form.total, self.where):
            mine, of_warp = (identity, warp) if lanes is None else (identity[lanes], warp[lanes])
            if self.form.word < region.shadow.granule:
                region.shadow = region.shadow.refined(self.form.word)
            index = self.granules(offset, region.shadow.granule)
            mine = np.broadcast_to(mine[:, None], index.shape)
            contested = None
            if self.load:
                region.shadow.read(index, mine, self.where)
            else:
                contested = region.shadow.write(index, mine, self.where)
            costs = batch.costs.access(self.number, self.block, self.load, self.instruction)
            costs.add(region, offset, self.form.total, of_warp)
            yield Placed(region, lanes, offset, contested)


class SharedTouch(Touch):
    wide = "u32"

    def each(self, batch: Batch, mask: Array | None) -> Iterator[Placed]:
        address = self.addresses(batch, mask).astype(np.int64)
        base, identity, warp = (batch.of(values) for values in (batch.shared_base, batch.identity, batch.warp))
        if mask is not None:
            base, identity, warp = base[mask], identity[mask], warp[mask]
        check_shared(batch, address, self.form.total, self.where)
        offset = base + address
        index = self.granules(offset, self.granule)
        contested = enter_shared(batch, index, identity, self.load, self.where)
        batch.costs.conflicts += bank_conflicts(address, self.form.total, warp)
        yield Placed(batch.shared, None, offset, contested)


def check_shared(batch: Batch, address: Array, total: int, where: str) -> None:
    bad = address + total > batch.shared.size
    if bad.any():
        raise OutOfBounds(
            f"out of bounds: {int(bad.sum())} accesses of {total} bytes beyond the {batch.shared.size} bytes of shared "
            f"memory in {where}, the first at {int(address[bad][0])}"
        )


def enter_shared(batch: Batch, index: Array, identity: Array, load: bool, where: str) -> Array | None:
    """Enters accesses to granules of shared memory: they are initialised, and ordered by barriers. Returns which
    writes lost to another lane of their warp."""
    shadow = batch.shared.shadow
    if batch.shared.in_flight is not None and batch.shared.in_flight[index].any():
        raise Race(f"race: {where} touches shared memory that an asynchronous copy may still be writing")
    mine = np.broadcast_to(identity[:, None], index.shape)
    if not load:
        return shadow.write(index, mine, where)
    fresh = ~shadow.written_at(index)
    if fresh.any():
        byte = int(index[fresh][0]) * shadow.granule % batch.shared.pitch
        raise Uninitialised(f"uninitialised: byte {byte} of shared memory is read before it is written in {where}")
    shadow.read(index, mine, where)
    return None


def settle(
    batch: Batch, storage: Storage, offset: Array, values: Array, contested: Array, word: int, touch: Touch
) -> None:
    """Lanes of a warp that write one place together should write the same: any of them may win on a GPU.

    Triton 3.9 stores a warp's sum from all of its lanes. Where the compiler contracted the first step of the butterfly
    to ``fma(w, x, other lane's)`` they differ in the last bit: in shared memory that is counted, and a fault if
    `Run.strict`.
    """
    lost = contested.any(1)
    differ = (storage.load(offset[lost], word, values.shape[1]) != values[lost]).any(1)
    if not differ.any():
        return
    if isinstance(touch, GlobalTouch) or batch.strict:
        raise Race(
            f"race: lanes of one warp write different values to one place in {touch.where}: {int(differ.sum())} lose"
        )
    batch.costs.disagreements += int(differ.sum())


def load_active(batch: Batch, mask: Array | None, touch: Touch, form: Form) -> Array:
    """Returns the words that the active lanes load, [lanes, words]; zeros in the others."""
    active = slice(None) if mask is None else np.flatnonzero(mask)
    values = np.zeros((batch.count, form.words), f"u{form.word}")
    for storage, lanes, offset, _ in touch.each(batch, mask):
        values[active if lanes is None else np.arange(batch.count)[active][lanes]] = storage.load(
            offset, form.word, form.words
        )
    return values


def _load(instruction: Instruction, operands: Operands, form: Form, registers: list[str], touch: Touch) -> Step:
    guard = predicate(instruction, operands)
    # a word narrower than its register is extended: by its sign, or by zeros
    sign = "s" if form.kind[0] == "s" else "u"
    kinds = [f"{sign}{8 * operands.size(name)}" if operands.is_register(name) else form.kind for name in registers]
    if any(KINDS[kind].size < form.word for kind in kinds):
        raise UnknownInstruction(str(instruction))
    narrow = KINDS[f"{sign}{8 * form.word}"].dtype
    writers = [operands.writer(name, kind) for name, kind in zip(registers, kinds, strict=True)]
    dtypes = [KINDS[kind].dtype for kind in kinds]

    def step(batch: Batch) -> None:
        mask = guard(batch)
        if mask is not None and not mask.any():
            return
        values = load_active(batch, mask, touch, form)
        for i, (write, dtype) in enumerate(zip(writers, dtypes, strict=True)):
            write(batch, values[:, i].view(narrow).astype(dtype, copy=False), mask)

    return step


def _store(instruction: Instruction, operands: Operands, form: Form, registers: list[str], touch: Touch) -> Step:
    guard = predicate(instruction, operands)
    readers = [operands.reader(name, f"u{8 * form.word}", low=True) for name in registers]

    def step(batch: Batch) -> None:
        mask = guard(batch)
        if mask is not None and not mask.any():
            return
        columns = [np.broadcast_to(read(batch), (batch.count,)) for read in readers]
        values = np.stack(columns, 1) if mask is None else np.stack([column[mask] for column in columns], 1)
        for storage, lanes, offset, contested in touch.each(batch, mask):
            own = values if lanes is None else values[lanes]
            if contested is not None and batch.first_wins:
                storage.store(offset[::-1], form.word, own[::-1])
            else:
                storage.store(offset, form.word, own)
            if contested is not None:
                settle(batch, storage, offset, own, contested, form.word, touch)

    return step


def _parameter(instruction: Instruction, operands: Operands, form: Form) -> Step:
    """``ld.param``: one value for all lanes; a signed one is extended to its register."""
    target, address = instruction.operands
    name = address.strip("[] ")
    if form.words != 1 or not instruction.opcode.startswith("ld") or name not in operands.program.parameters:
        raise UnknownInstruction(str(instruction))
    kind = f"{'s' if form.kind[0] == 's' else 'u'}{8 * operands.size(target)}"
    write, guard = operands.writer(target, kind), predicate(instruction, operands)
    narrow = KINDS[f"{kind[0]}{8 * form.word}"].dtype

    def step(batch: Batch) -> None:
        bits = batch.parameters[name] & ((1 << 8 * form.word) - 1)
        value = np.array([bits], f"u{form.word}").view(narrow).astype(KINDS[kind].dtype)[0]
        write(batch, value, guard(batch))

    return step
