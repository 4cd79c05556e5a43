"""Columns of lists as flat values and offsets: what Arrow stores already, and what Python lists are copied into."""

from typing import Any, NamedTuple

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.views import Array, describe, flatten, is_array, is_arrow, packed, view


class Ragged(NamedTuple):
    """Row i is ``values[offsets[i] : offsets[i + 1]]``; ``offsets`` is int64 and starts at 0."""

    values: Array
    offsets: Array


def is_column(value: object) -> bool:
    """Whether the value is one of rows that are lists: a list or tuple, or an Arrow array."""
    return isinstance(value, list | tuple) or is_arrow(value)


def ragged(where: str, name: str, column: Any, *, integers: bool) -> Ragged:
    """Rows of numbers: a list of lists, tuples, arrays or tensors, an Arrow list array, or an array [B, T]."""
    if is_arrow(column):
        return _from_arrow(where, name, column, integers=integers)
    if isinstance(column, np.ndarray) and column.dtype == object:
        column = list(column)
    if isinstance(column, list | tuple):
        return _from_rows(where, name, list(column), integers=integers)
    array = view(where, name, column)
    if array.ndim != 2:
        check.fail(
            where, f"{name} must be a list of rows, an Arrow list array or an array [B, T], got {describe(array)}"
        )
    rows, width = array.shape
    return Ragged(packed(array).reshape(-1), np.arange(rows + 1, dtype=np.int64) * width)


def same_rows(where: str, name: str, given: Ragged, like: str, expected: Ragged) -> None:
    """Refuses rows whose number or lengths are not those of ``expected``."""
    got, wanted = np.diff(given.offsets), np.diff(expected.offsets)
    if len(got) != len(wanted):
        check.fail(where, f"{like} and {name} must have the same number of rows, got {len(wanted)} and {len(got)}")
    if (got != wanted).any():
        row = int(np.argmax(got != wanted))
        check.fail(
            where, f"{like}[{row}] and {name}[{row}] must have the same length, got {wanted[row]} and {got[row]}"
        )


def locate(rows: Ragged, cell: int) -> tuple[int, int]:
    """The row of a cell of the flat values, and its position there."""
    row = int(np.searchsorted(rows.offsets, cell, side="right")) - 1
    return row, int(cell - rows.offsets[row])


def _from_rows(where: str, name: str, rows: list[Any], *, integers: bool) -> Ragged:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    if {*map(type, rows)} <= {list, tuple}:
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
        return Ragged(flatten(where, name, rows, int(offsets[-1]), integers=integers, nested=True), offsets)
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple) and not (is_array(row) and row.ndim == 1):
            check.fail_type(where, f"{name}[{index}] must be a list or a one-dimensional array, got {describe(row)}")
        offsets[index + 1] = len(row)
    np.cumsum(offsets, out=offsets)
    kinds, kind = ("iub", "integers") if integers else ("f", "floating-point numbers")
    views = {index: view(where, f"{name}[{index}]", row) for index, row in enumerate(rows) if is_array(row)}
    for index, array in views.items():
        if array.dtype.kind not in kinds:
            check.fail_type(where, f"{name}[{index}] must hold {kind}, got {describe(array)}")
    if rows and len(views) == len(rows):
        return Ragged(np.concatenate(list(views.values())), offsets)
    lists = [views[index].tolist() if index in views else row for index, row in enumerate(rows)]
    return Ragged(flatten(where, name, lists, int(offsets[-1]), integers=integers, nested=True), offsets)


def _from_arrow(where: str, name: str, column: Any, *, integers: bool) -> Ragged:
    import pyarrow as pa  # an Arrow object was given, so that it is loaded

    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        check.fail_type(
            where, f"{name} must be an Arrow list, large_list or fixed_size_list array, got {describe(column)}"
        )
    if column.null_count:
        check.fail(where, f"{name}[{column.is_null().index(True).as_py()}] is null; drop such rows first")
    if isinstance(column, pa.FixedSizeListArray):
        child = column.flatten()
        offsets = np.arange(len(column) + 1, dtype=np.int64) * column.type.list_size
    else:
        # The values of a sliced array are those of the whole buffer; its offsets say which of them are the slice's.
        offsets = column.offsets.to_numpy().astype(np.int64)
        start = offsets[0]
        child = column.values.slice(start, offsets[-1] - start)
        offsets -= start
    if child.null_count:
        row, position = locate(Ragged(child, offsets), child.is_null().index(True).as_py())
        check.fail(where, f"{name}[{row}][{position}] is null")
    if len(child) == 0:
        return Ragged(np.empty(0, dtype=np.int64 if integers else np.float64), offsets)
    return Ragged(child.to_numpy(zero_copy_only=False), offsets)


def rectangle(where: str, name: str, column: Any) -> Array:
    """Rows of one length as an array [B, T]."""
    values, offsets = ragged(where, name, column, integers=True)
    lengths = np.diff(offsets)
    if len(lengths) == 0:
        return values.reshape(0, 0)
    if (lengths != lengths[0]).any():
        row = int(np.argmax(lengths != lengths[0]))
        check.fail(where, f"{name}[0] and {name}[{row}] must have the same length, got {lengths[0]} and {lengths[row]}")
    return values.reshape(len(lengths), lengths[0])


def like_column(values: Array, offsets: Array, column: Any) -> Any:
    """The rows of flat ``values`` as the kind of ``column``: a list of lists, or an Arrow array of its type."""
    if is_arrow(column):
        import pyarrow as pa

        return pa.LargeListArray.from_arrays(offsets, values).cast(column.type)
    return (
        [like_array(part, row) for part, row in zip(np.split(values, offsets[1:-1]), column, strict=True)]
        if len(column)
        else []
    )


def like_array(array: Array, given: Any) -> Any:
    """A numpy array as the kind of ``given``: a torch tensor, a list or itself."""
    if isinstance(given, torch.Tensor):
        return torch.from_numpy(array)
    return array.tolist() if isinstance(given, list | tuple) else array
