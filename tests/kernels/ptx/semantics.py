"""The table of what instructions compute: for an opcode the kinds of its operands and a function on their values.

`integers`, `floats` and `conversions` fill it. What touches memory, other lanes or the order of execution is elsewhere.
"""

from collections.abc import Callable
from typing import NamedTuple

from ptx.faults import UnknownInstruction
from ptx.registers import KINDS, Array


class Semantics(NamedTuple):
    """``result = function(*sources)``. ``results`` has two kinds where an instruction writes two predicates.

    Of an approximation, ``exact(*sources)`` is the true result in float64 and ``error(true, *sources)`` how far from it
    the manual lets the instruction be.
    """

    results: tuple[str, ...]
    sources: tuple[str, ...]
    function: Callable[..., Array]
    exact: Callable[..., Array] | None = None
    error: Callable[..., Array] | None = None


TABLE: dict[tuple[str, int], Semantics] = {}  # by opcode and number of sources


def define(
    opcode: str,
    results: str,
    sources: str,
    function: Callable[..., Array],
    exact: Callable[..., Array] | None = None,
    error: Callable[..., Array] | None = None,
) -> None:
    """Enters an instruction; kinds are separated by blanks."""
    entry = Semantics(tuple(results.split()), tuple(sources.split()), function, exact, error)
    key = opcode, len(entry.sources)
    assert key not in TABLE, key
    assert all(kind in KINDS for kind in entry.results + entry.sources), opcode
    TABLE[key] = entry


def lookup(opcode: str, sources: int) -> Semantics:
    if (opcode, sources) not in TABLE:
        raise UnknownInstruction(f"{opcode} with {sources} source operands")
    return TABLE[opcode, sources]
