"""Shadows of memory: who touched each granule last, and whether a barrier lies between that and the access at hand.

A thread at a moment has an identity: the bits of its program, of the barriers that the program has passed (its epoch),
of its warp, of the barriers that the warp has passed, of its lane. Two accesses are ordered when the highest of these
that differs is an epoch, or when none differs. So the highest bit of ``last ^ mine`` decides:

    0 the same thread    1 another lane          RACE      2 the warp synchronised between
                         3 another warp          RACE      4 a barrier between
                         5 another program       RACE

The last writer of a granule is one thread; of its readers since then a level says how many stand behind the one that is
kept: one thread, lanes of one warp, warps of one program, or several programs.
"""

from typing import NoReturn

import numpy as np

from ptx.faults import Race
from ptx.registers import Array
from ptx.sparse import zeros

SYNC, WARP, EPOCH, PROGRAM = 5, 17, 23, 43  # the first bit of each field; the lane is below
PROGRAMS_AT_MOST = (1 << 63 - PROGRAM) - 1
_BOUNDS = np.array([1, 1 << SYNC, 1 << WARP, 1 << EPOCH, 1 << PROGRAM])
_SAME, _LANE, _SYNCED, _WARP, _BARRIER, _PROGRAM = range(6)
ONE, LANES, WARPS, PROGRAMS = range(4)

# by the level of the readers and the relation of mine to the one that is kept
_RACES = np.array(
    [
        [False, True, False, True, False, True],
        [True, True, False, True, False, True],
        [True, True, True, True, False, True],
        [True, True, True, True, True, True],
    ]
)
_LEVELS = np.array(
    [
        [ONE, LANES, ONE, WARPS, ONE, PROGRAMS],
        [LANES, LANES, ONE, WARPS, ONE, PROGRAMS],
        [WARPS, WARPS, WARPS, WARPS, ONE, PROGRAMS],
        [PROGRAMS, PROGRAMS, PROGRAMS, PROGRAMS, PROGRAMS, PROGRAMS],
    ],
    np.uint8,
)


def identities(program: Array, thread: Array) -> Array:
    """Returns the identities of threads before any barrier. Programs count from 1: 0 is nobody."""
    return ((program + 1) << PROGRAM) | ((thread // 32) << WARP) | (thread % 32)


def describe(identity: int) -> str:
    thread = ((identity >> WARP) & 63) * 32 + (identity & 31)
    return f"thread {thread} of program {(identity >> PROGRAM) - 1}"


def _relation(last: Array, mine: Array) -> Array:
    """How the last accesses stand to mine; nobody is as good as myself."""
    return np.where(last == 0, _SAME, np.searchsorted(_BOUNDS, last ^ mine, side="right"))


class Shadow:
    """Writers and readers of ``count`` granules of ``granule`` bytes."""

    def __init__(self, name: str, count: int, granule: int) -> None:
        self.name, self.granule = name, granule
        self.writer = zeros(count, np.int64)
        self.reader = zeros(count, np.int64)
        self.level = zeros(count, np.uint8)
        self.written = False

    def written_at(self, index: Array) -> Array:
        """Whether granules have been written in this launch."""
        return self.writer[index] != 0

    def read(self, index: Array, mine: Array, where: str) -> None:
        """Enters reads of granules ``index`` by threads ``mine`` (arrays of one shape)."""
        if self.written:
            last = self.writer[index]
            if last.any():
                bad = _RACES[ONE][_relation(last, mine)]
                if bad.any():
                    self._report("is read", "written", index, last, mine, bad, where)
        last = self.reader[index]
        if last.any():
            self.level[index] = _LEVELS[self.level[index], _relation(last, mine)]
        self.reader[index] = mine
        kept = self.reader[index]
        shared = kept != mine
        if shared.any():
            at = index[shared]
            level = _LEVELS[self.level[at], _relation(kept[shared], mine[shared])]
            np.maximum.at(self.level, at, level)

    def write(self, index: Array, mine: Array, where: str) -> Array | None:
        """Enters writes of granules ``index`` by threads ``mine`` (arrays of one shape).

        Lanes of a warp may write one granule together, if they write the same: returns which writes are such (None:
        no write), for the caller to compare.
        """
        if self.written:
            last = self.writer[index]
            if last.any():
                bad = _RACES[ONE][_relation(last, mine)]
                if bad.any():
                    self._report("is written", "written", index, last, mine, bad, where)
        last = self.reader[index]
        if last.any():
            bad = _RACES[self.level[index], _relation(last, mine)] & (last != 0)
            if bad.any():
                self._report("is written", "read", index, last, mine, bad, where)
        self.writer[index] = mine
        self.written = True
        kept = self.writer[index]
        lost = kept != mine
        if not lost.any():
            return None
        bad = lost & (_relation(kept, mine) != _LANE)
        if bad.any():
            self._report("is written", "written", index, kept, mine, bad, where)
        return lost

    def refined(self, granule: int) -> "Shadow":
        """Returns this shadow with smaller granules."""
        factor = self.granule // granule
        out = Shadow(self.name, len(self.writer) * factor, granule)
        for name in ("writer", "reader", "level"):
            getattr(out, name)[:] = np.repeat(getattr(self, name), factor)
        out.written = self.written
        return out

    def _report(
        self, what: str, before: str, index: Array, last: Array, mine: Array, bad: Array, where: str
    ) -> NoReturn:
        at, other, me = (int(values[bad][0]) for values in (index, last, mine))
        raise Race(
            f"race: byte {at * self.granule} of {self.name} {what} by {describe(me)} in {where} after it was {before} "
            f"by {describe(other)}, and nothing orders the two: {int(bad.sum())} such accesses"
        )
