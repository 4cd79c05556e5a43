"""Batches of token sequences for supervised fine-tuning."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.columns import columns, ids
from prefkern.data.arrays.ragged import Ragged, same_rows
from prefkern.data.arrays.views import Array, whole
from prefkern.data.batches.sequences import boundaries, filling_positions, round_up

WHERE = "data.collate_language"
IGNORED = -100


def collate_language(
    rows: Any,
    *,
    pad_token_id: int,
    padding_free: bool = False,
    return_position_ids: bool = False,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Any]:
    """Token sequences as one batch, the tensors of TRL's ``DataCollatorForLanguageModeling`` under its keys.

    ``rows``: a list of dicts, a dict of columns or a ``pyarrow.Table``, with the token ids ``input_ids`` and optionally
    ``labels`` (-100 where a token is not scored; the ids themselves where they are missing) and ``seq_lengths`` (the
    lengths of the sequences that were packed into a row, whose positions then restart). Ids are lists, numpy arrays,
    torch CPU tensors or Arrow lists of any integer type.

    Returns int64 ``input_ids``, ``labels`` and ``attention_mask`` ``[B, L]``, padded on the right, L the longest row
    rounded up to ``pad_to_multiple_of``; with ``return_position_ids`` also ``position_ids``. With ``padding_free``
    instead of the mask: ``input_ids``, ``labels``, ``position_ids`` ``[1, N]``, the int32 boundaries ``cu_seq_lens_q``,
    ``cu_seq_lens_k`` and ``seq_idx [1, N]``, and the ints ``max_length_q``, ``max_length_k``; the first token of every
    sequence, which nothing predicts, is not scored. N is rounded up with padding tokens that continue the last sequence
    and are not scored; TRL's collator makes each of them a sequence, which losses over sequences would count.

    A ValueError names the row where labels or packed lengths do not fit the ids, and says so where there is no token.
    """
    return collate(
        rows,
        pad_token_id,
        pad_to_multiple_of,
        padding_free=padding_free,
        return_position_ids=return_position_ids,
        filling="continues",
    )


def collate(
    rows: Any,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    *,
    padding_free: bool,
    return_position_ids: bool,
    filling: Literal["continues", "apart"],
) -> dict[str, Any]:
    """`collate_language`; with ``filling="apart"`` each token that rounds N up is a sequence, as in TRL."""
    pad_token_id = whole(WHERE, "pad_token_id", pad_token_id, low=0)
    multiple = 1 if pad_to_multiple_of is None else whole(WHERE, "pad_to_multiple_of", pad_to_multiple_of, low=1)
    given = _columns(rows)
    tokens = _integers("input_ids", given["input_ids"])
    if tokens.values.size == 0:
        check.fail(WHERE, "rows must hold at least one token, got none")
    if tokens.values.min() < 0:
        at = int(np.argmax(tokens.values < 0))
        row = int(np.searchsorted(tokens.offsets, at, side="right")) - 1
        check.fail(WHERE, f"input_ids[{row}] must hold no negative ids, got {tokens.values[at]}")
    labels = tokens.values
    if "labels" in given:
        labelled = _integers("labels", given["labels"])
        same_rows(WHERE, "labels", labelled, "input_ids", tokens)
        labels = labelled.values
    positions = None
    if padding_free or return_position_ids:
        positions = _positions(_sequences(given, tokens))
    if padding_free:
        return _flat(tokens.values, labels, positions, pad_token_id, multiple, filling)
    lengths = np.diff(tokens.offsets)
    inside = np.arange(round_up(int(lengths.max()), multiple)) < lengths[:, None]
    batch = {"input_ids": _padded(tokens.values, inside, pad_token_id), "labels": _padded(labels, inside, IGNORED)}
    if positions is not None:
        batch["position_ids"] = _padded(positions, inside, 0)
    batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
    return batch


def _flat(ids: Array, labels: Array, positions: Any, pad_token_id: int, multiple: int, filling: str) -> dict[str, Any]:
    total, count = round_up(len(ids), multiple), len(ids)
    starts = np.flatnonzero(positions == 0)
    added = np.zeros(total - count, dtype=np.int64)
    if filling == "apart":
        starts = np.concatenate((starts, np.arange(count, total)))
    else:
        added = filling_positions(np.diff(starts, append=count), total - count)
    labels = np.concatenate((labels, np.full(total - count, IGNORED, dtype=np.int64)))
    labels[starts] = IGNORED
    return {
        "input_ids": torch.from_numpy(np.concatenate((ids, np.full_like(added, pad_token_id))))[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(np.concatenate((positions, added)))[None],
        **boundaries(np.append(starts, total)),
    }


def _padded(values: Array, inside: Array, padding: int) -> torch.Tensor:
    filled = np.full(inside.shape, padding, dtype=np.int64)
    filled[inside] = values
    return torch.from_numpy(filled)


def _sequences(given: Mapping[str, Any], tokens: Ragged) -> Array:
    """The lengths of the sequences, in order: the rows', or those that were packed into rows."""
    lengths = np.diff(tokens.offsets)
    if "seq_lengths" not in given:
        return lengths
    parts = _integers("seq_lengths", given["seq_lengths"])
    if len(parts.offsets) != len(tokens.offsets):
        check.fail(
            WHERE,
            f"input_ids and seq_lengths must have the same number of rows, got {len(lengths)} and "
            f"{len(parts.offsets) - 1}",
        )
    upto = np.concatenate(([0], np.cumsum(parts.values)))[parts.offsets]
    wrong = np.diff(upto) != lengths
    if (parts.values < 0).any() or wrong.any():
        row = int(np.argmax(wrong)) if wrong.any() else 0
        check.fail(
            WHERE,
            f"seq_lengths must not be negative and add up to the tokens of their row: seq_lengths[{row}] adds up to "
            f"{np.diff(upto)[row]}, input_ids[{row}] has {lengths[row]} tokens",
        )
    return parts.values


def _positions(lengths: Array) -> Array:
    ends = np.cumsum(lengths)
    positions: Array = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return positions


def _integers(name: str, column: Any) -> Ragged:
    values, offsets = ids(WHERE, name, column)
    return Ragged(values.astype(np.int64, copy=False), offsets)


def _columns(rows: Any) -> Mapping[str, Any]:
    """The known columns by name; a row without labels among others with them gets its ids."""
    if isinstance(rows, list | tuple) and any(isinstance(row, Mapping) and "labels" in row for row in rows):
        rows = [
            {"labels": row["input_ids"], **row} if isinstance(row, Mapping) and "input_ids" in row else row
            for row in rows
        ]
    return columns(WHERE, rows, ("input_ids",), ("labels", "seq_lengths"))
