"""The growth of batching with the number of tokens, as a picture."""

from pathlib import Path
from typing import Any

from prefkern.commands.benchmark.data.cases.case import OURS
from prefkern.commands.benchmark.head import plot

GROWTH = "growth"
PICTURE = "growth.png"


def growth_plot(cases: list[dict[str, Any]], path: Path) -> bool:
    """Writes the picture of the growth cases that were measured; False where there are fewer than two."""
    points: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        if case["name"] != GROWTH or case["wrong"] is not None:
            continue
        tokens = int(case["size"].removesuffix(" tokens").replace(" ", ""))
        for entry in case["contenders"]:
            if entry["seconds"] is not None:
                points.setdefault(entry["name"], []).append((tokens, entry["seconds"]["median"]))
    if max(map(len, points.values()), default=0) < 2:
        return False
    plot.check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, line in points.items():
        axes.loglog(*zip(*line, strict=True), "o-", label=name)
    tokens, seconds = points[OURS][-1]
    grown = [count for count, _ in points[OURS]]
    axes.loglog(grown, [seconds * count / tokens for count in grown], ":", color="grey", label="linear")
    axes.set(title="flatten, from an Arrow array", xlabel="tokens", ylabel="seconds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True
