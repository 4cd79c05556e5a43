"""Schedules: which warps of a block run next, and for how many instructions."""

from typing import NamedTuple

import numpy as np

from ptx.registers import Array

NAMES = ("lockstep", "forward", "backward", "random")
FOREVER = 1 << 60


class Turn(NamedTuple):
    """The warps that may run now, [programs, warps], and the instructions until the next choice."""

    warps: Array
    budget: int


class Schedule:
    """``lockstep``: all warps together. ``forward``, ``backward``: the first (last) warp that can, until it waits at a
    barrier. ``random``: any warp of each program, for some instructions, by the seed."""

    def __init__(self, name: str, seed: int = 0) -> None:
        if name not in NAMES:
            raise ValueError(f"ptx: schedule must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.rng = np.random.default_rng(seed)

    def turn(self, ready: Array) -> Turn:
        """Chooses among ``ready`` warps, [programs, warps]."""
        if self.name == "lockstep":
            return Turn(ready, FOREVER)
        if self.name == "random":
            # long turns let one warp run far ahead of the others, short ones interleave single instructions
            budget = int(self.rng.integers(1, 8) if self.rng.random() < 0.5 else self.rng.integers(20, 400))
            rank = np.where(ready, self.rng.random(ready.shape), -1.0)
        else:
            warp = np.arange(ready.shape[1], dtype=float)
            budget = FOREVER
            rank = np.where(ready, -warp if self.name == "forward" else warp, -np.inf)
        chosen = np.zeros_like(ready)
        chosen[np.arange(len(ready)), rank.argmax(1)] = True
        return Turn(chosen & ready, budget)
