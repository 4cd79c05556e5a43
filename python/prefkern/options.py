"""Options written once: a NamedTuple of names, types, ranges and defaults, which travels from the door to the kernel.

    class KTO(NamedTuple):
        beta: Annotated[float, above(0.0)] = 0.1
        reduction: Literal["mean", "sum", "none"] = "mean"

    @takes(KTO)
    def kto_loss(logps: Tensor, **options: Unpack[KTOOptions]) -> LossOutput:
        kto = read("kto_loss", options, KTO)

`read` refuses an unknown name with the nearest known one, and values outside their ranges; `takes` shows every option
to ``help()`` and to notebooks. The ``TypedDict`` beside each class (``KTOOptions``) has the same names and types for
type checkers, to which a NamedTuple cannot be unpacked; a test compares the two.
"""

import difflib
import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints, overload

from prefkern import check

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
Function = TypeVar("Function", bound=Callable[..., Any])


class Range(NamedTuple):
    """The finite numbers that an option may be."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False


def above(low: float) -> Range:
    """Returns the numbers greater than ``low``."""
    return Range(low, open_low=True)


def at_least(low: float) -> Range:
    """Returns the numbers not less than ``low``."""
    return Range(low)


def within(low: float, high: float) -> Range:
    """Returns the numbers from ``low`` to ``high``, both included."""
    return Range(low, high)


FINITE = Range()


class _Rule(NamedTuple):
    """How one option is checked: against a range, or against the literals that it may be; None is legal or not."""

    name: str
    range: Range | None
    literals: tuple[Any, ...]
    optional: bool


_RULES: dict[type, tuple[_Rule, ...]] = {}
"""The rules of every class that `takes` has seen: read under compilation, where type hints cannot be."""


def _rule(name: str, hint: Any) -> _Rule | None:
    range_ = None
    if get_origin(hint) is Annotated:
        hint, range_ = get_args(hint)[:2]
    members = get_args(hint) if get_origin(hint) is not Literal else ()
    words = [get_args(part) for part in (hint, *members) if get_origin(part) is Literal]
    others = {part for part in members if get_origin(part) is not Literal} - {type(None)}
    literals = words[0] if words and not others else ()  # beside other types, its class checks it
    rule = _Rule(name, range_, literals, type(None) in members)
    return rule if range_ is not None or literals else None


def takes(*kinds: type[Any], omit: Collection[str] = ()) -> Callable[[Function], Function]:
    """Marks a function whose ``**options`` are the fields of these classes (less ``omit``) and shows them in its
    ``__signature__``, keyword-only, with their types and defaults."""
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        _RULES[kind] = tuple(rule for name, hint in hints.items() if (rule := _rule(name, hint)) is not None)

    def mark(function: Function) -> Function:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for kind in kinds
            for name, hint, default in fields(kind)
            if name not in omit
        ]
        function.__signature__ = own.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
        return function

    return mark


def joined(name: str, module: str, *kinds: type[Any]) -> type[Any]:
    """Returns one class with the options of several, checked as each of them is, for what keeps them as one object;
    bound to ``name`` in ``module``, so that it can be pickled."""
    hints = {key: hint for kind in kinds for key, hint in get_type_hints(kind, include_extras=True).items()}
    defaults = [kind._field_defaults[key] for kind in kinds for key in kind._fields]

    def check_each(self: Any, where: str) -> None:
        for kind in kinds:
            if hasattr(kind, "check"):
                kind(*(getattr(self, key) for key in kind._fields)).check(where)

    make: Any = namedtuple  # called as what it is, a type checker asks for its names in writing
    made: Any = make(name, list(hints), defaults=defaults, module=module)
    made.__annotations__, made.check = hints, check_each
    takes(made)
    return made  # type: ignore[no-any-return]


def fields(kind: type[Any]) -> list[tuple[str, Any, Any]]:
    """Returns name, type and default of every option of a class."""
    hints, defaults = get_type_hints(kind), kind._field_defaults
    return [(name, hints[name], defaults.get(name, inspect.Parameter.empty)) for name in kind._fields]


@overload
def read(where: str, given: Mapping[str, Any], first: type[A], /) -> A: ...
@overload
def read(where: str, given: Mapping[str, Any], first: type[A], second: type[B], /) -> tuple[A, B]: ...
@overload
def read(
    where: str, given: Mapping[str, Any], first: type[A], second: type[B], third: type[C], /
) -> tuple[A, B, C]: ...
@overload
def read(
    where: str, given: Mapping[str, Any], first: type[A], second: type[B], third: type[C], fourth: type[D], /
) -> tuple[A, B, C, D]: ...
def read(where: str, given: Mapping[str, Any], /, *kinds: type[Any]) -> Any:
    """Returns the given options as one object of each class, with the defaults of those that were left out.

    Raises:
        TypeError: an option that no class has, with the nearest name; a value that is no number.
        ValueError: a number outside its range, a word that is not among the allowed ones.
    """
    left = dict(given)
    made = []
    for kind in kinds:
        mine = {name: left.pop(name) for name in kind._fields if name in left}
        made.append(checked(where, kind(**mine)))
    if left:
        _unknown(where, next(iter(left)), [name for kind in kinds for name in kind._fields])
    return made[0] if len(made) == 1 else tuple(made)


def checked(where: str, options: A) -> A:
    """Returns the options with every number as a float, after holding each to its range and its literals, and all
    together to what ``check`` of their class asks for."""
    changed = {}
    for name, range_, literals, optional in _RULES[type(options)]:
        value = getattr(options, name)
        if value is None and optional:
            continue
        if range_ is not None:
            low, high, open_low, open_high = range_
            changed[name] = check.number(where, name, value, low=low, high=high, open_low=open_low, open_high=open_high)
        else:
            check.one_of(where, name, value, literals)
    complete = options._replace(**changed)  # type: ignore[attr-defined]
    if hasattr(complete, "check"):
        complete.check(where)
    return complete  # type: ignore[no-any-return]


def _unknown(where: str, name: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(known)}"
    check.fail_type(where, f"there is no option {name!r}: {hint}")
