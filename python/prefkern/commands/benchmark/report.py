"""Tables of the results: with rich where it is installed, else aligned text."""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """``rows`` have one cell per column; a row of two cells is a name and a remark across the rest."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def show(table: Table) -> None:
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        print(plain(table))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    drawn = RichTable(title=escape(table.title), title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    remarks = []
    for row in table.rows:
        if len(row) == len(table.columns):
            style = "bold" if row[0] == "prefkern" else None
            drawn.add_row(*(escape(cell) for cell in row), style=style)
        else:
            remarks.append(f"  {row[0]}: {row[1]}")
    console = Console()
    console.print(drawn)
    for remark in remarks:
        console.print(escape(remark), style="dim")


def plain(table: Table) -> str:
    full = [row for row in table.rows if len(row) == len(table.columns)]
    widths = [max(len(row[i]) for row in [table.columns, *full]) for i in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths)))  # noqa: B905
        return "  ".join([first, *rest]).rstrip()

    lines = [table.title, line(table.columns), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    lines += [line(row) if len(row) == len(table.columns) else f"{row[0]}: {row[1]}" for row in table.rows]
    return "\n".join(lines) + "\n"


def case_table(result: dict[str, Any], *, timed: bool) -> Table:
    """One case: time, extra memory, errors and products of every contender. Untimed: the errors alone."""
    title = f"{result['dtype']}, {result['head']} head, N={result['tokens']} H={result['hidden']} V={result['vocab']}"
    errors = ["log-prob error", "grad hidden", "grad weight"]
    rows: list[list[str]] = []
    for entry in result["contenders"]:
        found = entry["errors"]
        if found is None or (timed and entry["seconds"] is None):
            rows.append([entry["name"], entry["note"]])
            continue
        cells = [_error(found[field]) for field in ("logps", "grad_hidden", "grad_weight")]
        if timed:
            products = "-" if entry["products"] is None else f"{entry['products']:.2f}"
            extra = "-" if entry["extra_bytes"] is None else si_bytes(entry["extra_bytes"])
            time = [*spread(entry["seconds"]), ratio(entry["times_eager"]), ratio(entry["times_floor"]), extra]
            cells = [*time, *cells, products]
        rows.append([entry["name"], *cells])
    limits = [_error(result["tolerance"][field]) for field in ("logps", "grad_hidden", "grad_weight")]
    if not timed:
        return Table(title, ["errors against float64", *errors], [*rows, ["prefkern may have", *limits]])
    floor = result["floor_seconds"]
    if floor is not None:
        eager = result["eager_seconds"]
        over_eager = ratio(None if eager is None else floor["median"] / eager)
        name = f"{result['floor_products']} bare product{'s' if result['floor_products'] > 1 else ''}"
        rows.append([name, *spread(floor), over_eager, "1.00", "-", "-", "-", "-", f"{result['floor_products']:.2f}"])
        if result["combined_floor_seconds"] is not None:
            combined = result["combined_floor_seconds"]
            over = f"{combined / floor['median']:.2f}"
            rows.append(["with the tile's bytes", si_seconds(combined), "-", "-", over, *"-----"])
    columns = ["contender", "time", "spread", "x eager", "x floor", "extra memory", *errors, "products"]
    return Table(title, columns, rows)


def pieces_table(pieces: Sequence[dict[str, Any]], copy: float | None) -> Table:
    title = "Pieces" if copy is None else f"Pieces (a copy moves {copy / 1e12:.2f} TB/s, read and written)"
    rows = []
    for piece in pieces:
        if piece["seconds"] is None:
            rows.append([f"{piece['name']} {piece['shape']}", piece["note"]])
            continue
        bandwidth = piece["unit"] == "B/s"
        rate = f"{piece['rate'] / 1e9:.0f} GB/s" if bandwidth else f"{piece['rate'] / 1e12:.1f} TFLOP/s"
        share = "-" if piece["share_of_copy"] is None else f"{100 * piece['share_of_copy']:.0f} %"
        rows.append([piece["name"], piece["shape"], *spread(piece["seconds"]), rate, share, _error(piece["error"])])
    return Table(title, ["piece", "shape", "time", "spread", "rate", "of copy", "error"], rows)


def si_seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def si_bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def spread(seconds: dict[str, Any]) -> tuple[str, str]:
    """The median, and how far the extremes lie from it in percent."""
    median = seconds["median"]
    below, above = 100 * (1 - seconds["low"] / median), 100 * (seconds["high"] / median - 1)
    return si_seconds(median), f"-{below:.0f} +{above:.0f} %"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
