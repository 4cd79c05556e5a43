"""The gradients of a head's inputs, made of its gradient tiles by two products each:

grad_hidden = post row * (tile W)        grad_weight = post tile^T (row * hidden)        grad_bias = post tile^T row
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine.adapter import AdapterGradients, LowRank
from prefkern.head.engine.head import Head
from prefkern.head.engine.products import Weight
from prefkern.head.engine.scaling import RowScales, finish, scaled_rows, write_bias, write_weight
from prefkern.kernels.interface import Scaler


class Gradients(NamedTuple):
    """Destinations of the gradients of a head's inputs, every element of which is written; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None

    def zero_(self) -> None:
        """Writes zeros."""
        for grad in self:
            if grad is not None:
                grad.zero_()


class HeadGradients:
    """Fills `Gradients` from tiles of ``tile_dtype`` that cover all rows and all columns of the vocabulary.

    Either all rows come in one slice of the vocabulary after the other, or the whole vocabulary in one ``panel`` of
    rows after the other. A row's grad_hidden is summed over slices, in float32; the other gradients are summed over
    panels, in float32 until `finish` scales and narrows them."""

    def __init__(
        self,
        head: Head,
        w: Weight,
        grads: Gradients,
        scales: RowScales,
        scaler: Scaler,
        tile_dtype: torch.dtype,
        *,
        adapter: LowRank | None = None,
        panel: int | None = None,  # rows of a panel; None: all
    ) -> None:
        self._head, self._w, self._grads, self._scales, self._scaler = head, w, grads, scales, scaler
        self._tile_dtype = tile_dtype
        self._adapter = None
        if adapter is not None:
            needs_x = grads.hidden is not None or grads.a is not None
            self._adapter = AdapterGradients(adapter, scales, grads.a, grads.b, scaler, needs_x=needs_x)
        self._several = panel is not None and panel < head.hidden.shape[0]
        self._weight, self._bias = (
            grad if grad is None or not self._several or grad.dtype == w.wide else torch.empty_like(grad, dtype=w.wide)
            for grad in (grads.weight, grads.bias)
        )
        self._product: Tensor | None = None  # tile W of the rows at hand
        self._scaled: Tensor | None = None  # row hidden

    def add(self, tile: Tensor, columns: slice, rows: slice | None = None) -> None:
        """Adds the gradient tile of some columns of all rows, or of all columns of some rows."""
        rows = slice(0, tile.shape[0]) if rows is None else rows
        scales = self._scales.rows(rows)
        last = columns.stop == self._head.weight.shape[0]
        self._add_to_hidden(tile, columns, rows)
        if last:  # scaled now, so that this product is gone before the weight's is made
            self._finish_hidden(rows, scales)
        self._add_to_weight(tile, columns, rows, scales._replace(post=None) if self._several else scales)
        if last:
            self._scaled = None

    def _add_to_hidden(self, tile: Tensor, columns: slice, rows: slice) -> None:
        """Adds ``tile W`` to the sum over slices of the vocabulary, and the adapter's beside it."""
        if self._grads.hidden is not None:
            if columns.start == 0:
                out, wide = self._grads.hidden[rows], self._w.wide
                self._product = out if out.dtype == wide else torch.empty(out.shape, dtype=wide, device=out.device)
            assert self._product is not None
            self._w.times_weight(tile, columns, self._product, accumulate=columns.start > 0)
        if self._adapter is not None:
            self._adapter.add(tile, columns)

    def _finish_hidden(self, rows: slice, scales: RowScales) -> None:
        """Scales grad_hidden of rows of which no other slice follows."""
        if self._adapter is not None:
            self._adapter.finish(self._product)
        if self._product is not None and self._grads.hidden is not None:
            self._scaler.scale_rows(self._product, scales.row, self._grads.hidden[rows], post=scales.post)
            self._product = None

    def _add_to_weight(self, tile: Tensor, columns: slice, rows: slice, scales: RowScales) -> None:
        """Adds ``tile^T (row hidden)`` and ``tile^T row``; sums over panels wait for ``post``."""
        later = rows.start > 0
        if self._weight is not None:
            if columns.start == 0:  # once, for every slice
                hidden = self._head.hidden[rows]
                if self._tile_dtype != self._head.dtype:
                    hidden = hidden.to(self._head.dtype)  # a CPU's wide tile: rounded as the product's operand is
                self._scaled = scaled_rows(hidden, scales.row, self._tile_dtype, self._scaler)
            assert self._scaled is not None
            write_weight(tile, self._scaled, scales, self._weight[columns], self._scaler, accumulate=later)
        if self._bias is not None:
            write_bias(tile, scales, self._bias[columns], self._scaler, accumulate=later)

    def finish(self) -> None:
        """Scales and narrows what was summed over several panels."""
        if self._several:
            for total, grad in ((self._weight, self._grads.weight), (self._bias, self._grads.bias)):
                if total is not None and grad is not None:
                    finish(_matrix(total), self._scales.post, _matrix(grad), self._scaler)


def _matrix(grad: Tensor) -> Tensor:
    return grad if grad.ndim == 2 else grad.unsqueeze(0)
