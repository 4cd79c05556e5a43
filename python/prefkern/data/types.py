"""Results of the functions of `prefkern.data`, read by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Advantages(NamedTuple):
    """Advantages and returns, of the rewards' kind (numpy, torch, list, Arrow), dtype and shape; 0 where masked."""

    advantages: Any
    returns: Any


class Packs(NamedTuple):
    """Items in bins, int64: bin b holds the items ``order[offsets[b] : offsets[b + 1]]``."""

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]


class RefusedRow(NamedTuple):
    """A row that cannot be used: its number in the dataset, from 0 (in a file the number of its line less one)."""

    row: int
    reason: str


class Prepared(NamedTuple):
    """What `prefkern.data.prepare` made of the rows, and what it recognised in them; its ``str`` is one line."""

    dataset: Any
    """A ``datasets.Dataset`` of token ids, in the order of the rows."""
    format: str
    columns: Mapping[str, str]
    """The source's name of each column that was read."""
    rows: int
    """Rows that were read, refused ones included."""
    conversational: int
    """Rows of messages; the others are text."""
    merged: int
    """Rows whose prompt ends in tokens that merge with the completion's; these tokens belong to the completion."""
    cut: int
    """Rows with more than max_length tokens, which are cut."""
    refused: tuple[RefusedRow, ...]
    unused: tuple[str, ...]
    """Columns of the source that were left out."""
    reworded: int
    """Rows whose chat template ends the prompt otherwise when nothing follows it (a block of thoughts that it opens);
    what differs belongs to the completion."""
    implicit: int
    """Rows whose prompt is the beginning that chosen and rejected share."""

    def __str__(self) -> str:
        kinds = {0: "text", self.rows - len(self.refused): "conversations"}
        kind = kinds.get(self.conversational, f"{self.conversational} of them conversations")
        notes = [
            f"{len(self.refused)} refused",
            f"{self.cut} cut to max_length",
            f"{self.merged} merged at the boundary",
            f"{self.reworded} whose prompt the chat template ends otherwise before a completion",
        ]
        if 0 < self.implicit < self.rows - len(self.refused):
            notes.append(f"{self.implicit} without a prompt, which is what chosen and rejected share")
        if self.unused:
            more = f" and {len(self.unused) - 20} more" if len(self.unused) > 20 else ""
            notes.append(f"columns left out: {', '.join(self.unused[:20])}{more}")
        if self.format in ("text", "messages"):
            notes.append("every token is scored")
        notes = [note for note in notes if not note.startswith("0 ")]
        read = ", ".join(name if name == column else f"{name} (from {column})" for name, column in self.columns.items())
        made = ", ".join(self.dataset.column_names)
        return f"{self.format} ({kind}): {self.rows} rows of {read} -> {made}{''.join(f'; {note}' for note in notes)}"


class MaskedStats(NamedTuple):
    """How many numbers were scored, their mean, and ``m2``, the sum of their squared deviations from it, in float64."""

    n: int
    mean: float
    m2: float

    def merge(self, other: "MaskedStats") -> "MaskedStats":
        """The statistics of both together, by Chan's formula, which subtracts no large numbers."""
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        share = other.n / n
        apart = other.mean - self.mean
        return MaskedStats(n, self.mean + apart * share, self.m2 + other.m2 + apart * apart * share * self.n)

    @property
    def variance(self) -> float:
        """``m2 / (n - 1)``; 0 with fewer than two numbers."""
        return self.m2 / (self.n - 1) if self.n > 1 else 0.0


class Flat(NamedTuple):
    """A padding-free batch: row b of the padded one of ``shape`` is ``[cu_seqlens[b], cu_seqlens[b + 1])``.

    ``indices [N]`` are the places of the tokens in the padded batch read row by row.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    shape: tuple[int, int]

    def model_inputs(self, *, labels: bool = False) -> dict[str, Any]:
        """The keyword arguments of a transformers model that runs without padding (flash or flex attention).

        ``labels``: the ids too, with -100 at the first token of each row, which nothing predicts.
        """
        inputs = {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }
        if labels:
            inputs["labels"] = self._labels()[None]
        return inputs

    def _labels(self) -> Tensor:
        if not self.input_ids.is_cpu:
            return self.input_ids.masked_fill(self.position_ids == 0, -100)
        ids, first = self.input_ids.clone(), self.cu_seqlens[:-1].numpy()
        ids.numpy()[first[: first.searchsorted(len(ids))]] = -100  # empty rows at the end have no token
        return ids


class Kept(NamedTuple):
    """The rows that `prefkern.data.drop_zero_advantage` kept: ``indices [K]`` of the whole batch, and their batch.

    ``tokens`` and ``rows`` count those of the whole batch: the normalisers with which the loss is that of all rows.
    """

    indices: Tensor
    batch: dict[str, Any]
    tokens: int
    rows: int
