"""``python -m prefkern COMMAND``: every command is a module, imported only when it is chosen."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import prefkern
from prefkern.check import MissingDependency

COMMANDS = {
    "demo": (f"{__name__}.demo", "fine-tune a small language model with TRL's DPOTrainer, with and without prefkern"),
    "bench": (f"{__name__}.benchmark", "time naive eager, TRL, Liger and prefkern side by side on the same tensors"),
    "plan": (f"{__name__}.plan", "products, memory and time of the head for given shapes, as a table"),
    "doctor": (f"{__name__}.doctor", "what is installed, which implementation runs for each operator, and why"),
}
USAGE, INTERRUPTED = 2, 130


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m prefkern",
        description="Losses for preference and policy optimisation of language models.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prefkern {prefkern.__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=f"one of: {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options (COMMAND --help)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for wrong usage or a missing package, 130 after Ctrl-C."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    if given.command not in COMMANDS:
        print(f"prefkern: there is no command {given.command!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE
    try:
        code: int = importlib.import_module(COMMANDS[given.command][0]).main(given.arguments)
    except MissingDependency as error:
        print(f"prefkern: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("\nprefkern: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code
