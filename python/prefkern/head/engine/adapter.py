"""An adapter of the head's weight, beside it in every product and never merged."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine.products import Weight, mm


class Adapter(NamedTuple):
    """A low-rank addition to the weight, which is never merged: ``W + scale B A``."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class LowRank:
    """The adapter's share of the logits, in float32: ``x B^T`` with ``x = scale h A^T``."""

    def __init__(self, adapter: Adapter, hidden: Tensor, wide: torch.dtype) -> None:
        self.x = torch.empty(hidden.shape[0], adapter.a.shape[0], dtype=wide, device=hidden.device)
        Weight(adapter.a, hidden.dtype).logits(hidden, slice(0, adapter.a.shape[0]), self.x)
        self.x.mul_(adapter.scale)
        self._b = adapter.b.to(hidden.dtype).to(wide)

    def add(self, rows: slice, columns: slice, tile: Tensor) -> None:
        mm(self.x[rows], self._b[columns].T, tile, accumulate=True)
