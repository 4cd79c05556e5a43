"""The order of events: the gate for every case, then memory, then interleaved time."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from prefkern.commands.benchmark.head import pieces
from prefkern.commands.benchmark.head.accuracy import case_values, errors, tolerance
from prefkern.commands.benchmark.head.contenders import OURS, Contender, Forward, one_line, run
from prefkern.commands.benchmark.head.floors import FLOOR, bare_products, tile_bytes
from prefkern.commands.benchmark.head.operands import Case, Operands, make_operands
from prefkern.commands.benchmark.head.results import CaseResult, Entry, piece_as_json
from prefkern.commands.benchmark.measure import OUT_OF_TIME, Budget, Step, interleave, peak_extra_bytes
from prefkern.head.engine.products import count_products

Progress = Callable[[str, str], None]
"""Told the case, and what is being done in it."""


def gate(cases: list[Case], found: list[Contender], device: torch.device, progress: Progress) -> list[CaseResult]:
    """Every contender once in every case, against float64. Log-probabilities of one shape share a truth."""
    results = []
    operands: Operands | None = None
    last: tuple[Any, ...] | None = None
    for number, case in enumerate(cases, 1):
        label = f"gate {number}/{len(cases)}: {case}"
        key = (case.shape, case.dtype, case.head == "cross-entropy")
        if operands is None or key != last:
            progress(label, "the float64 truth")
            operands = truth = None  # frees the last ones first
            operands = make_operands(case.shape, case.dtype, device)
            truth = case_values(operands, case, torch.float64)
            limits = tolerance(operands, case, truth)
        last = key
        assert truth is not None
        entries = []
        for contender in found:
            if not contender.runs(case):
                continue
            progress(label, contender.name)
            entries.append(_check(contender, operands, case, truth))
        results.append(CaseResult(case, limits, entries))
    return results


def _check(contender: Contender, operands: Operands, case: Case, truth: Any) -> Entry:
    """A peer that fails is reported with its reason; so is prefkern, and then it does not pass."""
    forward = contender.of(case)
    if forward is None:
        return Entry(contender.name, contender.note)
    counted = None
    try:
        with count_products() as counter:
            values = run(forward, operands, case)
        if contender.name.startswith(OURS):
            counted = counter.products(*case.shape)
        return Entry(contender.name, contender.note, errors(values, truth), products=counted)
    except Exception as error:
        return Entry(contender.name, f"failed: {one_line(error)}")


def passes(result: CaseResult) -> bool:
    """Whether all of prefkern's entries are within the tolerance."""
    ours = [entry for entry in result.entries if entry.name.startswith(OURS)]
    return bool(ours) and all(entry.errors is not None and entry.errors.within(result.tolerance) for entry in ours)


def measure(
    checked: list[CaseResult],
    found: list[Contender],
    device: torch.device,
    *,
    rounds: int,
    budget: Budget,
    copy: float | None,
    progress: Progress,
) -> Iterator[CaseResult]:
    """Memory and time of every contender that ran in the gate, case by case. ``copy`` is the bandwidth of a copy."""
    for number, result in enumerate(checked, 1):
        share = budget.share(1 / (len(checked) - number + 1))
        if share.left() <= 0:
            yield result._replace(entries=[entry._replace(note=OUT_OF_TIME) for entry in result.entries])
            continue
        forwards = {contender.name: contender.of(result.case) for contender in found}
        operands = make_operands(result.case.shape, result.case.dtype, device)
        label = f"case {number}/{len(checked)}: {result.case}"
        yield _Session(result, operands, forwards, device, label, progress).measure(rounds, share, copy)
        del operands
        gc.collect()


class _Session(NamedTuple):
    """One case while it is measured."""

    result: CaseResult
    operands: Operands
    forwards: dict[str, Forward | None]
    device: torch.device
    label: str
    progress: Progress

    def measure(self, rounds: int, budget: Budget, copy: float | None) -> CaseResult:
        case = self.result.case
        entries, steps = self._memory()
        steps[FLOOR] = bare_products(self.operands, case)
        steps[FLOOR]()

        def on_round(number: int) -> None:
            self.progress(self.label, f"round {number} of {rounds}")

        times = interleave(steps, self.device, rounds=rounds, budget=budget, on_round=on_round)
        floor = times.pop(FLOOR)
        entries = [entry._replace(time=times.get(entry.name)) for entry in entries]
        combined = None if copy is None else floor.median + tile_bytes(case) / copy
        return self.result._replace(entries=entries, floor=floor, combined=combined)

    def _memory(self) -> tuple[list[Entry], dict[str, Step]]:
        """Peak extra memory of all that ran in the gate, and the steps that can be timed."""
        entries: list[Entry] = []
        steps: dict[str, Step] = {}
        for entry in self.result.entries:
            forward = self.forwards[entry.name]
            if forward is None or entry.errors is None:
                entries.append(entry)
                continue
            self.progress(self.label, f"memory of {entry.name}")
            step = partial(run, forward, self.operands, self.result.case)
            try:
                entries.append(entry._replace(extra_bytes=peak_extra_bytes(step, self.device)))
                steps[entry.name] = step
            except RuntimeError as error:  # out of memory
                entries.append(entry._replace(note=f"failed: {one_line(error)}"))
        return entries, steps


def measure_pieces(
    case: Case, device: torch.device, copy: float | None, budget: Budget, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The row kernels and the products on a CUDA device, at the first case's shape."""
    from prefkern.kernels.triton import logprobs

    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    for source in (
        pieces.row_kernels(logprobs, case.shape, dtype, device, budget),
        pieces.fold_kernels(logprobs, case.shape, dtype, device, budget),
        pieces.products(case.shape, dtype, device, budget),
    ):
        for piece in source:
            progress("pieces", f"{piece.name} {piece.shape}")
            yield piece_as_json(piece, copy)
