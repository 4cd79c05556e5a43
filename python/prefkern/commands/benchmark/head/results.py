"""What was measured, as data: `as_json` is what the file holds and what the tables and the plot are made of."""

from typing import Any, NamedTuple

from prefkern.commands.benchmark.head.accuracy import Errors
from prefkern.commands.benchmark.head.contenders import EAGER
from prefkern.commands.benchmark.head.operands import Case
from prefkern.commands.benchmark.head.pieces import Piece
from prefkern.commands.benchmark.measure import Spread


class Entry(NamedTuple):
    """One contender in one case. ``time`` and what follows are None until measured; ``note`` says what ran, or why
    nothing did."""

    name: str
    note: str
    errors: Errors | None = None
    time: Spread | None = None
    extra_bytes: int | None = None
    products: float | None = None

    def as_json(self, eager: Spread | None, floor: Spread | None) -> dict[str, Any]:
        time = self.time
        return {
            "name": self.name,
            "note": self.note,
            "errors": None if self.errors is None else self.errors._asdict(),
            "seconds": None if time is None else time._asdict(),
            "extra_bytes": self.extra_bytes,
            "products": self.products,
            "times_eager": None if time is None or eager is None else time.median / eager.median,
            "times_floor": None if time is None or floor is None else time.median / floor.median,
        }


class CaseResult(NamedTuple):
    """All entries of a case. ``floor``: the time of the bare products; ``combined``: and of the tile at copy speed."""

    case: Case
    tolerance: Errors
    entries: list[Entry]
    floor: Spread | None = None
    combined: float | None = None

    def as_json(self) -> dict[str, Any]:
        eager = next((entry.time for entry in self.entries if entry.name == EAGER), None)
        return {
            "dtype": self.case.dtype_name,
            "head": self.case.head,
            "tokens": self.case.shape.N,
            "hidden": self.case.shape.H,
            "vocab": self.case.shape.V,
            "tolerance": self.tolerance._asdict(),
            "eager_seconds": None if eager is None else eager.median,
            "floor_products": self.case.products,
            "floor_seconds": None if self.floor is None else self.floor._asdict(),
            "combined_floor_seconds": self.combined,
            "contenders": [entry.as_json(eager, self.floor) for entry in self.entries],
        }


def piece_as_json(piece: Piece, copy: float | None) -> dict[str, Any]:
    """A kernel's rate also as a share of the copy bandwidth."""
    share = piece.rate / copy if piece.rate is not None and copy is not None and piece.unit == "B/s" else None
    return {
        "name": piece.name,
        "shape": piece.shape,
        "amount": piece.amount,
        "unit": piece.unit,
        "seconds": None if piece.time is None else piece.time._asdict(),
        "rate": piece.rate,
        "share_of_copy": share,
        "error": piece.error,
        "note": piece.note,
    }
