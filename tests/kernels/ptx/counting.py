"""What a launch costs: instructions of each kind, sectors that warps touch against the bytes they need, bank conflicts.

A sector is 32 bytes, the unit in which a GPU moves memory. ``requested`` counts the sectors of each warp's access,
``needed`` the bytes that it asked for. ``moved`` counts a sector once for each block (the instructions between two
branches) that loads it, and once for each that stores it, however many warps and programs do: a cache would serve the
others. A row that two loops read is moved twice.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptx.memory import Region
from ptx.parsing import Instruction, Program
from ptx.registers import Array
from ptx.sparse import zeros

SECTOR = 32
BANKS = 32


@dataclass
class Access:
    """The global accesses of one load or store. ``touched`` are the sectors of its block, by region."""

    text: str
    source: str
    touched: dict[int, Array] = field(repr=False)
    requests: int = 0
    requested: int = 0  # sectors
    needed: int = 0  # bytes
    moved: int = 0  # bytes of sectors that no access of the block had touched before

    def add(self, region: Region, offset: Array, total: int, warp: Array) -> None:
        """Enters the accesses of ``total`` bytes of lanes whose warps are given, in ascending order."""
        ordered = (np.diff(offset) >= 0) | (np.diff(warp) != 0)
        if not ordered.all():
            order = np.lexsort((offset, warp))
            offset, warp = offset[order], warp[order]
        sector = offset // SECTOR
        new_warp = np.diff(warp, prepend=-1) != 0
        self.requests += int(new_warp.sum())
        self.requested += int((new_warp | (np.diff(sector, prepend=-1) != 0)).sum())
        self.needed += total * int((new_warp | (np.diff(offset, prepend=-1) != 0)).sum())
        if region.base not in self.touched:
            self.touched[region.base] = zeros(region.size // SECTOR + 1, np.bool_)
        touched = self.touched[region.base]
        new = sector[~touched[sector]]
        self.moved += SECTOR * len(np.unique(new))
        touched[new] = True


@dataclass
class Launch:
    """The costs of a launch. Instructions are counted once per warp."""

    kernel: str
    grid: tuple[int, int, int]
    programs: int
    function: int | None = None  # of a device's kernels
    instructions: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    conflicts: int = 0  # passes through the banks of shared memory beyond the first
    disagreements: int = 0  # lanes that lost a place in shared memory to a lane of their warp with another value
    splits: int = 0  # branches at which a warp's lanes parted
    accesses: dict[int, Access] = field(default_factory=dict, repr=False)
    touched: dict[tuple[int, bool], dict[int, Array]] = field(default_factory=dict, repr=False)

    def access(self, number: int, block: int, load: bool, instruction: Instruction) -> Access:
        """Returns the counts of the access at a position in a block of the program."""
        if number not in self.accesses:
            touched = self.touched.setdefault((block, load), {})
            self.accesses[number] = Access(instruction.text, instruction.source, touched)
        return self.accesses[number]

    def _sum(self, what: str, prefix: str) -> int:
        return sum(getattr(access, what) for access in self.accesses.values() if prefix in access.text)

    @property
    def bytes_read(self) -> int:
        return self._sum("moved", "ld.")

    @property
    def bytes_written(self) -> int:
        return self._sum("moved", "st.")

    @property
    def efficiency(self) -> float:
        """Bytes that the warps needed over the bytes of the sectors that they touched."""
        requested = SECTOR * self._sum("requested", "")
        return self._sum("needed", "") / requested if requested else 1.0

    def add_instructions(self, program: Program, hits: list[int]) -> None:
        for instruction, count in zip(program.code, hits, strict=True):
            if count:
                self.instructions[instruction.opcode] += count


def bank_conflicts(offset: Array, total: int, warp: Array) -> int:
    """Returns the passes beyond the first that warps' accesses to shared memory take.

    A pass serves 32 banks of 4 bytes: lanes that ask for different words of one bank wait for one another. Accesses of
    8 and 16 bytes go by half and quarter warps.
    """
    words = max(total // 4, 1)
    part = np.arange(len(offset)) * words // BANKS % BANKS if words > 1 else 0
    group = warp * BANKS + part
    word = (offset // 4)[:, None] + np.arange(words)
    asked = np.unique((np.repeat(group, words) << 32) | word.ravel())  # each word of a group once
    bank, load = np.unique((asked >> 32) * BANKS + asked % BANKS, return_counts=True)
    worst = np.zeros(int(bank[-1]) // BANKS + 1, np.int64)
    np.maximum.at(worst, bank // BANKS, load)
    return int(worst.sum() - (worst > 0).sum())
