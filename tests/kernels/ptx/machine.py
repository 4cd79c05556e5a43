"""Runs a kernel: turns its instructions into steps once, and steps through them for every program of a launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx import conversions, floats, integers, overflow, races  # noqa: F401  (they fill the table of instructions)
from ptx.accesses import compile_access, form_of
from ptx.async_copies import compile_copy
from ptx.batch import DONE, WAITING, Batch
from ptx.collectives import Step, compile_collective, predicate
from ptx.counting import Launch
from ptx.faults import UnknownInstruction
from ptx.matrices import compile_matrix
from ptx.memory import Extent, GlobalMemory, SharedMemory
from ptx.parsing import Instruction, Program, parse
from ptx.registers import KINDS, Array, Operands, parts
from ptx.schedules import Schedule
from ptx.semantics import lookup

LANES = 4096  # run at once: enough to spread numpy's cost of a call, few enough to stay in a cache


class Kernel:
    """A parsed kernel and the steps of its instructions. An instruction that the machine does not know is refused
    here, before anything runs."""

    def __init__(self, ptx: str) -> None:
        self.text = ptx
        self.program = program = parse(ptx)
        operands = Operands(program)
        forms = [form_of(instruction) for instruction in program.code]
        matrices = any("matrix" in instruction.opcode for instruction in program.code)
        words = [form.word for form in forms if form is not None and form.space == "shared"] + [2] * matrices
        self.granule = min(words, default=4)
        watched = overflow.watched(program)
        self.steps: list[Step] = []
        self.controls: list[str | None] = []
        self.guards: list[Callable[[Batch], Array | None]] = []
        for number, instruction in enumerate(program.code):
            control = _control(program, instruction)
            self.controls.append(control)
            self.guards.append(predicate(instruction, operands))
            if control is not None:
                self.steps.append(_nothing)
                continue
            try:
                step = _compile(number, instruction, operands, self.granule)
            except UnknownInstruction as unknown:
                raise UnknownInstruction(
                    f"{instruction} of {program.name}: the machine does not know {unknown}"
                ) from None
            self.steps.append(overflow.watch(step, program, number, operands) if number in watched else step)


def _nothing(batch: Batch) -> None:
    pass


def _control(program: Program, instruction: Instruction) -> str | None:
    """``bra``, ``bar`` or ``ret`` for an instruction that decides what runs next."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni") and len(operands) == 1 and operands[0] in program.labels:
        return "bra"
    if opcode in ("bar.sync", "barrier.sync", "bar.cta.sync", "barrier.cta.sync") and operands == ("0",):
        if instruction.guard is None:
            return "bar"
    elif opcode in ("ret", "exit"):
        return "ret"
    return None


def _compile(number: int, instruction: Instruction, operands: Operands, granule: int) -> Step:
    for compiler in (compile_access, compile_copy, compile_matrix):
        if (step := compiler(number, instruction, operands, granule)) is not None:
            return step
    if (step := compile_collective(instruction, operands)) is not None:
        return step
    if instruction.opcode.startswith("mov."):
        return _move(instruction, operands)
    entry = lookup(instruction.opcode, len(instruction.operands) - 1)
    targets = instruction.operands[0].split("|")
    if len(targets) != len(entry.results):
        raise UnknownInstruction(f"{instruction.opcode} with {len(targets)} results")
    conversion = instruction.opcode.startswith("cvt.")
    readers = [operands.reader(o, k, conversion) for o, k in zip(instruction.operands[1:], entry.sources, strict=True)]
    writers = [operands.writer(o, k) for o, k in zip(targets, _widened(targets, entry.results, operands), strict=True)]
    dtypes = [KINDS[k].dtype for k in _widened(targets, entry.results, operands)]
    guard, function = predicate(instruction, operands), entry.function
    exact, error = entry.exact, entry.error
    division = instruction.opcode.startswith("div.")

    if len(writers) == 2:

        def step(batch: Batch) -> None:
            mask = guard(batch)
            for write, value in zip(writers, function(*(read(batch) for read in readers)), strict=True):
                write(batch, value, mask)

        return step
    write, dtype = writers[0], dtypes[0]
    widen = dtype != KINDS[entry.results[0]].dtype

    def simple(batch: Batch) -> None:
        inputs = [read(batch) for read in readers]
        value = function(*inputs)
        if (
            exact is not None
            and error is not None
            and batch.approximate is not None
            and (not division or batch.divisions)
        ):
            true = exact(*inputs)
            value = disturb(value, true, error(true, *inputs), batch.approximate, inputs)
        write(batch, value.astype(dtype) if widen else value, guard(batch))

    return simple


def _widened(targets: Sequence[str], kinds: Sequence[str], operands: Operands) -> list[str]:
    """The kinds of the destinations: those of 8 bits live in wider registers."""
    out = []
    for target, kind in zip(targets, kinds, strict=True):
        small = KINDS[kind].size == 1 and kind != "pred" and operands.is_register(target)
        out.append(f"{kind[0]}{8 * operands.size(target)}" if small else kind)
    return out


def _move(instruction: Instruction, operands: Operands) -> Step:
    """``mov``: a register or constant, or the parts of a wider register (``{a, b}``) on one side."""
    kind = instruction.opcode.partition(".")[2]
    if kind not in KINDS or len(instruction.operands) != 2:
        raise UnknownInstruction(instruction.opcode)
    target, source = instruction.operands
    into, out_of = parts(target), parts(source)
    guard = predicate(instruction, operands)
    if into is None and out_of is None:
        read, write = operands.reader(source, kind), operands.writer(target, kind)
        return lambda batch: write(batch, read(batch), guard(batch))
    pieces = into or out_of or []
    piece = f"b{8 * KINDS[kind].size // len(pieces)}"
    packed = f"{piece}x{len(pieces)}"
    if packed not in KINDS:
        raise UnknownInstruction(str(instruction))
    if into is not None:
        read = operands.reader(source, packed)
        writers = [operands.writer(name, piece) for name in into]

        def unpack(batch: Batch) -> None:
            values, mask = read(batch), guard(batch)
            for i, write in enumerate(writers):
                write(batch, values[..., i].copy(), mask)

        return unpack
    readers = [operands.reader(name, piece) for name in pieces]
    write = operands.writer(target, packed)

    def pack(batch: Batch) -> None:
        columns = [np.broadcast_to(read(batch), (batch.count,)) for read in readers]
        write(batch, np.stack(columns, -1), guard(batch))

    return pack


def disturb(value: Array, true: Array, bound: Array, seed: int, inputs: list[Array]) -> Array:
    """Returns values at most ``bound`` from the true ones: the same for the same inputs, as from a table in silicon.

    A result that the manual tables, 0 or infinite, or 2^0, stays as it is.
    """
    mix = np.full(np.shape(value), (seed * 0x9E3779B9 + 1) & 0xFFFFFFFF, np.uint32)
    for x in inputs:
        mix = (mix ^ np.asarray(x, np.float32).view(np.uint32)) * np.uint32(2654435761)
        mix ^= mix >> np.uint32(15)
    mix = mix * np.uint32(2246822519)
    unit = (mix ^ (mix >> np.uint32(13))).astype(np.float64) / 2.0**31 - 1.0
    # a quarter of all results is as far off as the manual allows
    moved = (true + bound * np.clip(unit * (4 / 3), -1, 1)).astype(np.float32)
    moved = np.where(np.abs(moved - true) > bound, np.nextafter(moved, true.astype(np.float32)), moved)
    moved = np.where(np.abs(moved - true) > bound, value, moved)
    tabled = ~np.isfinite(value) | (value == 0) | (value == 1) & (true == 1)
    return np.where(tabled, value, moved).astype(np.float32)


@dataclass
class Run:
    """How launches run: the schedule and its seed; ``approximate`` is None, or the seed of the errors of ex2, lg2, rcp,
    rsqrt, sqrt and tanh, and with ``divisions`` of ``div.full`` (whose 2 ulp a GPU does not use where the divisor is a
    power of two, but the manual does not say so); ``order`` of the batches of programs; ``only`` chooses programs by
    their number; ``strict`` refuses that lanes of a warp write different values to one place of shared memory."""

    schedule: str = "lockstep"
    seed: int = 0
    approximate: int | None = None
    order: str = "forward"
    divisions: bool = False
    strict: bool = False
    only: Callable[[int], Sequence[int]] | None = None
    lanes: int = LANES
    launches: list[Launch] = field(default_factory=list)

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], extents: list[Extent], arguments: list[int], shared: int
    ) -> Launch:
        """Runs a kernel. ``arguments`` are the bits of its parameters; those that the caller lacks are 0."""
        program = kernel.program
        names = list(program.parameters)
        if len(arguments) > len(names):
            raise ValueError(f"ptx: {program.name} has {len(names)} parameters, got {len(arguments)} arguments")
        parameters = dict.fromkeys(names, 0) | dict(zip(names, arguments, strict=False))
        total = grid[0] * grid[1] * grid[2]
        numbers = np.array(range(total) if self.only is None else sorted(self.only(total)), np.int64)
        if len(numbers) >= races.PROGRAMS_AT_MOST:
            raise ValueError(
                f"ptx: {len(numbers)} programs are more than the machine tells apart: choose some by `only`"
            )
        costs = Launch(program.name, grid, len(numbers))
        self.launches.append(costs)
        memory = GlobalMemory(extents)
        size = program.shared_bytes + shared
        schedule = Schedule(self.schedule, self.seed)
        step = max(self.lanes // program.threads, 1)
        starts = list(range(0, len(numbers), step))
        if self.order == "backward":
            starts.reverse()
        elif self.order == "random":
            schedule.rng.shuffle(starts)
        hits = [0] * len(program.code)
        with np.errstate(all="ignore"):
            for start in starts:
                some = numbers[start : start + step]
                own = SharedMemory(len(some), size, kernel.granule)
                batch = Batch(program, grid, some, start, parameters, memory, own, costs, self)
                _run(kernel, batch, schedule, hits)
        costs.add_instructions(program, hits)
        return costs


def _run(kernel: Kernel, batch: Batch, schedule: Schedule, hits: list[int]) -> None:
    """Runs a batch to its end."""
    while True:
        ready = batch.ready()
        if not ready.any():
            if not batch.release():
                return
            continue
        turn = schedule.turn(ready)
        at = batch.take(turn.warps)
        _turn(kernel, batch, at, turn.budget, hits)


def _turn(kernel: Kernel, batch: Batch, at: int, budget: int, hits: list[int]) -> None:
    """Runs the chosen lanes until they part, wait, end, or have used their budget."""
    controls, steps, warps = kernel.controls, kernel.steps, batch.warps_chosen
    everybody = batch.chosen is None
    while budget > 0:
        hits[at] += warps
        budget -= 1
        control = controls[at]
        if control is None:
            steps[at](batch)
            at += 1
            continue
        instruction = kernel.program.code[at]
        mask = kernel.guards[at](batch)
        if control == "bar":
            batch.whole_warps(str(instruction))
            batch.leave(at + 1, WAITING)
            return
        if control == "ret":
            _part(batch, mask, at + 1, at + 1, DONE)
            return
        target = kernel.program.labels[instruction.operands[0]]
        if mask is None or not mask.any():
            at = target if mask is None else at + 1
            if everybody:
                continue
            batch.leave(at)
            return
        _part(batch, mask, target, at + 1)
        return
    batch.leave(at)


def _part(batch: Batch, mask: Array | None, taken: int, other: int, state: Any = 0) -> None:
    """Sends the lanes of the mask (None: all) to ``taken``, in ``state``, and the others on to ``other``."""
    lanes = np.arange(batch.size) if batch.chosen is None else batch.chosen
    if mask is None:
        batch.leave(taken, state)
        return
    warp = batch.warp[lanes]
    batch.costs.splits += len(np.intersect1d(warp[mask], warp[~mask]))
    batch.position[lanes] = np.where(mask, taken, other)
    batch.state[lanes[mask]] = state
