"""Shared by the tile functions in plain torch: blocks of rows that the caches hold, and row scaling."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CAST_BYTES = 8 << 20
"""Bytes of the part of a matrix that is widened at once: it stays in the cache."""


def block_elements(rows: int, V: int) -> int:
    """Returns the elements that the tile functions of a CPU take at a time, in whole rows: a sixteenth of the tile, so
    that temporaries stay small beside it, between 2 and 8 MB of float32, which the caches hold. Not fewer: every pass
    over a block waits for all threads, which costs much on busy cores."""
    step = max(1, min(max(rows * V // 16, 1 << 19), 1 << 21) // max(V, 1))
    return min(step, rows) * V


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields the rows of a tile block by block."""
    step = max(1, block_elements(rows, columns) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def clear(gradient: Tensor, ignored: Tensor, outside: Tensor) -> None:
    """Writes zero rows for ignored targets, NaN rows for targets outside the vocabulary."""
    if ignored.any():
        gradient[ignored] = 0.0
    if outside.any():
        gradient[outside] = math.nan


def scale_rows(
    x: Tensor,  # [N, H], of any floating dtype
    row: Tensor,  # [N], as wide as the arithmetic
    out: Tensor,  # [N, H], of any floating dtype; may be `x`
    *,
    post: Tensor | None = None,  # [], a power of two
    other: tuple[Tensor, Tensor] | None = None,  # [N, H] and its factors [N]
) -> None:
    """Writes ``out = post (row x + other_row other)``, rounded once; rows whose factors are 0 are 0, whatever stands in
    x."""
    factors = [factor if post is None else factor * post for factor in (row, *([] if other is None else other[1:]))]
    if other is None and x.dtype == row.dtype == out.dtype:
        torch.mul(x, factors[0].unsqueeze(-1), out=out)
    else:
        step = max(1, CAST_BYTES // (4 * max(x.shape[1], 1)))
        for start in range(0, x.shape[0], step):
            at = slice(start, start + step)
            part = x[at].to(row.dtype) * factors[0][at].unsqueeze(-1)
            if other is not None:
                part.addcmul_(other[0][at].to(row.dtype), factors[1][at].unsqueeze(-1))
            out[at] = part
    unread = (torch.stack(factors) == 0.0).all(0)
    if unread.any():
        out[unread] = 0.0
