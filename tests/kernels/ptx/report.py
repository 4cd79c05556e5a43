"""Shows what the library's kernels cost, as the machine counts it.

    python -m ptx.report [--target sm_90] [--columns 16384] [--markdown FILE]

A line per case: instructions of a warp for each element of a row, bytes read and written over the floor (a row counts
once for each pass that the kernel makes), the part of the sectors' bytes that warps asked for, barriers of a program,
bank conflicts, lanes that disagreed.
"""

import argparse
from pathlib import Path

from ptx import cases, device
from ptx.cases import FAST, MORE, Shape

HEADER = (
    "case",
    "instructions / element",
    "read / floor",
    "written / floor",
    "used of sectors",
    "barriers",
    "conflicts",
)


def rows(target: str, columns: int, count: int = 4) -> list[tuple[str, ...]]:
    """Returns the lines of the report."""
    machine = device.install(target)
    out: list[tuple[str, ...]] = []
    for name in FAST | MORE:
        case = cases.case(name, Shape(count, columns, True))
        machine.run.launches = []
        case.launch()
        launch = machine.run.launches[0]
        threads = 32 * sum(launch.instructions.values())
        written = f"{launch.bytes_written / case.written:.3f}" if case.written else "-"
        cells: tuple[str, ...] = (f"{threads / (count * columns):.1f}", f"{launch.bytes_read / case.read:.3f}", written)
        cells += (f"{launch.efficiency:.3f}", f"{launch.barriers / count:.1f}", str(launch.conflicts))
        out.append((name, *cells))
    return out


def table(lines: list[tuple[str, ...]]) -> str:
    """Returns the lines as Markdown."""
    ruled = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=device.TARGETS, default="sm_90")
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    text = table(rows(options.target, options.columns))
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
