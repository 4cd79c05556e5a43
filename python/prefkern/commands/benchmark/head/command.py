"""``python -m prefkern bench``."""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefkern.commands.benchmark import machine, report
from prefkern.commands.benchmark.data import command
from prefkern.commands.benchmark.head import plot
from prefkern.commands.benchmark.head.contenders import discover
from prefkern.commands.benchmark.head.floors import copy_bandwidth
from prefkern.commands.benchmark.head.operands import DTYPES, HEADS, Case, Shape
from prefkern.commands.benchmark.head.run import gate, measure, measure_pieces, passes
from prefkern.commands.benchmark.measure import Budget
from prefkern.commands.benchmark.progress import Progress, positive
from prefkern.head.engine.products import native

CPU_SHAPE = Shape(2048, 1024, 32768)
SLOW_SHAPE = Shape(128, 256, 8192)
"""Of 16-bit operands on a CPU that has no units for them, where torch's own products take minutes at the size above."""
GPU_SHAPES = (Shape(8192, 4096, 128256), Shape(8192, 896, 151936), Shape(2048, 2048, 32768))
GPU_BUDGET_S = 240.0
QUICK_SHAPE = Shape(48, 32, 257)
NUMBERS, PICTURE = "bench.json", "bench.png"
PACKAGES = ("prefkern", "torch", "triton", "trl", "transformers", "liger-kernel", "numpy")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prefkern bench",
        description="Correctness against float64 first; then time and peak memory of naive eager, TRL, Liger and "
        "prefkern on the same tensors, interleaved, beside the bare matrix products. `bench data` does the same for "
        "batching and advantages.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=positive, metavar="N", help=f"scored tokens (CPU: {CPU_SHAPE.N})")
    parser.add_argument("--hidden", type=positive, metavar="H", help=f"width (CPU: {CPU_SHAPE.H})")
    parser.add_argument("--vocab", type=positive, metavar="V", help=f"vocabulary (CPU: {CPU_SHAPE.V})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="may be given more than once")
    parser.add_argument("--repeats", type=positive, metavar="R", help="interleaved rounds (CPU: 5, CUDA: 10)")
    limit = f"begin no further round or case after S seconds (CUDA: {GPU_BUDGET_S:.0f})"
    parser.add_argument("--budget-s", type=float, metavar="S", help=limit)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: a test of the harness")
    parser.add_argument("--json", action="store_true", help="write bench.json into the output folder")
    parser.add_argument("--plot", action="store_true", help="write bench.png into the output folder")
    parser.add_argument(
        "--output", type=Path, default=Path("prefkern-bench"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def cases(given: argparse.Namespace) -> list[Case]:
    """Every dtype with every head; on a GPU by default bfloat16 over several shapes, and float32 on the smallest."""
    sizes = (given.tokens, given.hidden, given.vocab)
    if given.device == "cuda" and not given.quick and not any(sizes) and given.dtype is None:
        pairs = [(one, "bfloat16") for one in GPU_SHAPES] + [(GPU_SHAPES[-1], "float32")]
    else:
        pairs = [(_shape(given, sizes, DTYPES[name]), name) for name in given.dtype or ("float32", "bfloat16")]
    return [Case(shape, DTYPES[name], head) for shape, name in pairs for head in HEADS]


def _shape(given: argparse.Namespace, sizes: Sequence[int | None], dtype: torch.dtype) -> Shape:
    base = QUICK_SHAPE if given.quick else CPU_SHAPE if given.device == "cpu" else GPU_SHAPES[0]
    if given.device == "cpu" and not given.quick and not native(dtype):
        base = SLOW_SHAPE
    return Shape(*(size or default for size, default in zip(sizes, base, strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, 1 when prefkern fails its correctness gate (then nothing is timed), 2: wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["data"]:
        return command.main(arguments[1:])
    given = _parser().parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("prefkern bench: there is no CUDA device; leave out --device cuda to measure the CPU", file=sys.stderr)
        return 2
    if given.plot:
        plot.check()
    if given.json or given.plot:
        given.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    chosen = cases(given)
    rounds = given.repeats or (2 if given.quick else 5 if given.device == "cpu" else 10)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "versions": machine.versions(PACKAGES),
        "rounds": rounds,
    }

    budget = Budget(given.budget_s or (GPU_BUDGET_S if device.type == "cuda" else None))
    progress = Progress()
    found = discover(device)
    checked = gate(chosen, found, device, progress)
    good = all(passes(result) for result in checked)
    results |= {"gate": good, "cases": [result.as_json() for result in checked], "pieces": []}
    if not good:
        progress.done()
        for case in results["cases"]:
            report.show(report.case_table(case, timed=False))
        _write(results, given)
        print("prefkern bench: prefkern is outside its tolerance, so nothing is timed", file=sys.stderr)
        return 1

    copy = copy_bandwidth(device) if device.type == "cuda" else None
    results["copy_bytes_per_second"] = copy
    timing = budget.share(0.8)  # the rest is for the pieces
    measured = measure(checked, found, device, rounds=rounds, budget=timing, copy=copy, progress=progress)
    for index, result in enumerate(measured):
        results["cases"][index] = result.as_json()
        progress.done()
        report.show(report.case_table(results["cases"][index], timed=True))
        _write(results, given)  # after each case: an interrupted run keeps what it has
    if device.type == "cuda":
        for piece in measure_pieces(chosen[0], device, copy, budget, progress):
            results["pieces"].append(piece)
        progress.done()
        report.show(report.pieces_table(results["pieces"], copy))
        _write(results, given)
    if given.json:
        print(f"numbers: {given.output / NUMBERS}")
    if given.plot:
        plot.save(results, given.output / PICTURE)
        print(f"plot: {given.output / PICTURE}")
    return 0


def _write(results: dict[str, Any], given: argparse.Namespace) -> None:
    if given.json:
        (given.output / NUMBERS).write_text(json.dumps(results, indent=1) + "\n")
