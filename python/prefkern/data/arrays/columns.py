"""Rows of any kind as columns: a list of dicts, a dict of columns, an Arrow table or record batch."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.ragged import Ragged, ragged
from prefkern.data.arrays.views import describe, is_array, is_arrow, packed


def names_of(rows: Any) -> Sequence[str]:
    """The names of the columns of rows of any kind, also of those that do not begin in the first row."""
    if isinstance(rows, list | tuple):
        return list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
    return list(rows) if isinstance(rows, Mapping) else getattr(rows, "column_names", ())


def either(rows: Any, *names: str) -> str:
    """The first of the names that the rows have, or the first."""
    given = names_of(rows)
    return next((name for name in names if name in given), names[0])


def columns(where: str, rows: Any, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """The known columns of rows of any kind, by name."""
    if isinstance(rows, list | tuple):
        return _from_dicts(where, rows, required, optional)
    if is_arrow(rows) and hasattr(rows, "column_names"):
        given = rows.column_names
        found: Mapping[str, Any] = {name: rows.column(name) for name in (*required, *optional) if name in given}
    elif isinstance(rows, Mapping):
        given, found = list(rows), rows
    else:
        check.fail_type(
            where, f"rows must be a list of dicts, a dict of columns or a pyarrow.Table, got {type(rows).__name__}"
        )
    for name in required:
        if name not in found:
            check.fail(where, f"rows must have the columns {', '.join(required)}; {name} is missing from {given}")
    return found


def _from_dicts(where: str, rows: Any, required: Sequence[str], optional: Sequence[str]) -> dict[str, list[Any]]:
    for index, row in enumerate(rows):
        if type(row) is not dict and not isinstance(row, Mapping):
            check.fail_type(where, f"rows[{index}] must be a dict, got {describe(row)}")
    names = (*required, *(name for name in optional if any(name in row for row in rows)))
    wanted = set(names)
    for index, row in enumerate(rows):
        if not wanted <= row.keys():
            missing = next(name for name in names if name not in row)
            check.fail(
                where, f"rows[{index}] must have the keys {', '.join(names)}; {missing} is missing from {list(row)}"
            )
    return {name: [row[name] for row in rows] for name in names}


def ids(where: str, name: str, column: Any) -> Ragged:
    """Rows of token ids as int32 or int64 values; their signs are the compiled function's to check."""
    values, offsets = ragged(where, name, column, integers=True)
    if values.dtype.kind not in "iu" or not np.can_cast(values.dtype, np.int64):
        check.fail_type(where, f"{name} must hold integers that fit int64, got {values.dtype}")
    if values.dtype not in (np.int32, np.int64) or not values.dtype.isnative:
        values = values.astype(np.int64)
    return Ragged(packed(values), offsets)


def scalars(where: str, name: str, column: Any, rows: int, *, finite: bool = False) -> torch.Tensor:
    """One number for each row, in torch's default dtype."""
    values = per_row(where, name, column, rows, "number")
    found = []
    for row, value in enumerate(values):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            check.fail_type(where, f"{name}[{row}] must be a number, got {describe(value)}")
        except OverflowError:
            check.fail(where, f"{name}[{row}] must be a number that a float can hold, got {describe(value)}")
        if finite and not math.isfinite(found[-1]):
            check.fail(where, f"{name}[{row}] must be a finite number, got {value}")
    return torch.tensor(found, dtype=torch.get_default_dtype())


def labels(where: str, name: str, column: Any, rows: int) -> torch.Tensor:
    """One bool for each row, from bools or from 0 and 1, also 0.0 and 1.0."""
    values = per_row(where, name, column, rows, "label")
    for row, value in enumerate(values):
        if not isinstance(value, numbers.Real | np.bool_ | torch.Tensor) or value not in (0, 1):
            check.fail_type(where, f"{name}[{row}] must be True or False (or 1 or 0), got {describe(value)}")
    return torch.tensor([bool(value) for value in values])


def per_row(where: str, name: str, column: Any, rows: int, kind: str) -> list[Any]:
    """The elements of a column of one value for each row."""
    if is_arrow(column):
        column = column.to_pylist()
    elif is_array(column):
        column = column.tolist()
    if not isinstance(column, list | tuple) or len(column) != rows:
        check.fail(where, f"{name} must hold one {kind} for each of the {rows} rows, got {describe(column)}")
    return list(column)
