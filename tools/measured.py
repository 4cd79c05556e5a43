"""Writes the measured tables into README.md and the pages of docs/ that show some, between their markers,
``<!-- begin: NAME -->``.

Sources: ``bench/results/cpu/bench.json`` and, where there is one, ``bench/results/gpu/bench.json``
(``python -m prefkern bench --json``), ``bench/results/data/bench.json`` (``python -m prefkern bench data --json``),
``bench/results/mutants.md`` (``tools/mutants.py --markdown``), ``bench/results/compile.md`` (``tools/compile_report.py
--markdown``), ``bench/results/demo.md`` (the ``table.md`` of
``python -m prefkern demo``), ``bench/results/cpu-head.md``
(``bench/cpu_head.py --markdown``), ``bench/results/divergence.md`` (``bench/divergence.py --markdown``),
``bench/results/engine.md`` (``bench/engine.py --markdown``),
``bench/results/ppo-*.md`` (``bench/ppo.py``) and ``bench/results/ppo-example/``
(``examples/ppo.py``).
``--check`` writes nothing and fails where a file would change.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from prefkern.commands.benchmark.data.command import goal_text
from prefkern.commands.benchmark.report import si_bytes, si_seconds

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SHOWN = ("naive eager", "naive eager, 16-bit", "TRL", "Liger", "prefkern")


def table(columns: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, align, *rows))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def case_rows(case: dict[str, Any], names: tuple[str, ...]) -> list[list[str]]:
    rows = []
    for entry in case["contenders"]:
        if entry["seconds"] is None or not entry["name"].startswith(names):
            continue
        errors = entry["errors"]
        rows.append(
            [
                entry["name"] if entry["name"] != "prefkern" else "**prefkern**",
                si_seconds(entry["seconds"]["median"]),
                _cell(entry["times_eager"], ".2f"),
                _cell(entry["times_floor"], ".2f"),
                "-" if entry["extra_bytes"] is None else si_bytes(entry["extra_bytes"]),
                _cell(errors["logps"], ".0e"),
                _cell(errors["grad_hidden"], ".0e"),
                _cell(errors["grad_weight"], ".0e"),
                _cell(entry["products"], ".3g"),
            ]
        )
    return rows


COLUMNS = [
    "",
    "time",
    "x eager",
    "x bare products",
    "extra memory",
    "log-prob error",
    "grad hidden",
    "grad weight",
    "products",
]


def about(results: dict[str, Any]) -> str:
    machine = f"{results['machine']['processor']}, {results['machine']['cores']} cores, {results['machine']['device']}"
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if value)
    return f"{results['date'][:10]}; {machine}; {versions}; medians of {results['rounds']} interleaved rounds."


def full_tables(results: dict[str, Any]) -> str:
    parts = [about(results)]
    for case in results["cases"]:
        floor = case["floor_seconds"]
        title = f"**{case['dtype']}, {case['head']}**: N = {case['tokens']}, H = {case['hidden']}, V = {case['vocab']}"
        if floor is not None:
            title += f"; {case['floor_products']} bare products: {si_seconds(floor['median'])}"
        parts += [title, table(COLUMNS, case_rows(case, SHOWN))]
    return "\n\n".join(parts)


def readme_table(results: dict[str, Any]) -> str:
    """The trainable and the frozen head, both dtypes, without the gradient columns."""
    keep = [0, 1, 2, 4, 5, 8]
    rows = []
    shape = results["cases"][0]
    for case in (case for case in results["cases"] if case["head"] in ("trainable", "frozen")):
        title = f"{case['dtype']}, {case['head']}"
        if case["tokens"] != shape["tokens"]:
            title += f", N = {case['tokens']}, H = {case['hidden']}, V = {case['vocab']}"
        rows.append([f"*{title}*", *[""] * (len(keep) - 1)])
        rows += [[row[i] for i in keep] for row in case_rows(case, ("naive eager", "TRL", "Liger", "prefkern"))]
    intro = (
        f"Log-probabilities and their backward, N = {shape['tokens']}, H = {shape['hidden']}, V = {shape['vocab']}, "
        f"per-token upstream gradient. {about(results)}"
    )
    return intro + "\n\n" + table([COLUMNS[i] for i in keep], rows)


def pieces_table(results: dict[str, Any]) -> str:
    rows = []
    for piece in results["pieces"]:
        if piece["seconds"] is None:
            continue
        rate = f"{piece['rate'] / 1e9:.0f} GB/s" if piece["unit"] == "B/s" else f"{piece['rate'] / 1e12:.0f} TFLOP/s"
        share = "-" if piece["share_of_copy"] is None else f"{100 * piece['share_of_copy']:.0f} %"
        rows.append([piece["name"], piece["shape"], si_seconds(piece["seconds"]["median"]), rate, share])
    return table(["piece", "shape", "time", "rate", "of copy bandwidth"], rows)


def data_tables(results: dict[str, Any]) -> str:
    """Every case of the data benchmark: the contenders, then what was aimed at and whether it was reached."""
    parts = [about(results)]
    for area in dict.fromkeys(case["area"] for case in results["cases"]):
        rows, goals = [], []
        for case in (case for case in results["cases"] if case["area"] == area):
            name = f"{case['name']}, {case['size']}"
            rows.append([f"*{name}*", "", "", ""])
            for entry in case["contenders"]:
                if entry["seconds"] is None:
                    rows.append([f"{entry['name']}: {entry['note']}", "", "", ""])
                    continue
                title = f"**{entry['name']}**" if entry["name"].startswith("prefkern") else entry["name"]
                time = si_seconds(entry["seconds"]["median"])
                rows.append([title, time, _cell(entry["times_floor"], ".3g"), _cell(entry["times_ours"], ".3g")])
            goals += [f"- {name}: {goal_text(goal)}" for goal in case["goals"]]
        parts += [f"**{area}**", table(["", "time", "x floor", "x prefkern"], rows), "\n".join(goals)]
    return "\n\n".join(parts)


PPO = ("ppo-step", "ppo-batches", "ppo-learning", "ppo-example/report")


def sections() -> dict[str, str]:
    found: dict[str, str] = {}
    cpu, gpu = RESULTS / "cpu" / "bench.json", RESULTS / "gpu" / "bench.json"
    if cpu.exists():
        results = json.loads(cpu.read_text())
        found |= {"head-cpu": readme_table(results), "head-cpu-full": full_tables(results)}
    if gpu.exists():
        results = json.loads(gpu.read_text())
        found |= {"head-gpu-full": full_tables(results), "pieces-gpu": pieces_table(results)}
    data = RESULTS / "data" / "bench.json"
    if data.exists():
        found["data"] = data_tables(json.loads(data.read_text()))
    for name in ("mutants", "compile", "demo", "cpu-head", "divergence", "engine", "architectures", *PPO):
        path = RESULTS / f"{name}.md"
        if path.exists():
            found[name.removesuffix("/report")] = path.read_text().strip()
    return found


def fill(text: str, found: dict[str, str]) -> str:
    for name, body in found.items():
        pattern = re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a file would change; write nothing")
    check = parser.parse_args().check
    found, stale = sections(), []
    pages = (ROOT / "docs" / f"{name}.md" for name in ("measured", "cpu-head", "models"))
    for path in (ROOT / "README.md", *pages):
        old = path.read_text()
        new = fill(old, found)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
