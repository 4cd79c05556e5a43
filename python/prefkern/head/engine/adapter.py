"""An adapter of the head's weight, beside it in every product and never merged."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine.products import Weight, mm
from prefkern.head.engine.scaling import RowScales, finish, scaled_rows, write_weight
from prefkern.kernels.interface import Scaler


class Adapter(NamedTuple):
    """A low-rank addition to the weight, which is never merged: ``W + scale B A``."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class LowRank:
    """The adapter's share of the logits, in float32: ``x B^T`` with ``x = scale h A^T``."""

    def __init__(self, adapter: Adapter, hidden: Tensor, wide: torch.dtype) -> None:
        self.given, self.hidden = adapter, hidden
        self.x = torch.empty(hidden.shape[0], adapter.a.shape[0], dtype=wide, device=hidden.device)
        Weight(adapter.a, hidden.dtype).logits(hidden, slice(0, adapter.a.shape[0]), self.x)
        self.x.mul_(adapter.scale)
        self._b = adapter.b.to(hidden.dtype).to(wide)

    def add(self, rows: slice, columns: slice, tile: Tensor) -> None:
        """Adds the share of some rows and columns to their tile."""
        mm(self.x[rows], self._b[columns].T, tile, accumulate=True)


class AdapterGradients:
    """The adapter's backward, beside the weight's: a second, narrow pair of hidden states x and weight B, then A."""

    def __init__(
        self,
        adapter: LowRank,
        scales: RowScales,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
        scaler: Scaler,
        *,
        needs_x: bool,
    ) -> None:
        self._adapter, self._scales, self._grad_a, self._grad_b, self._scaler = adapter, scales, grad_a, grad_b, scaler
        self._dtype = adapter.hidden.dtype
        self._b = Weight(adapter.given.b, self._dtype)
        self._scaled = None if grad_b is None else scaled_rows(adapter.x, scales.row, self._dtype, scaler)
        self._grad_x = torch.empty_like(adapter.x) if needs_x else None

    def add(self, tile: Tensor, columns: slice) -> None:
        """Adds a slice of the vocabulary to the gradient of x, and writes that of B in its columns."""
        if self._grad_x is not None:
            self._b.times_weight(tile, columns, self._grad_x, accumulate=columns.start > 0)
        if self._grad_b is not None and self._scaled is not None:
            write_weight(tile, self._scaled, self._scales, self._grad_b[columns], self._scaler)

    def finish(self, grad_hidden: Tensor | None) -> None:
        """Adds the adapter's share to ``grad_hidden``, whose rows are not scaled yet, and writes A's gradient."""
        if self._grad_x is None:
            return
        grad_x, a = self._grad_x.mul_(self._adapter.given.scale), self._adapter.given.a
        if grad_hidden is not None:
            mm(grad_x, a.to(self._dtype).to(grad_x.dtype), grad_hidden, accumulate=True)
        if self._grad_a is not None:
            product = torch.empty(a.shape, dtype=grad_x.dtype, device=grad_x.device)
            scaled = scaled_rows(grad_x, self._scales.row, self._dtype, self._scaler)
            mm(scaled.T, self._adapter.hidden, product)
            finish(product, self._scales.post, self._grad_a, self._scaler)
