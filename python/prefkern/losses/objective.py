"""What an objective is: a pure function of log-probabilities with a declared coupling.

The coupling says what the gradient of one token depends on: ``token`` (itself), ``sequence`` (its sequence), ``pair``
(its pair of sequences) or ``batch``. It is the coupling of the unreduced values: a reduction that divides by a count
of its own adds only the mask to it, and none with a given normaliser.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from prefkern.types import Coupling

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Objective(Protocol[P, R_co]):
    """A function with its declared coupling."""

    coupling: Coupling

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


OBJECTIVES: dict[str, Objective[..., Any]] = {}
"""Every declared objective, by module and name: ``preference.sigmoid``. The tests hold each to its coupling."""


def objective(coupling: Coupling) -> Callable[[Callable[P, R]], Objective[P, R]]:
    """Declares the coupling of an objective and lists it in ``OBJECTIVES``."""

    def declare(function: Callable[P, R]) -> Objective[P, R]:
        declared = cast(Objective[P, R], function)
        declared.coupling = coupling
        OBJECTIVES[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = declared
        return declared

    return declare
