"""What the head costs: its seconds inside the training steps, and the peak of its allocations alone."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors allocated during ``work`` occupy at one moment (CPU)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports on stderr that it finds no GPU
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    changes = sorted((event["ts"], int(event["args"]["Bytes"])) for event in events if event["name"] == "[memory]")
    # summed here: the profiler's own total runs on from one recording to the next
    return max(accumulate((change for _, change in changes), initial=0))


class HeadClock:
    """Stands around whatever computes TRL's log-probabilities: counts its calls and seconds, forward and backward, and
    remembers the inputs of the first call with a gradient."""

    def __init__(self, utils: Any, on_call: Callable[[], None]) -> None:
        self.calls = 0
        self.seconds = 0.0
        self._utils = utils
        self._on_call = on_call
        self._began = 0.0
        self._inputs: tuple[Any, ...] | None = None

    def __enter__(self) -> "HeadClock":
        self._head = self._utils._ChunkedLogProbFunction
        self._utils._ChunkedLogProbFunction = self
        return self

    def __exit__(self, *_: object) -> None:
        self._utils._ChunkedLogProbFunction = self._head

    def apply(self, hidden: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        """Called by TRL in the head's place."""
        begin = time.perf_counter()
        results: tuple[Any, ...] = self._head.apply(hidden, *others)
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        if results[0].requires_grad:
            if self._inputs is None:
                self._inputs = (hidden.detach().clone(), *others)
            # the gradient of the log-probabilities arrives before the head's backward, that of `hidden` after it
            results[0].register_hook(self._backward_begins)
            hidden.register_hook(self._backward_ends)  # type: ignore[no-untyped-call]
        self._on_call()
        return results

    def _backward_begins(self, gradient: Tensor) -> None:
        self._began = time.perf_counter()

    def _backward_ends(self, gradient: Tensor) -> None:
        self.seconds += time.perf_counter() - self._began

    def peak_bytes(self) -> int:
        """The peak of one forward and backward of the head on the remembered inputs, beyond these inputs."""
        assert self._inputs is not None
        hidden, weight, *others = self._inputs
        leaves = (hidden.requires_grad_(), weight.detach().requires_grad_())

        def step() -> object:
            logps = self._head.apply(*leaves, *others)[0]
            return torch.autograd.grad(logps.sum(), leaves)

        return peak_bytes(step)
