"""What the demo shows at the end: a table, an answer before and after, and a plot."""

import io
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefkern.check import require
from prefkern.commands.demo.data import Refused
from prefkern.commands.demo.train import Run

PLOT, TABLE = "curves.png", "table.md"


def check_output(folder: Path) -> None:
    """Refuses a place that cannot become a folder to write into, without creating anything."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise Refused(f"cannot write into {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Refused(f"cannot write into {folder}: no permission for {existing}")


def largest_difference(theirs: Run, ours: Run) -> float:
    return max(abs(one.loss - other.loss) for one, other in zip(theirs.steps, ours.steps, strict=True))


def rows(theirs: Run, ours: Run, *, held_out: int) -> list[list[tuple[str, str, str]]]:
    """The table: sections of rows of a name, TRL's value and prefkern's."""
    runs = (theirs, ours)

    def change(kind: str, form: str) -> tuple[str, str]:
        first, second = (
            f"{format(getattr(r.before, kind), form)} → {format(getattr(r.after, kind), form)}" for r in runs
        )
        return first, second

    steps = [statistics.median(step.seconds for step in run.steps) for run in runs]
    heads = [statistics.median(step.head_seconds for step in run.steps) for run in runs]
    peaks = [float(run.head_peak) for run in runs]
    less = [f"({values[0] / values[1]:.1f} x less) " if values[1] < values[0] else "" for values in (heads, peaks)]
    return [
        [
            (f"loss on {held_out} held-out pairs", *change("loss", ".3f")),
            ("margin, chosen over rejected", *change("margin", ".2f")),
            ("accuracy", *change("accuracy", ".0%")),
        ],
        [
            ("loss curves, largest difference", "", f"{largest_difference(theirs, ours):.1e}"),
            ("head calls served by prefkern", str(theirs.prefkern_calls), str(ours.prefkern_calls)),
        ],
        [
            ("a training step (median)", f"{steps[0]:.2f} s", f"{steps[1]:.2f} s"),
            ("  of it the head (both models)", f"{heads[0]:.2f} s", f"{less[0]}{heads[1]:.2f} s"),
            ("peak memory of the head", f"{peaks[0] / 1e6:.0f} MB", f"{less[1]}{peaks[1] / 1e6:.0f} MB"),
        ],
    ]


def show(console: Console, theirs: Run, ours: Run, *, held_out: int) -> None:
    table = Table(title="DPO with TRL's DPOTrainer, same seed", title_style="bold", min_width=72)
    table.add_column("")
    table.add_column("TRL's own head", justify="right")
    table.add_column("prefkern", justify="right", style="green")
    for section in rows(theirs, ours, held_out=held_out):
        table.add_section()
        for row in section:
            table.add_row(*row)
    console.print()
    console.print(table)


def markdown(theirs: Run, ours: Run, *, held_out: int) -> str:
    """The same table for a page."""
    lines = ["| | TRL's own head | prefkern |", "| --- | ---: | ---: |"]
    for section in rows(theirs, ours, held_out=held_out):
        lines += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in section]
    return "\n".join(lines) + "\n"


def show_answers(
    console: Console, questions: Sequence[str], before: Sequence[str], after: Sequence[str], steps: int
) -> None:
    for question, old, new in zip(questions, before, after, strict=True):
        for when, text, style in (("before", old, "dim"), (f"after {steps} steps", new, "green")):
            title = Text(f"{question}  ({when}: {len(text.split())} words)")
            console.print(Panel(Text(text), title=title, title_align="left", border_style=style, width=100))


def plot(theirs: Run, ours: Run) -> bytes:
    """Loss and margin of every step, as PNG."""
    figure_module = require("matplotlib.figure", "prefkern demo", "pip install 'prefkern[demo]'")
    figure = figure_module.Figure(figsize=(10, 4), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2)
    for axes, kind, title in zip(panels, ("loss", "margin"), ("DPO loss", "margin, chosen over rejected"), strict=True):
        steps = range(1, len(ours.steps) + 1)
        their_values, our_values = ([getattr(step, kind) for step in run.steps] for run in (theirs, ours))
        axes.plot(steps, their_values, label="TRL's own head", linewidth=6, alpha=0.35)
        axes.plot(steps, our_values, label="prefkern", linewidth=1.6, marker="o", markersize=4)
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def save(folder: Path, picture: bytes, table: str) -> Path:
    """Writes plot and table, each whole or not at all; returns the plot's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((TABLE, table.encode()), (PLOT, picture)):
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
            part.write(content)
        written = Path(part.name).replace(folder / name)
    return written
