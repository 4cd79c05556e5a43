"""One head: hidden states, the output matrix and how logits are made of their product; and that product."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks
from prefkern.head.engine.adapter import Adapter, LowRank
from prefkern.head.engine.products import Weight
from prefkern.kernels.interface import Logits


class Head(NamedTuple):
    """Hidden states and the output matrix, with the dtype of the operands in their products."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    logits: Logits
    dtype: torch.dtype
    adapter: Adapter | None = None

    def rows(self, rows: slice) -> "Head":
        """Returns the head of some rows."""
        return self._replace(hidden=self.hidden[rows], logits=self.logits.rows(rows))


class RawProduct:
    """``hidden W^T`` with the adapter's share, accumulated and kept in float32: what logits are made of."""

    def __init__(self, head: Head, *, keep: bool = False, scratch: int = blocks.SCRATCH_BYTES) -> None:
        self.weight = Weight(head.weight, head.dtype, keep=keep, scratch=scratch)
        self.operand = head.hidden.to(head.dtype)
        self.adapter = None if head.adapter is None else LowRank(head.adapter, self.operand, self.weight.wide)

    def write(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Writes some rows and columns of the product into a tile."""
        self.weight.logits(self.operand[rows], columns, out)
        if self.adapter is not None:
            self.adapter.add(rows, columns, out)
