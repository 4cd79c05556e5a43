"""The head in one pass: ``sum_t c_t log p_t``, and its gradients made in the forward, in bounded memory.

Where the factor ``c_t`` of every row is known beforehand, as in the cross-entropy with a given count, nothing has to
wait for the backward. A *panel* of rows at a time, with ``u = p - 1[y]`` and ``r = -c (logit_scale / T)``:

    grad_hidden = r * (u W)           grad_weight += u^T (r * hidden)          grad_bias += u^T r

and the panel is overwritten by the next. Three products (two where the weight or the hidden states need no gradient,
one where nothing does), whatever the memory; what the panels cost beside them is one addition to grad_weight each.
Sums over panels are kept in float32: many small panels are as accurate as one. On a CPU ``u`` is written over the
float32 logits; on an accelerator the panel holds ``u`` in the operands' dtype, filled through a smaller float32 tile.

The upstream gradient of the sum is one number, applied afterwards by `scale_`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import plan
from prefkern.products import Weight, mm
from prefkern.tiles import Logits, Tiles, empty_tile
from prefkern.types import RowStats

TILE_BYTES = 64 << 20
MIN_ROWS = 256
"""Of a panel on a CPU by default. Adding a panel to grad_weight moves 8 V H bytes for its 6 C V H operations: with 512
rows a few percent of the time."""


CAST_BYTES = 8 << 20
"""Of a cast slice of the weight on a CPU: it is still in the cache when it is multiplied."""


class Tiling(NamedTuple):
    """Rows of a panel, and rows of the float32 tile through which it is filled."""

    panel: int
    chunk: int


def tiling(H: int, V: int, wide: int, held: int, max_memory: int | None) -> Tiling:
    """For logits of ``wide`` bytes and ``u`` of ``held`` bytes an entry (0: written over the logits). Both together
    take at most ``max_memory`` bytes, but are never less than a row. By default 64 MiB or 256 rows on a CPU; elsewhere
    a panel of the ``4 V H`` bytes that the float32 sum of grad_weight takes, and at least 1 GiB: then the additions to
    that sum cost little, and up to ``2 H`` rows of 16 bits need none."""
    if not held:
        rows = max(MIN_ROWS, TILE_BYTES // (V * wide)) if max_memory is None else max_memory // (V * wide)
        return Tiling(max(rows, 1), max(rows, 1))
    chunk = plan.chunk_rows(V, wide)
    if max_memory is None:
        return Tiling(max(plan.limits(H, V, held, plan.budget(H, V, None)).held, 1), chunk)
    chunk = max(1, min(chunk, max_memory // (V * (wide + held))))
    return Tiling(max(chunk, (max_memory - chunk * V * wide) // (V * held)), chunk)


class Gradients(NamedTuple):
    """Where the gradients go, every element of them; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Scales(NamedTuple):
    """``r`` of each row, and the power of two that was taken out of it for float16 operands."""

    row: Tensor
    post: Tensor | None

    @staticmethod
    def of(coefficients: Tensor, targets: Tensor, logits: Logits, dtype: torch.dtype) -> "_Scales":
        wide = coefficients.dtype
        temperature = logits.temperature.to(wide) if isinstance(logits.temperature, Tensor) else logits.temperature
        row = coefficients * -logits.logit_scale / temperature
        row = row.masked_fill(targets == logits.ignore_index, 0.0)
        if dtype != torch.float16 or not row.numel():
            return _Scales(row, None)
        largest = row.abs().amax().clamp(min=torch.finfo(wide).tiny)
        post = torch.exp2(largest.log2().ceil())  # 1 / N is below float16's normal numbers
        return _Scales(row / post, post)

    def finish(self, product: Tensor) -> Tensor:
        return product if self.post is None else product.mul_(self.post)


class Head(NamedTuple):
    """What the sum is of."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    logits: Logits
    compute_dtype: torch.dtype  # of the operands in the products


def run(
    head: Head,
    coefficients: Tensor,  # [N] float32 (float64 for float64 operands)
    stats: RowStats,
    grads: Gradients,
    tiles: Tiles,
    max_memory: int | None,
) -> None:
    """Fills ``stats`` and ``grads``."""
    N, H = head.hidden.shape
    V = head.weight.shape[0]
    w = Weight(head.weight, head.compute_dtype)
    dtype = w.wide if tiles.IN_PLACE else head.compute_dtype  # of u, and of the factors of its products
    size = tiling(H, V, w.wide.itemsize, 0 if tiles.IN_PLACE else dtype.itemsize, max_memory)
    rows = _even(N, size.panel)
    tile = empty_tile(min(size.chunk, rows), V, w.wide, head.hidden.device)
    u = tile
    if not tiles.IN_PLACE:
        u = empty_tile(rows, V, dtype, head.hidden.device)

    wanted = any(grad is not None for grad in grads)
    scales = _Scales.of(coefficients, head.targets, head.logits, dtype)
    totals = _Totals(grads, w.wide, dtype, single=rows >= N)
    for start in range(0, N, rows):
        panel = slice(start, min(start + rows, N))
        for first in range(start, panel.stop, tile.shape[0]):
            at = slice(first, min(first + tile.shape[0], panel.stop))
            _fold(
                head,
                w,
                at,
                tile[: at.stop - first],
                stats,
                u[first - start : at.stop - start] if wanted else None,
                tiles,
            )
        if wanted:
            _add_panel(head, w, u[: panel.stop - start], panel, scales._replace(row=scales.row[panel]), grads, totals)
    totals.finish(scales)


def _fold(head: Head, w: Weight, at: slice, tile: Tensor, stats: RowStats, u: Tensor | None, tiles: Tiles) -> None:
    """The logits of some rows, their statistics and, if wanted, their ``u``."""
    logits = head.logits
    w.logits(head.hidden[at].to(head.compute_dtype), slice(0, head.weight.shape[0]), tile)
    tiles.tile_fwd(
        tile,
        logits.bias,
        head.targets[at],
        RowStats._make(None if value is None else value[at] for value in stats),
        u,
        logit_scale=logits.logit_scale,
        softcap=logits.softcap,
        temperature=logits.temperature[at] if isinstance(logits.temperature, Tensor) else logits.temperature,
        ignore_index=logits.ignore_index,
    )


def _add_panel(
    head: Head, w: Weight, u: Tensor, panel: slice, scales: _Scales, grads: Gradients, totals: "_Totals"
) -> None:
    wide = scales.row.dtype
    if grads.hidden is not None:
        product = grads.hidden[panel]
        if product.dtype != wide:
            product = torch.empty_like(product, dtype=wide)
        w.hidden(u, slice(0, u.shape[1]), product)
        scales.finish(product.mul_(scales.row.unsqueeze(-1)))
        if product.dtype != grads.hidden.dtype:
            grads.hidden[panel] = product
    scaled = None
    if grads.weight is not None:
        operand = head.hidden[panel].to(head.compute_dtype).to(wide)
        scaled = (operand * scales.row.unsqueeze(-1)).to(u.dtype)
    totals.add(u, scaled, scales)


def _even(N: int, rows: int) -> int:
    """Panels of about equal size: a last one of few rows would cost as much as a whole one in additions."""
    panels = max(1, -(-N // rows))
    return max(1, -(-N // panels))


class _Totals:
    """The sums over panels: grad_weight and grad_bias, wide until the last panel."""

    def __init__(self, grads: Gradients, wide: torch.dtype, u_dtype: torch.dtype, *, single: bool) -> None:
        self._grads, self._wide, self._empty = grads, wide, True
        self._weight, self._bias = grads.weight, grads.bias
        if grads.weight is not None and grads.weight.dtype != wide and not (single and grads.weight.dtype == u_dtype):
            # what is not summed in place is summed beside it; a single panel is rounded slice by slice
            self._weight = None if single else torch.empty_like(grads.weight, dtype=wide)
        if grads.bias is not None and grads.bias.dtype != wide:
            self._bias = torch.empty_like(grads.bias, dtype=wide)

    def add(self, u: Tensor, scaled: Tensor | None, scales: _Scales) -> None:
        """A panel: ``u [C, V]``, ``scaled = r * hidden [C, H]`` in the dtype of u, and its ``r``."""
        grad = self._grads.weight
        if self._weight is not None and scaled is not None:
            mm(u.T, scaled, self._weight, accumulate=not self._empty)
        elif grad is not None and scaled is not None:
            step = plan.slice_columns(grad.shape[1], grad.shape[0], self._wide.itemsize)
            for start in range(0, grad.shape[0], step):
                part = grad[start : start + step]
                product = torch.empty_like(part, dtype=self._wide)
                mm(u[:, start : start + step].T, scaled, product)
                part.copy_(scales.finish(product))
        if self._bias is not None:
            step = plan.slice_columns(u.shape[0], u.shape[1], self._wide.itemsize)
            for start in range(0, u.shape[1], step):
                part = self._bias[start : start + step]
                column_sums = torch.mv(u[:, start : start + step].T.to(self._wide), scales.row)
                part.copy_(column_sums) if self._empty else part.add_(column_sums)
        self._empty = False

    def finish(self, scales: _Scales) -> None:
        for grad, total in zip(self._grads[1:], (self._weight, self._bias), strict=True):
            if grad is not None and self._empty:
                grad.zero_()
            elif grad is not None and total is not None:
                scales.finish(total)
                if total is not grad:
                    grad.copy_(total)


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor`` in place, rounded once, without a wait for the device; returns ``grad``."""
    if grad.device.type == "cpu" or grad.dtype == factor.dtype:
        return grad.mul_(factor)  # a CPU multiplies 16 bits by a wider number without rounding that first
    flat = grad.view(-1)
    step = plan.SCRATCH_BYTES // factor.element_size()
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        part.copy_(part.to(factor.dtype).mul_(factor))
    return grad
