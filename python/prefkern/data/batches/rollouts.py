"""Batches of sampled responses with what was recorded at each of their tokens."""

from typing import Any, Literal

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.columns import columns, either, ids, scalars
from prefkern.data.arrays.ragged import Ragged, locate, ragged, same_rows
from prefkern.data.arrays.views import Array, core, floats, packed, threads
from prefkern.data.batches.sequences import Sequences, fresh, options

WHERE = "data.collate_rollouts"
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "rewards")
IGNORED = -100


def collate_rollouts(
    rows: Any,
    *,
    pad_token_id: int,
    layout: Literal["concatenated", "left_padded"] = "concatenated",
    pad_to_multiple_of: int | None = None,
    align: Literal["targets", "tokens"] = "targets",
) -> dict[str, torch.Tensor]:
    r"""Queries with sampled responses, and what was recorded at each response token, as one batch for PPO and its kin.

    ``rows``: a list of dicts, a dict of columns, or a ``pyarrow.Table``, as in `collate_pairs`, with the token ids
    ``query_ids`` (or ``prompt_ids``) and ``response_ids`` (or ``completion_ids``). Optional columns: ``response_mask``,
    bool or 0/1 for each response token, 0 where the policy did not write it (the output of a tool); the floating-point
    ``logprobs``, ``ref_logprobs``, ``values`` and ``rewards`` for each response token; the number ``score``.

    ``layout="concatenated"``: query + response, padded on the right. ``"left_padded"``: queries padded on the left and
    responses on the right, so that all responses begin in the column of the longest query's length, as generation
    leaves them. L is rounded up to ``pad_to_multiple_of`` on the right.

    Returns ``[B, L]`` tensors: int64 ``input_ids``, ``attention_mask``, ``position_ids`` (0, 1, ... from each row's
    first token; 0 at padding), ``completion_mask`` (response tokens, or those with ``response_mask`` 1), ``targets``
    (row t predicts ``targets[t]``; -100 where nothing is scored: `prefkern.shift_labels` of ids and mask) and
    ``target_mask`` (1 where a target is scored); the recorded columns and ``score [B]`` in torch's default dtype.

    ``align`` says where the recorded numbers of a response token stand: with the row that predicts it
    (``"targets"``: in the columns of ``targets``, hence of `prefkern.linear_token_logprobs`, `prefkern.data.gae` with
    ``mask=target_mask`` and `prefkern.ppo_loss`), or with the token itself (``"tokens"``: in the columns of
    ``completion_mask``). They are 0 elsewhere, and kept where ``response_mask`` is 0::

        >>> row = {"query_ids": [5, 6], "response_ids": [7, 8], "logprobs": [-0.5, -0.25], "score": 1.0}
        >>> batch = collate_rollouts([row], pad_token_id=0, pad_to_multiple_of=5)
        >>> for name in ("input_ids", "completion_mask", "targets", "target_mask", "logprobs"):
        ...     print(name, batch[name].tolist())
        input_ids [[5, 6, 7, 8, 0]]
        completion_mask [[0, 0, 1, 1, 0]]
        targets [[-100, 7, 8, -100, -100]]
        target_mask [[0, 1, 1, 0, 0]]
        logprobs [[0.0, -0.5, -0.25, 0.0, 0.0]]

    An empty response is kept as it is: nothing in its row is scored. Nothing is cut: a rollout without its whole query
    is another rollout. A ValueError or TypeError names the row of an empty query (nothing predicts the first response
    token), of recorded columns that are not as long as the response, of masks that are not 0 and 1, of null rows and of
    negative ids.
    """
    check.one_of(WHERE, "layout", layout, ("concatenated", "left_padded"))
    check.one_of(WHERE, "align", align, ("targets", "tokens"))
    checked = options(WHERE, rows, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    query, response = either(rows, "query_ids", "prompt_ids"), either(rows, "response_ids", "completion_ids")
    given = columns(WHERE, rows, (query, response), ("response_mask", *PER_TOKEN, "score"))
    tokens = {name: ids(WHERE, name, given[name]) for name in (query, response)}
    sequences = Sequences(WHERE, tokens, checked)
    lengths = np.diff(tokens[query].offsets)
    if not lengths.all():
        row = int(np.argmin(lengths))
        check.fail(WHERE, f"{query}[{row}] must hold at least one token: one that predicts the first response token")
    pivot = int(lengths.max()) if layout == "left_padded" else None
    batch = sequences.padded(pivot=pivot, positions=True)
    grid = _Responses(response, tokens[response], lengths if pivot is None else np.full_like(lengths, pivot), batch)

    scored = tokens[response].values.astype(np.int64, copy=False)
    ones = np.ones(len(scored), dtype=np.int64)
    if "response_mask" in given:
        ones = grid.flags("response_mask", given["response_mask"])
        scored = np.where(ones == 1, scored, IGNORED)
        batch["completion_mask"] = grid.place(ones, 0)
    batch["targets"] = grid.place(scored, -1, blank=IGNORED)
    batch["target_mask"] = grid.place(ones, -1)
    for name in PER_TOKEN:
        if name in given:
            batch[name] = grid.place(grid.recorded(name, given[name]), -1 if align == "targets" else 0)
    if "score" in given:
        batch["score"] = scalars(WHERE, "score", given["score"], sequences.rows)
    return batch


class _Responses:
    """The cells of the responses of a batch; the first of each row is in column ``starts[row]``."""

    def __init__(self, name: str, response: Ragged, starts: Array, batch: dict[str, torch.Tensor]) -> None:
        self.name, self.response = name, response
        self.starts = starts.astype(np.int64, copy=False)
        self.shape = tuple(batch["input_ids"].shape)

    def recorded(self, name: str, column: Any) -> Array:
        """Floating-point numbers for each response token."""
        rows = ragged(WHERE, name, column, integers=False)
        same_rows(WHERE, name, rows, self.name, self.response)
        dtype = np.float64 if torch.get_default_dtype() == torch.float64 else np.float32
        return floats(WHERE, name, rows.values).astype(dtype, copy=False)

    def flags(self, name: str, column: Any) -> Array:
        """0 or 1 for each response token, int64."""
        rows = ragged(WHERE, name, column, integers=True)
        same_rows(WHERE, name, rows, self.name, self.response)
        values: Array = rows.values.astype(np.int64)
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            row, position = locate(rows, int(np.argmax(wrong)))
            check.fail(WHERE, f"{name}[{row}][{position}] must be 0 or 1 (or a bool), got {values[wrong][0]}")
        return values

    def place(self, values: Array, shift: int, *, blank: int = 0) -> torch.Tensor:
        (out,) = fresh(1, self.shape, values.dtype)
        core().place_rows(
            f"prefkern.{WHERE}",
            packed(values),
            self.response.offsets,
            self.starts + shift,
            out,
            blank=blank,
            threads=threads(),
        )
        return torch.from_numpy(out)
