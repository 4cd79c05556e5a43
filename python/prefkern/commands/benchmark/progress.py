"""What the benchmark commands share: a line of progress, and a type of argument."""

import argparse
import sys


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line for each case."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, label: str, detail: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{label}: {detail}", end="", file=sys.stderr, flush=True)
        elif label != self._last:
            print(label, file=sys.stderr, flush=True)
        self._last = label

    def done(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
