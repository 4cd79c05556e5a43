"""How a loss enters the products of the backward: as one scalar per row, which never touches the tile.

    grad_hidden = post row * (tile W)        grad_weight = post tile^T (row * hidden)        grad_bias = post tile^T row

Rows of hidden states are scaled before their product, rows of its result after it; both are rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import plan
from prefkern.products import mm


class RowScales(NamedTuple):
    """How the loss enters the backward. With the tile ``c u + e p (log p + entropy)`` (``u`` alone where c is None):
    grad_hidden = post row (tile W), grad_weight = post tile^T (row hidden), grad_bias = post tile^T row."""

    c: Tensor | None
    e: Tensor | None
    row: Tensor
    post: Tensor | None

    @staticmethod
    def of(c: Tensor, e: Tensor | None, row: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> "RowScales":
        """``row`` is ``-logit_scale / T``; ``largest``, if given, stands for the largest of ``|c|``."""
        post = None
        if dtype == torch.float16:
            # a loss divided by many tokens underflows in float16: normalised by a power of two, undone in float32
            largest = c.abs().amax() if largest is None else largest
            largest = largest if e is None else torch.maximum(largest, e.abs().amax())
            post = torch.exp2(largest.clamp(min=torch.finfo(c.dtype).tiny).log2().ceil())
            c = c / post
            e = None if e is None else e / post
        return RowScales(c, e, row, post)

    def folded(self) -> "RowScales":
        """Without a gradient of the entropy ``c`` need not enter the tile: it becomes part of ``row``."""
        return self if self.e is not None or self.c is None else self._replace(c=None, row=self.row * self.c)

    def rows(self, rows: slice) -> "RowScales":
        c, e = (None if value is None else value[rows] for value in (self.c, self.e))
        return RowScales(c, e, self.row[rows], self.post)

    def finish(self, product: Tensor) -> Tensor:
        return product if self.post is None else product.mul_(self.post)


def scale_rows(x: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    """``row * x`` rounded once to ``dtype``; what is wider than that is made a block of rows at a time."""
    if x.dtype == row.dtype == dtype:
        return x * row.unsqueeze(-1)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = max(1, (plan.SCRATCH_BYTES if x.is_cuda else plan.CAST_BYTES) // (4 * max(x.shape[1], 1)))
    for start in range(0, x.shape[0], step):
        at = slice(start, start + step)
        out[at] = x[at].to(row.dtype) * row[at].unsqueeze(-1)
    return out


def write_vocabulary(
    tile: Tensor,  # [N, width]
    columns: slice,
    scaled: Tensor | None,  # [N, H]: row hidden
    scales: RowScales,
    grad_weight: Tensor | None,  # [V, H]
    grad_bias: Tensor | None,  # [V]
) -> None:
    """Writes the columns' grad_weight and grad_bias from their tile: ``post tile^T (row hidden)``."""
    wide = scales.row.dtype
    if grad_weight is not None and scaled is not None:
        grad = grad_weight[columns]
        if scales.post is None and (grad.dtype == tile.dtype or (tile.is_cuda and grad.dtype == wide)):
            mm(tile.T, scaled, grad)
        else:
            step = plan.cast_columns(scaled.shape[1], tile.shape[1], wide.itemsize, tile.is_cuda)
            for start in range(0, tile.shape[1], step):
                part = grad[start : start + step]
                product = torch.empty(part.shape, dtype=wide, device=part.device)
                mm(tile[:, start : start + step].T, scaled, product)
                part.copy_(scales.finish(product))
    if grad_bias is not None:
        step = plan.slice_columns(tile.shape[0], tile.shape[1], wide.itemsize)
        for start in range(0, tile.shape[1], step):
            product = torch.mv(tile[:, start : start + step].T.to(wide), scales.row)
            part = grad_bias[columns][start : start + step]
            part.copy_(scales.finish(product))
