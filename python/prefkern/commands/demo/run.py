"""The demo from the loaded model to the plot, with a progress bar on every part that takes time."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from prefkern.check import require
from prefkern.commands.demo import data, model, report, train

QUESTIONS = 2


def run(name: str | None, pairs: list[data.Pair], steps: int, output: Path) -> None:
    """Everything; prints to standard output and writes the plot into ``output``."""
    began = time.monotonic()
    console = Console(file=sys.stdout)
    split = data.split(pairs, steps * train.BATCH)
    questions = [pair.prompt for pair in split.held_out[:QUESTIONS]]
    console.print(
        f"DPO on {len(split.train)} preference pairs, {len(split.held_out)} held out: "
        f"{steps} steps of {train.BATCH} pairs, twice, on the CPU"
    )
    with _silence() as terminal:
        shown = Console(file=terminal)
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=shown, redirect_stdout=False, redirect_stderr=False) as progress:
            task = progress.add_task(f"load {name or model.NAME}", total=2)
            for module in ("transformers", "datasets", "trl"):
                require(module, "prefkern demo", "pip install 'prefkern[demo]'")
            _quiet_libraries()
            progress.advance(task)
            loaded = model.load(name)
            progress.advance(task)

            before = []
            task = progress.add_task("answers before training", total=len(questions))
            for question in questions:
                before.append(model.answer(loaded, loaded.model, question))
                progress.advance(task)

            def trained(label: str, with_prefkern: bool, asked: list[str]) -> train.Run:
                task = progress.add_task(label, total=train.work(split, steps, len(asked)))
                return train.train(
                    loaded,
                    split,
                    steps=steps,
                    with_prefkern=with_prefkern,
                    questions=asked,
                    on_progress=lambda: progress.advance(task),
                )

            theirs = trained("train with TRL's own head", False, [])
            ours = trained("train with prefkern, and answer", True, questions)
    held_out = len(split.held_out)
    path = report.save(output, report.plot(theirs, ours), report.markdown(theirs, ours, held_out=held_out))
    report.show(console, theirs, ours, held_out=held_out)
    report.show_answers(console, questions, before, ours.answers, steps)
    console.print(f"\nplot: {path}   ({time.monotonic() - began:.0f} s in all)", highlight=False)


@contextlib.contextmanager
def _silence() -> Iterator[IO[str]]:
    """Keeps what libraries print off the screen; yields the terminal for the progress bars."""
    terminal = sys.stdout
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield terminal


def _quiet_libraries() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in ("transformers.utils.logging", "datasets.utils.logging"):
        logging = require(name, "prefkern demo", "pip install 'prefkern[demo]'")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
