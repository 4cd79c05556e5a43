"""Numbers in rows, in every form that functions over tokens take: padded, packed with offsets, columns of lists."""

from typing import Any, NamedTuple

import numpy as np

from prefkern import check
from prefkern.data.arrays.ragged import Ragged, is_column, like_array, like_column, ragged, rectangle, same_rows
from prefkern.data.arrays.views import Array, flags, floats, indices, is_array, is_arrow, vector, view


class Grid(NamedTuple):
    """The argument that the others must match, as contiguous float32 or float64 ``cells``.

    ``offsets`` is None for ``[B, T]``; ``lists`` says that they are those of a column of lists.
    """

    where: str
    name: str
    given: Any
    cells: Array
    offsets: Array | None
    lists: bool

    def like(self, name: str, given: Any) -> Array:
        """Numbers of the same dtype for the same cells (their number is the compiled function's to check)."""
        if not self.lists:
            return self._floats(name, vector(self.where, name, given, integers=False))
        return self._floats(name, self._column(name, given, integers=False))

    def flags(self, name: str, given: Any) -> Array | None:
        """Flags for the same cells."""
        if given is None:
            return None
        if self.lists:
            array = self._column(name, given, integers=True)
        elif is_array(given):
            array = view(self.where, name, given)
        elif self.offsets is not None:
            array = vector(self.where, name, given, integers=True)
        else:
            array = rectangle(self.where, name, given)
        return flags(self.where, name, array)

    def per_row(self, name: str, given: Any) -> Array:
        """One number for each row."""
        array = vector(self.where, name, given, integers=False)
        return self._floats(name, array.astype(self.cells.dtype) if isinstance(given, list | tuple) else array)

    def fresh(self) -> Array:
        """An output for the same cells."""
        return np.empty(self.cells.shape, self.cells.dtype)

    def not_finite(self, cells: Array, flags: Array | None) -> str | None:
        """The first number that is NaN or infinite where ``flags`` is set, and its place: ``nan at [2, 5]``."""
        wrong = ~np.isfinite(cells)
        if flags is not None:
            wrong &= flags != 0
        if not wrong.any():
            return None
        at = tuple(int(index) for index in np.argwhere(wrong)[0])
        position = list(at)
        if self.lists and self.offsets is not None:
            row = int(np.searchsorted(self.offsets, at[0], side="right")) - 1
            position = [row, at[0] - int(self.offsets[row])]
        return f"{cells[at]} at {position}"

    def restore(self, cells: Array) -> Any:
        """An output as the kind of the argument."""
        if not self.lists or self.offsets is None:
            return like_array(cells, self.given)
        return like_column(cells, self.offsets, self.given)

    def _column(self, name: str, given: Any, *, integers: bool) -> Array:
        rows = ragged(self.where, name, given, integers=integers)
        if self.offsets is not None:
            same_rows(self.where, name, rows, self.name, Ragged(self.cells, self.offsets))
        return rows.values

    def _floats(self, name: str, array: Array) -> Array:
        if array.dtype != self.cells.dtype:
            check.fail_type(
                self.where,
                f"{self.name} and {name} must have the same dtype, got {self.cells.dtype} and {array.dtype}",
            )
        return floats(self.where, name, array)


def grid(where: str, name: str, given: Any, cu_seqlens: Any) -> Grid:
    """``given`` as a grid; ``cu_seqlens`` is for packed arrays only."""
    if not is_array(given) and (is_arrow(given) or (is_column(given) and cu_seqlens is None)):
        if cu_seqlens is not None:
            check.fail(where, "cu_seqlens is for packed arrays; rows that are lists have lengths of their own")
        rows = ragged(where, name, given, integers=False)
        return Grid(where, name, given, floats(where, name, rows.values), rows.offsets, lists=True)
    cells = floats(where, name, vector(where, name, given, integers=False))
    offsets = None if cu_seqlens is None else indices(where, "cu_seqlens", cu_seqlens)
    return Grid(where, name, given, cells, offsets, lists=False)


def any_shape(where: str, name: str, given: Any) -> Grid:
    """``given`` as a grid whose rows do not matter: an array of any shape, a flat list, or a column of lists."""
    if is_arrow(given) or (isinstance(given, list | tuple) and len(given) and _is_row(given[0])):
        return grid(where, name, given, None)
    cells = floats(where, name, vector(where, name, given, integers=False))
    if cells.ndim == 0:
        check.fail(where, f"{name} must have at least one dimension, got the number {cells}")
    offsets = np.array([0, len(cells)]) if cells.ndim == 1 else None
    return Grid(where, name, given, cells, offsets, lists=False)


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or (is_array(value) and value.ndim > 0)
