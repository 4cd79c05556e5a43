"""The programs that run together: the registers of their threads, where each thread is, and what it has passed.

Threads of all programs lie in one row: lane ``thread + threads * program``. Of the lanes in a turn ``chosen`` holds the
indices (None: all of them). Threads at the lowest position run first, so that those that parted meet again.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from ptx import races
from ptx.counting import Launch
from ptx.faults import Divergence, UnknownInstruction
from ptx.memory import GlobalMemory, SharedMemory
from ptx.parsing import Program
from ptx.registers import Array, register_rows

READY, WAITING, DONE = range(3)


class Settings(Protocol):
    """What of a run's settings reaches its threads."""

    schedule: str
    approximate: int | None
    divisions: bool
    strict: bool


class Copy(NamedTuple):
    """An asynchronous copy in flight: its lanes, their group, where in shared memory their words go, the words."""

    lanes: Array
    group: Array
    offset: Array
    words: Array
    where: str


class Batch:
    """Some programs of a launch, in flight."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        numbers: Array,  # of the programs, in the order of the grid
        first: int,  # the number of the first of them in the run
        parameters: dict[str, int],
        memory: GlobalMemory,
        shared: SharedMemory,
        costs: Launch,
        run: "Settings",
    ) -> None:
        self.program, self.parameters, self.memory, self.shared = program, parameters, memory, shared
        self.costs, self.approximate, self.strict = costs, run.approximate, run.strict
        self.divisions = run.divisions
        self.first_wins = run.schedule == "backward"  # of the lanes of a warp that write one place together
        self.programs, threads = len(numbers), program.threads
        self.threads, self.warps = threads, -(-threads // 32)
        self.size = self.programs * threads
        self.rows = register_rows(program, self.size)
        self.chosen: Array | None = None
        thread = np.tile(np.arange(threads), self.programs)
        self.which = np.repeat(np.arange(self.programs), threads)
        self.warp = self.which * self.warps + thread // 32
        self.identity = races.identities(self.which + first, thread)
        self.shared_base = self.which * shared.pitch
        self.position = np.zeros(self.size, np.int64)
        self.state = np.full(self.size, READY, np.int8)
        self.overflowed: dict[int, Array] = {}  # by register: lanes whose value wrapped on the way to an address
        self.copies: list[Copy] = []
        self.groups = np.zeros(self.size, np.int64)  # of copies, that a lane has committed
        self.special = self._special(grid, numbers, thread)

    def _special(self, grid: tuple[int, int, int], numbers: Array, thread: Array) -> dict[str, Array]:
        x, y, z = grid
        place = (numbers % x, numbers // x % y, numbers // (x * y))
        out: dict[str, Any] = {"%laneid": thread % 32, "%warpid": thread // 32}
        for axis, length, at in zip("xyz", (x, y, z), place, strict=True):
            out[f"%ctaid.{axis}"] = np.repeat(at, self.threads)
            out[f"%nctaid.{axis}"] = np.full(self.size, length)
            out[f"%tid.{axis}"] = thread if axis == "x" else np.zeros_like(thread)
            out[f"%ntid.{axis}"] = np.full(self.size, self.threads if axis == "x" else 1)
        return {name: values.astype(np.uint32) for name, values in out.items()}

    # the chosen lanes

    def of(self, values: Array) -> Array:
        """Returns the values of the chosen lanes."""
        return values if self.chosen is None else values[self.chosen]

    @property
    def count(self) -> int:
        return self.size if self.chosen is None else len(self.chosen)

    def choose(self, lanes: Array | None) -> None:
        self.chosen = None if lanes is None or len(lanes) == self.size else lanes
        warp = self.of(self.warp)
        self.warps_chosen = int((np.diff(warp) != 0).sum()) + 1

    def whole_warps(self, where: str) -> None:
        """Refuses an instruction that part of a warp executes."""
        if self.chosen is None:
            return
        if len(self.chosen) != 32 * self.warps_chosen:
            raise Divergence(
                f"divergence: {where} is executed by part of a warp: {self.name_lane(self.chosen[0])} is one"
            )

    def name_lane(self, lane: int) -> str:
        return races.describe(int(self.identity[lane]))

    # order

    def ready(self) -> Array:
        """Returns which warps have a thread that can run: [programs, warps]."""
        able = (self.state == READY).reshape(self.programs, self.threads)
        pad = self.warps * 32 - self.threads
        return np.pad(able, ((0, 0), (0, pad))).reshape(self.programs, self.warps, 32).any(-1)

    def take(self, warps: Array) -> int:
        """Chooses, of the given warps, the threads at the lowest position; returns it."""
        able = (self.state == READY) & warps.reshape(-1)[self.warp]
        lanes = np.flatnonzero(able)
        at = self.position[lanes]
        lowest = int(at.min())
        self.choose(lanes[at == lowest])
        return lowest

    def leave(self, position: int, state: int = READY) -> None:
        """Ends the turn of the chosen lanes at a position."""
        if self.chosen is None:
            self.position[:], self.state[:] = position, state
        else:
            self.position[self.chosen], self.state[self.chosen] = position, state

    def synchronise_warps(self) -> None:
        """Orders what the lanes of each chosen warp did before with what they do after."""
        lanes = slice(None) if self.chosen is None else self.chosen
        self.identity[lanes] += 1 << races.SYNC
        if ((self.identity[lanes] >> races.SYNC) % (1 << races.WARP - races.SYNC) == 0).any():
            raise UnknownInstruction("more barriers of a warp between two of its block than the machine tells apart")

    def release(self) -> bool:
        """Opens the barrier of each program whose threads all wait there; False when all programs are done."""
        state = self.state.reshape(self.programs, self.threads)
        waiting = (state == WAITING).any(1)
        if not waiting.any():
            return False
        gone = np.flatnonzero(waiting & (state == DONE).any(1))
        position = self.position.reshape(self.programs, self.threads)
        if len(gone):
            lane = int(gone[0]) * self.threads + int((state[gone[0]] == WAITING).argmax())
            where = self.program.code[self.position[lane] - 1]
            raise Divergence(
                f"divergence: {self.name_lane(lane)} waits at {where} for threads of its program that have ended"
            )
        apart = np.flatnonzero(waiting & (position != position[:, :1]).any(1))
        if len(apart):
            places = sorted({int(at) - 1 for at in position[apart[0]]})
            names = " and at ".join(str(self.program.code[at]) for at in places)
            raise Divergence(f"divergence: threads of one program wait at different barriers: at {names}")
        opened = np.repeat(waiting, self.threads)
        self.state[opened] = READY
        epoch = (self.identity[opened] >> races.EPOCH) + 1
        if (epoch % (1 << races.PROGRAM - races.EPOCH) == 0).any():
            raise UnknownInstruction("more barriers in a program than the machine tells apart")
        lane_and_warp = self.identity[opened] & ((1 << races.EPOCH) - 1) & ~(((1 << races.WARP) - 1) ^ 31)
        self.identity[opened] = (epoch << races.EPOCH) | lane_and_warp
        self.costs.barriers += int(waiting.sum())
        return True
