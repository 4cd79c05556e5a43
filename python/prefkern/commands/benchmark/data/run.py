"""Measures the cases of the data benchmark: first whether the result is right, then interleaved rounds."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from prefkern.commands.benchmark.data.cases.case import FLOOR, OURS, DataCase, Goal, Prepared, Step
from prefkern.commands.benchmark.measure import Spread

SAMPLE_S = 3e-3
"""A round repeats short calls for about so long."""
MOST_CALLS = 25
LONG_S = 0.1
"""Calls that take longer are neither repeated nor warmed in a round."""
PAUSE_S = 0.01
"""Between contenders: torch's threads may spin for a while after an operation, and slow down whoever comes next."""
CONTENDER_S = 4.0
"""A contender that has run for so long sits the further rounds out."""


class Entry(NamedTuple):
    name: str
    time: Spread | None
    note: str = ""


class Measured(NamedTuple):
    case: DataCase
    prepared: Prepared
    wrong: str | None
    entries: list[Entry]

    def seconds(self, name: str) -> float | None:
        """The median of a contender, or that of the fastest of the floor."""
        names = self.prepared.floor if name == FLOOR else (name,)
        found = [entry.time.median for entry in self.entries if entry.name in names and entry.time is not None]
        return min(found, default=None)

    def as_json(self) -> dict[str, Any]:
        floor, ours = self.seconds(FLOOR), self.seconds(OURS)
        return {
            "name": self.case.name,
            "size": self.case.size,
            "wrong": self.wrong,
            "floor_seconds": floor,
            "contenders": [
                {
                    "name": entry.name,
                    "note": entry.note,
                    "seconds": None if entry.time is None else entry.time._asdict(),
                    "times_floor": None if entry.time is None or floor is None else entry.time.median / floor,
                    "times_ours": None if entry.time is None or ours is None else entry.time.median / ours,
                }
                for entry in self.entries
            ],
            "goals": [self._goal(goal) for goal in self.prepared.goals],
        }

    def _goal(self, goal: Goal) -> dict[str, Any]:
        seconds, of = self.seconds(goal.contender), self.seconds(goal.of)
        known = seconds is not None and of is not None
        return {
            **goal._asdict(),
            "ratio": seconds / of if seconds is not None and of is not None else None,
            "met": goal.met(seconds or math.inf, of or 0.0) if known else None,
        }


def measure(case: DataCase, *, rounds: int, on_round: Callable[[int], None]) -> Measured:
    prepared = case.prepare()
    absent = [Entry(name, None, note) for name, note in prepared.missing.items()]
    wrong = prepared.check()
    if wrong is not None:
        return Measured(case, prepared, wrong, [*(Entry(name, None, "not timed") for name in prepared.steps), *absent])
    runs: dict[str, list[float]] = {name: [] for name in prepared.steps}
    spent = dict.fromkeys(runs, 0.0)
    gc.collect()
    for number in range(rounds):
        on_round(number + 1)
        for name, step in prepared.steps.items():
            if spent[name] > CONTENDER_S:
                continue
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            runs[name].append(sample(step, runs[name]))
            spent[name] += time.perf_counter() - start
    return Measured(case, prepared, None, [*(Entry(name, Spread.of(times)) for name, times in runs.items()), *absent])


def sample(step: Step, earlier: list[float]) -> float:
    """The median of the calls of one round, after one that brings the operands back into the caches."""
    expected = earlier[-1] if earlier else once(step)
    if expected > LONG_S:
        return once(step)
    step()
    calls = min(MOST_CALLS, max(3, math.ceil(SAMPLE_S / expected)))
    return statistics.median(once(step) for _ in range(calls))


def once(step: Step) -> float:
    start = time.perf_counter()
    kept = step()
    elapsed = time.perf_counter() - start
    del kept
    return elapsed
