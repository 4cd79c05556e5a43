"""Batches of preference pairs."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from prefkern import _check
from prefkern.data._arrays import Array, core, describe, is_array, is_arrow, packed, threads, whole
from prefkern.data._ragged import Ragged, ragged

WHERE = "data.collate_pairs"
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCALARS = ("ref_chosen_logps", "ref_rejected_logps")


def collate_pairs(
    rows: Any,
    *,
    pad_token_id: int,
    layout: Literal["concatenated", "interleaved"] = "concatenated",
    max_length: int | None = None,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start",
    pad_to_multiple_of: int | None = None,
    padding_free: bool = False,
) -> dict[str, Any]:
    """Preference pairs as one batch, the tensors of TRL's ``DataCollatorForPreference`` under its keys.

    ``rows``: a list of dicts, a dict of columns, or a ``pyarrow.Table`` (whole, sliced or chunked), with the token ids
    ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, and optionally the numbers ``ref_chosen_logps`` and
    ``ref_rejected_logps``. Ids are lists, numpy arrays, torch CPU tensors or Arrow lists of any integer type; int32 and
    int64 ids of an Arrow table in one chunk are read where they lie.

    Sequence = prompt + completion, cut to ``max_length`` tokens at its end (``"keep_start"``) or its beginning
    (``"keep_end"``). ``layout``: all B chosen sequences and then all B rejected ones, or chosen and rejected by turns.

    Returns int64 ``input_ids``, ``attention_mask`` and ``completion_mask`` ``[2 B, L]``, padded on the right, L the
    longest sequence rounded up to ``pad_to_multiple_of``; the reference log-probabilities ``[B]`` in torch's default
    dtype where they were given. With ``padding_free``: ``input_ids``, ``position_ids``, ``completion_mask`` ``[1, N]``,
    the int32 boundaries ``cu_seq_lens_q``, ``cu_seq_lens_k`` and ``seq_idx [1, N]``, and the ints ``max_length_q``,
    ``max_length_k``, as TRL's padding-free SFT collator names them; ``pad_to_multiple_of`` then rounds N up with
    sequences of one padding token behind the first 2 B, as that collator does.

    An empty prompt or completion is kept as it is. A completion that ``max_length`` empties is a ValueError that names
    its rows, as are null rows, missing columns, unequal row counts and negative ids.
    """
    pad_token_id = whole(WHERE, "pad_token_id", pad_token_id, low=0)
    _check.one_of(WHERE, "layout", layout, ("concatenated", "interleaved"))
    _check.one_of(WHERE, "truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    if max_length is not None:
        max_length = whole(WHERE, "max_length", max_length, low=1)
    multiple = 1 if pad_to_multiple_of is None else whole(WHERE, "pad_to_multiple_of", pad_to_multiple_of, low=1)
    columns = _columns(rows)
    ids = [_ids(name, columns[name]) for name in COLUMNS]
    pairs = len(ids[0].offsets) - 1
    if pairs == 0:
        _check.fail(WHERE, "rows must hold at least one pair, got none")
    cut = {
        "max_length": max_length,
        "keep_end": truncation_mode == "keep_end",
        "interleaved": layout == "interleaved",
    }
    offsets = [column.offsets for column in ids]
    lengths = np.empty(2 * pairs, dtype=np.int64)
    core().pair_lengths(offsets, lengths, **cut)
    arguments = {"pad_token_id": pad_token_id, "threads": threads(), **cut}
    fill = _packed if padding_free else _padded
    batch = fill([column.values for column in ids], offsets, lengths, multiple, arguments)
    for name in SCALARS:
        if name in columns:
            batch[name] = _scalars(name, columns[name], pairs)
    return batch


def _padded(
    ids: list[Array], offsets: list[Array], lengths: Array, multiple: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    shape = (len(lengths), _round_up(int(lengths.max()), multiple))
    input_ids, completion_mask, attention_mask = (np.empty(shape, dtype=np.int64) for _ in range(3))
    core().collate_pairs(ids, offsets, input_ids, completion_mask, attention_mask, **arguments)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "completion_mask": torch.from_numpy(completion_mask),
    }


def _packed(
    ids: list[Array], offsets: list[Array], lengths: Array, multiple: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    scored = int(bounds[-1])
    total = _round_up(scored, multiple)
    input_ids = np.full(total, arguments["pad_token_id"], dtype=np.int64)
    completion_mask, position_ids = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    outputs = (input_ids[:scored], completion_mask[:scored], position_ids[:scored])
    core().collate_pairs(ids, offsets, *outputs, cu_seqlens=bounds, **arguments)
    bounds = np.concatenate((bounds, np.arange(scored, total) + 1))
    counts = np.diff(bounds)
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "completion_mask": torch.from_numpy(completion_mask)[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(counts.max()),
        "max_length_k": int(counts.max()),
        "seq_idx": torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts))[None],
    }


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _columns(rows: Any) -> Mapping[str, Any]:
    """The known columns of rows of any kind, by name."""
    if isinstance(rows, list | tuple):
        return _from_dicts(rows)
    if is_arrow(rows) and hasattr(rows, "column_names"):
        names = rows.column_names
        columns: Mapping[str, Any] = {name: rows.column(name) for name in COLUMNS + SCALARS if name in names}
    elif isinstance(rows, Mapping):
        names, columns = list(rows), rows
    else:
        _check.fail_type(
            WHERE, f"rows must be a list of dicts, a dict of columns or a pyarrow.Table, got {type(rows).__name__}"
        )
    for name in COLUMNS:
        if name not in columns:
            _check.fail(WHERE, f"rows must have the columns {', '.join(COLUMNS)}; {name} is missing from {names}")
    return columns


def _from_dicts(rows: Any) -> dict[str, list[Any]]:
    names = COLUMNS + tuple(name for name in SCALARS if any(isinstance(row, Mapping) and name in row for row in rows))
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            _check.fail_type(WHERE, f"rows[{index}] must be a dict, got {describe(row)}")
        for name in names:
            if name not in row:
                _check.fail(
                    WHERE, f"rows[{index}] must have the keys {', '.join(names)}; {name} is missing from {list(row)}"
                )
    return {name: [row[name] for row in rows] for name in names}


def _ids(name: str, column: Any) -> Ragged:
    values, offsets = ragged(WHERE, name, column, integers=True)
    if values.dtype.kind not in "iu" or not np.can_cast(values.dtype, np.int64):
        _check.fail_type(WHERE, f"{name} must hold integers that fit int64, got {values.dtype}")
    if values.dtype not in (np.int32, np.int64) or not values.dtype.isnative:
        values = values.astype(np.int64)
    return Ragged(packed(values), offsets)


def _scalars(name: str, column: Any, pairs: int) -> torch.Tensor:
    if is_arrow(column):
        column = column.to_pylist()
    elif is_array(column):
        column = column.tolist()
    if not isinstance(column, list | tuple) or len(column) != pairs:
        _check.fail(WHERE, f"{name} must hold one number for each of the {pairs} pairs, got {describe(column)}")
    numbers = []
    for row, value in enumerate(column):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            _check.fail_type(WHERE, f"{name}[{row}] must be a number, got {describe(value)}")
    return torch.tensor(numbers, dtype=torch.get_default_dtype())
