"""Attributes of other libraries that stand replaced, and what they were."""

from typing import Any

_ABSENT = object()


class Replaced:
    """Remembers what it replaces, so that all of it can be undone; true while anything is replaced."""

    def __init__(self) -> None:
        self._previous: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._previous)

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._previous.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._previous:
            owner, name, value = self._previous.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
