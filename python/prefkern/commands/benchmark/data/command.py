"""``python -m prefkern bench data``: the Rust core beside its peers and beside what the memory allows."""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefkern.commands.benchmark import machine, report
from prefkern.commands.benchmark.data.cases import areas
from prefkern.commands.benchmark.data.cases.case import DataCase
from prefkern.commands.benchmark.data.plot import PICTURE, growth_plot
from prefkern.commands.benchmark.data.run import measure
from prefkern.commands.benchmark.progress import Progress, positive

NUMBERS = "bench.json"
PACKAGES = ("prefkern", "torch", "numpy", "pyarrow", "trl", "transformers")
ROUNDS, QUICK_ROUNDS = 15, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prefkern bench data",
        description="Batching and advantages on the CPU: correctness first, then times, interleaved with the peers' "
        "and with a copy of the same memory.",
    )
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose area or name contains TEXT")
    parser.add_argument("--rounds", type=positive, metavar="R", help=f"interleaved rounds (default: {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: a test of the harness")
    parser.add_argument("--json", action="store_true", help="write bench.json into the output folder")
    parser.add_argument("--plot", action="store_true", help="write growth.png into the output folder")
    parser.add_argument(
        "--output", type=Path, default=Path("prefkern-bench"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def chosen(only: Sequence[str] | None, *, quick: bool) -> list[tuple[str, DataCase]]:
    pairs = [(area, case) for area, cases in areas().items() for case in cases if case.quick == quick]
    return [pair for pair in pairs if not only or any(text in f"{pair[0]} {pair[1].name}" for text in only)]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, 1 when a result of prefkern is wrong (that case is not timed), 2: wrong usage."""
    given = _parser().parse_args(argv)
    cases = chosen(given.only, quick=given.quick)
    if not cases:
        print(f"prefkern bench data: no case contains {' or '.join(given.only or [])!r}", file=sys.stderr)
        return 2
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(PACKAGES),
        "rounds": rounds,
        "cases": [],
    }
    if given.json or given.plot:
        given.output.mkdir(parents=True, exist_ok=True)
    progress, wrong = Progress(), []
    for number, (area, case) in enumerate(cases, 1):
        label = f"case {number}/{len(cases)}: {case.name} {case.size}"
        found = measure(case, rounds=rounds, on_round=partial(_show_round, progress, label, rounds))
        if found.wrong is not None:
            wrong.append(f"{case.name} {case.size}: {found.wrong}")
        results["cases"].append({"area": area, **found.as_json()})
        progress.done()
        report.show(table(results["cases"][-1]))
        if given.json:  # after each case: an interrupted run keeps what it has
            (given.output / NUMBERS).write_text(json.dumps(results, indent=1) + "\n")
    if given.json:
        print(f"numbers: {given.output / NUMBERS}")
    if given.plot and growth_plot(results["cases"], given.output / PICTURE):
        print(f"plot: {given.output / PICTURE}")
    for text in wrong:
        print(f"prefkern bench data: not timed, {text}", file=sys.stderr)
    return int(bool(wrong))


def _show_round(progress: Progress, label: str, rounds: int, number: int) -> None:
    progress(label, f"round {number} of {rounds}")


def table(case: dict[str, Any]) -> report.Table:
    rows: list[list[str]] = []
    for entry in case["contenders"]:
        if entry["seconds"] is None:
            rows.append([entry["name"], entry["note"]])
            continue
        ratios = [report.ratio(entry["times_floor"]), report.ratio(entry["times_ours"])]
        rows.append([entry["name"], *report.spread(entry["seconds"]), *ratios])
    rows += [["goal", goal_text(goal)] for goal in case["goals"]]
    title = f"{case['name']}, {case['size']}"
    return report.Table(title, ["contender", "time", "spread", "x floor", "x prefkern"], rows)


def goal_text(goal: dict[str, Any]) -> str:
    """``<= 1.3 x floor: 1.21, met``."""
    plus = f" + {report.si_seconds(goal['plus'])}" if goal["plus"] else ""
    if goal["factor"] >= 1:
        bound, got = f"<= {goal['factor']:g} x {goal['of']}{plus}", goal["ratio"]
    else:
        bound = f">= {1 / goal['factor']:.3g} x faster than {goal['of']}{plus}"
        got = None if goal["ratio"] is None else 1 / goal["ratio"]
    who = "" if goal["contender"] == "prefkern" else f"{goal['contender']}: "
    state = "not measured" if got is None else f"{got:.3g}, {'met' if goal['met'] else 'missed'}"
    return f"{who}{bound}: {state}"
