"""``python -m prefkern demo``: fine-tune a small language model with TRL's DPOTrainer, with and without prefkern."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prefkern.check import MissingDependency
from prefkern.commands.demo import data, model
from prefkern.commands.demo.data import Refused

__all__ = ["main"]

STEPS = 12
NEEDED = ("rich", "matplotlib", "transformers", "datasets", "trl")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (python -m prefkern demo --help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m prefkern demo",
        description="Fine-tunes a language model on preference pairs with TRL's DPOTrainer, once with TRL's own head "
        "and once with prefkern's, on the CPU, and compares the two.",
    )
    parser.add_argument("--model", help=f"a Hugging Face id or a folder (default: {model.NAME}, offline)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run (default: %(default)s)")
    parser.add_argument(
        "--dataset", type=Path, default=data.SHIPPED, help="JSON lines with prompt, chosen, rejected (default: shipped)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("prefkern-demo"), help="folder for the plot (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 2, after one sentence on stderr, where what was given or installed cannot be used."""
    try:
        options = _parser().parse_args(argv)
        if options.steps < 1:
            raise Refused(f"--steps must be at least 1, got {options.steps}")
        pairs = data.read(options.dataset)
        _check_installed()
        model.check(options.model)
        from prefkern.commands.demo import report, run

        report.check_output(options.output)
        run.run(options.model, pairs, options.steps, options.output)
    except (Refused, MissingDependency) as error:
        print(f"prefkern demo: {error}", file=sys.stderr)
        return 2
    return 0


def _check_installed() -> None:
    """Before anything slow is imported."""
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name) is not None
        except ValueError:  # imports of it are blocked
            found = False
        if not found:
            raise MissingDependency(f"the demo needs {name}: pip install 'prefkern[demo]'")
