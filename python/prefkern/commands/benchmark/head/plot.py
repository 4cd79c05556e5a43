"""A picture of the side-by-side: time and extra memory of every contender, one row of panels per case."""

from pathlib import Path
from typing import Any

from prefkern.check import require

INSTALL = "install it with: pip install 'prefkern[bench]'"


def check() -> None:
    """Raises `MissingDependency` before anything long is begun."""
    require("matplotlib", "the plot of the benchmark", INSTALL)


def save(results: dict[str, Any], path: Path) -> None:
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in results["cases"] if any(entry["seconds"] for entry in case["contenders"])]
    figure = Figure(figsize=(12, 0.8 + 2.2 * max(len(cases), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(len(cases), 1), 2, squeeze=False)
    for (times, memory), case in zip(axes, cases, strict=False):
        entries = [entry for entry in case["contenders"] if entry["seconds"] is not None][::-1]
        names = [entry["name"] for entry in entries]
        colors = ["tab:green" if name.startswith("prefkern") else "tab:gray" for name in names]
        medians = [1e3 * entry["seconds"]["median"] for entry in entries]
        low = [m - 1e3 * entry["seconds"]["low"] for m, entry in zip(medians, entries, strict=True)]
        high = [1e3 * entry["seconds"]["high"] - m for m, entry in zip(medians, entries, strict=True)]
        times.barh(names, medians, xerr=[low, high], color=colors, error_kw={"elinewidth": 0.8})
        if case["floor_seconds"] is not None:
            times.axvline(1e3 * case["floor_seconds"]["median"], color="black", linestyle="--", linewidth=1)
        times.set_title(f"{case['dtype']}, {case['head']} head: ms (dashed: the bare products)", fontsize=9)
        memory.barh(names, [(entry["extra_bytes"] or 0) / 1e6 for entry in entries], color=colors)
        memory.set_title("peak extra memory: MB", fontsize=9)
        memory.set_yticks([])
        for axis in (times, memory):
            axis.tick_params(labelsize=8)
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, threads {machine['threads']}"
    figure.suptitle(f"prefkern {results['versions']['prefkern']} on {where}, {results['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=120)
