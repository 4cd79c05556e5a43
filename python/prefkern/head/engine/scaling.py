"""The way of a loss into the products of the backward: one scalar per row, which never touches the tile.

    grad_hidden = post row * (tile W)        grad_weight = post tile^T (row * hidden)        grad_bias = post tile^T row

Rows of hidden states are scaled before their product, rows of its result after it; both are rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head.engine import blocks
from prefkern.head.engine.products import mm
from prefkern.kernels.interface import Factors, Logits, Scaler


def rate(logits: Logits, dtype: torch.dtype) -> Tensor | float:
    """Returns ``logit_scale / T``, which the raw product's derivative has beside that of the logits."""
    temperature = logits.temperature
    return logits.logit_scale / (temperature.to(dtype) if isinstance(temperature, Tensor) else temperature)


class RowScales(NamedTuple):
    """The loss's share of the backward. With the tile ``c u + e p (log p + entropy)`` (``u`` alone where c is None):
    grad_hidden = post row (tile W), grad_weight = post tile^T (row hidden), grad_bias = post tile^T row."""

    c: Tensor | None
    e: Tensor | None
    row: Tensor
    post: Tensor | None

    @staticmethod
    def from_gradients(
        c: Tensor | None, e: Tensor | None, row: Tensor, dtype: torch.dtype, largest: Tensor | None = None
    ) -> "RowScales":
        """Returns the scales for a tile of ``dtype``. A loss divided by many tokens underflows in float16: there what
        scales, c and e or ``row`` without c, is normalised by a power of two, which ``post`` undoes in float32.
        ``largest``, if given, stands for the largest of ``|c|``, or of ``|row|``."""
        if dtype != torch.float16 or not row.numel():
            return RowScales(c, e, row, None)
        if largest is None:
            largest = (row if c is None else c).abs().amax()
        if e is not None:
            largest = torch.maximum(largest, e.abs().amax())
        undo_power = torch.exp2(largest.clamp(min=torch.finfo(row.dtype).tiny).log2().ceil())
        if c is None:
            return RowScales(None, None, row / undo_power, undo_power)
        return RowScales(c / undo_power, None if e is None else e / undo_power, row, undo_power)

    def folded(self) -> "RowScales":
        """Returns the same for ``u`` alone: without a gradient of the entropy ``c`` becomes part of ``row``."""
        return self if self.e is not None or self.c is None else self._replace(c=None, row=self.row * self.c)

    @property
    def factors(self) -> Factors:
        """Returns the part that enters the tile."""
        return Factors(self.c, self.e)

    def rows(self, rows: slice) -> "RowScales":
        """Returns those of some rows."""
        return RowScales(*self.factors.rows(rows), self.row[rows], self.post)


def scaled_rows(x: Tensor, row: Tensor, dtype: torch.dtype, scaler: Scaler) -> Tensor:
    """Returns ``row * x`` in a new tensor, rounded once to ``dtype``."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scaler.scale_rows(x, row, out)
    return out


def finish(product: Tensor, post: Tensor | None, out: Tensor, scaler: Scaler) -> None:
    """Writes ``out = post product`` of two dimensions; ``out`` may be the product."""
    if post is not None:
        scaler.scale_rows(product, post.expand(product.shape[0]), out)
    elif out is not product:
        out.copy_(product)


def write_weight(
    tile: Tensor,  # [N, width]
    scaled: Tensor,  # [N, H]: row hidden
    scales: RowScales,
    grad: Tensor,  # [width, H]: of the tile's columns
    scaler: Scaler,
    *,
    accumulate: bool = False,
) -> None:
    """Writes the columns' grad_weight, ``post tile^T (row hidden)``. With ``accumulate`` adds to a wide sum instead,
    which waits for its ``post``."""
    wide = scales.row.dtype
    if scales.post is None and (grad.dtype == tile.dtype or (tile.is_cuda and grad.dtype == wide)):
        mm(tile.T, scaled, grad, accumulate=accumulate)
        return
    # where the result must be scaled or narrowed, a part of it at a time
    step = blocks.cast_columns(scaled.shape[1], tile.shape[1], wide.itemsize, tile.is_cuda)
    for start in range(0, tile.shape[1], step):
        part = grad[start : start + step]
        product = torch.empty(part.shape, dtype=wide, device=part.device)
        mm(tile[:, start : start + step].T, scaled, product)
        _put(product, scales.post, part, scaler, accumulate)


def write_bias(
    tile: Tensor,  # [N, width]
    scales: RowScales,
    grad: Tensor,  # [width]: of the tile's columns
    scaler: Scaler,
    *,
    accumulate: bool = False,
) -> None:
    """Writes the columns' grad_bias, ``post tile^T row``; ``accumulate`` as in `write_weight`."""
    wide = scales.row.dtype
    step = blocks.slice_columns(tile.shape[0], tile.shape[1], wide.itemsize)
    for start in range(0, tile.shape[1], step):
        sums = torch.mv(tile[:, start : start + step].T.to(wide), scales.row)
        part = grad[start : start + step]
        _put(sums.unsqueeze(0), scales.post, part.unsqueeze(0), scaler, accumulate)


def _put(product: Tensor, post: Tensor | None, out: Tensor, scaler: Scaler, accumulate: bool) -> None:
    if accumulate:
        out.add_(product)
    else:
        finish(product, post, out, scaler)
