"""Clocks, peak memory, interleaved rounds and a budget of time."""

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Sequence[Tensor]]
"""One piece of work; what it returns is kept until the clock has stopped."""


OUT_OF_TIME = "not timed: out of time"


class Spread(NamedTuple):
    """Seconds of all runs and their median, smallest and largest."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @staticmethod
    def of(runs: Sequence[float]) -> "Spread":
        return Spread(statistics.median(runs), min(runs), max(runs), tuple(runs))


class Budget:
    """Seconds that may be spent; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def share(self, part: float) -> "Budget":
        """A part of what is left."""
        return Budget(None if self._end is None else self.left() * part)


def seconds(step: Step, device: torch.device) -> float:
    """Of one run: device events on an accelerator, the monotonic clock elsewhere."""
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        kept = step()
        end.record()
        torch.cuda.synchronize(device)
        elapsed = begin.elapsed_time(end) / 1e3
    else:
        start = time.perf_counter()
        kept = step()
        elapsed = time.perf_counter() - start
    del kept
    return float(elapsed)


def interleave(
    steps: Mapping[str, Step], device: torch.device, *, rounds: int, budget: Budget, on_round: Callable[[int], None]
) -> dict[str, Spread]:
    """A B C D, A B C D, ...: a drift of the machine meets all alike. At least three rounds (fewer if fewer are asked
    for), and no further round is begun when the budget is spent."""
    runs: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for done in range(rounds):
        if done >= 3 and budget.left() <= 0:
            break
        on_round(done + 1)
        for name, step in steps.items():
            runs[name].append(seconds(step, device))
    return {name: Spread.of(times) for name, times in runs.items()}


def time_repeated(step: Step, device: torch.device, *, repeats: int = 10, warmup: int = 2) -> Spread:
    """One piece of work alone, after some runs that are not counted."""
    for _ in range(warmup):
        step()
    return Spread.of([seconds(step, device) for _ in range(repeats)])


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory in use at one moment of ``step`` beyond what was there before and what it returns.

    From the allocators: the device's own statistics, or on the CPU the allocations that the profiler records (scratch
    that a mathematics library takes for itself is in neither).
    """
    if device.type == "cuda":
        step()  # workspaces that are kept for good are taken by the first run
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports that it finds no GPU
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = step()
        peak = _peak(recorded)
    return peak - sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _peak(recorded: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], int(event["args"]["Bytes"])) for event in events if event.get("name") == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)
