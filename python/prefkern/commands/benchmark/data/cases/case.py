"""What a case of the data benchmark is made of."""

from collections.abc import Callable
from typing import NamedTuple

OURS = "prefkern"
FLOOR = "floor"

Step = Callable[[], object]
"""One call of one contender; what it returns is kept until the clock has stopped."""


class Goal(NamedTuple):
    """``contender`` takes at most ``factor`` times the time of ``of`` (one more, or `FLOOR`) and ``plus`` seconds."""

    of: str
    factor: float
    plus: float = 0.0
    contender: str = OURS

    def met(self, seconds: float, of: float) -> bool:
        return seconds <= self.factor * of + self.plus


class Prepared(NamedTuple):
    """A case with its operands made.

    ``steps`` are timed in this order, round after round. ``check`` runs first and says what is wrong with prefkern's
    result, or None: a case that is wrong is not timed. ``floor`` names the steps of which the fastest is the floor.
    ``missing`` says why a contender is not among the steps.
    """

    steps: dict[str, Step]
    check: Callable[[], str | None]
    floor: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()
    missing: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default is never written to


class DataCase(NamedTuple):
    """``prepare`` makes the operands when the case's turn comes, so that one case's memory is held at a time."""

    name: str
    size: str
    prepare: Callable[[], Prepared]
    quick: bool = False
    """Small enough for a test of the harness: ``--quick`` runs these cases and no others, which run without it."""
