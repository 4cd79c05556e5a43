"""Sequences of a prompt and a completion as one padded or padding-free batch: what every collator is made of."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from prefkern import check
from prefkern.data.arrays.ragged import Ragged
from prefkern.data.arrays.views import Array, core, is_arrow, threads, whole
from prefkern.data.batches.truncation import METADATA, marked, refuse_other_end

HUGE = 1 << 22


class Options(NamedTuple):
    """Checked options of a collator."""

    pad_token_id: int
    max_length: int | None
    keep_end: bool
    multiple: int
    padding_free: bool


def options(
    where: str,
    rows: Any,
    *,
    pad_token_id: Any,
    max_length: Any = None,
    truncation_mode: Any = "keep_start",
    pad_to_multiple_of: Any = None,
    padding_free: bool = False,
) -> Options:
    check.one_of(where, "truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    if max_length is not None and is_arrow(rows):
        cut = (getattr(rows.schema, "metadata", None) or {}).get(METADATA, b"")
        refuse_other_end(where, marked(cut.decode()), truncation_mode)
    return Options(
        whole(where, "pad_token_id", pad_token_id, low=0),
        None if max_length is None else whole(where, "max_length", max_length, low=1),
        truncation_mode == "keep_end",
        1 if pad_to_multiple_of is None else whole(where, "pad_to_multiple_of", pad_to_multiple_of, low=1),
        padding_free,
    )


class Sequences:
    """Columns of token ids, the prompt first and then its completions, as the rows of one batch."""

    def __init__(
        self,
        where: str,
        columns: dict[str, Ragged],
        options: Options,
        *,
        interleaved: bool = False,
        shifted: bool = False,
    ) -> None:
        self.names, self.given = list(columns), list(columns.values())
        self.place, self.options = f"prefkern.{where}", options
        self.rows = len(self.given[0].offsets) - 1
        self.how = {
            "max_length": options.max_length,
            "keep_end": options.keep_end,
            "interleaved": interleaved,
            "shifted": shifted,
        }
        self.offsets = [column.offsets for column in self.given]
        self.lengths: Array = np.empty((len(columns) - 1) * self.rows, dtype=np.int64)
        if self.rows == 0:
            check.fail(where, "rows must hold at least one row, got none")
        core().sequence_lengths(self.place, self.names, self.offsets, self.lengths, **self.how)

    def batch(self, prefix: str = "") -> dict[str, Any]:
        """The batch under TRL's keys."""
        made = self._packed() if self.options.padding_free else self.padded()
        return {f"{prefix}{name}": value for name, value in made.items()} if prefix else made

    def padded(self, *, pivot: int | None = None, positions: bool = False) -> dict[str, torch.Tensor]:
        """``[S, L]``, padded on the right; with ``pivot`` also on the left, so that every completion begins there."""
        longest = int(self.lengths.max())
        if pivot is not None:
            longest = pivot + int((self.lengths - np.diff(self.offsets[0])).max())
        width = round_up(longest, self.options.multiple)
        names = ["input_ids", "attention_mask", "completion_mask", *(["position_ids"] if positions else [])]
        made = dict(zip(names, fresh(len(names), (len(self.lengths), width)), strict=True))
        self._fill(**made, pivot=pivot)
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def _packed(self) -> dict[str, Any]:
        bounds = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=bounds[1:])
        scored = int(bounds[-1])
        total = round_up(scored, self.options.multiple)
        input_ids, completion_mask, position_ids = fresh(3, (total,))
        self._fill(input_ids[:scored], completion_mask[:scored], None, position_ids[:scored], cu_seqlens=bounds)
        input_ids[scored:] = self.options.pad_token_id
        completion_mask[scored:] = 0
        position_ids[scored:] = filling_positions(self.lengths, total - scored)
        bounds[-1] = total
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "position_ids": torch.from_numpy(position_ids)[None],
            "completion_mask": torch.from_numpy(completion_mask)[None],
            **boundaries(bounds),
        }

    def _fill(
        self,
        input_ids: Array,
        completion_mask: Array,
        attention_mask: Array | None,
        position_ids: Array | None = None,
        *,
        cu_seqlens: Array | None = None,
        pivot: int | None = None,
    ) -> None:
        core().fill_sequences(
            self.place,
            self.names,
            [column.values for column in self.given],
            self.offsets,
            input_ids,
            completion_mask,
            attention_mask,
            position_ids,
            pad_token_id=self.options.pad_token_id,
            cu_seqlens=cu_seqlens,
            pivot=pivot,
            threads=threads(),
            **self.how,
        )


def fresh(count: int, shape: tuple[int, ...], dtype: npt.DTypeLike = np.int64) -> list[Array]:
    """Unwritten arrays of one shape, side by side in one piece of memory.

    The first touch of fresh memory can cost twenty times what writing it costs. numpy asks for huge pages, which cost
    far less, from 4 MiB on: all outputs of a batch together reach that sooner, and above 1 MiB the rest is added.
    """
    one = math.prod(shape)
    bytes_needed = count * one * np.dtype(dtype).itemsize
    spare = 0 if bytes_needed < HUGE // 4 else max(0, HUGE - bytes_needed)
    block: Array = np.empty(count * one + spare // np.dtype(dtype).itemsize, dtype=dtype)
    return [block[index * one : (index + 1) * one].reshape(shape) for index in range(count)]


def filling_positions(lengths: Array, count: int) -> Array:
    """Positions of the tokens that fill a padding-free batch behind its last sequence, which they continue, so that
    they are no sequences of their own; none is beyond those of the batch, since learned positions have a last one."""
    positions: Array = np.minimum(lengths[-1] + np.arange(count), lengths.max() - 1)
    return positions


def boundaries(bounds: Array) -> dict[str, Any]:
    """What a padding-free batch says of its sequences, ``[bounds[s], bounds[s + 1])``, under TRL's keys."""
    counts = np.diff(bounds)
    cu_seqlens, longest = torch.from_numpy(bounds.astype(np.int32)), int(counts.max())
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts))[None],
    }


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
