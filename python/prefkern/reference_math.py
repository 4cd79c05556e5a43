"""What the tile functions in plain torch share: blocks of rows that the caches hold, how logits are made; and row
scaling."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prefkern import plan
from prefkern.types import Temperature


def blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, plan.block_elements(rows, columns) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def rows_of(temperature: Temperature, block: slice) -> Temperature:
    return temperature[block] if isinstance(temperature, Tensor) else temperature


def activate(tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor | None:
    """Turns the raw product into logits before the temperature, in place; returns the softcap's derivative."""
    if bias is not None:
        tile.add_(bias)
    if logit_scale != 1.0:
        tile.mul_(logit_scale)
    if softcap is None:
        return None
    masked = tile == -math.inf
    t = tile.div_(softcap).tanh_()
    factor = (1 - t) * (1 + t)
    tile.mul_(softcap).masked_fill_(masked, -math.inf)
    return factor


def center(x: Tensor, row_max: Tensor, temperature: Temperature) -> Tensor:
    """``(x - row_max) / T`` in place, -inf kept; a row without any finite logit stays -inf."""
    x.sub_(row_max.masked_fill(row_max == -math.inf, 0.0).unsqueeze(-1))
    if isinstance(temperature, Tensor):
        x.div_(temperature.unsqueeze(-1))
    elif temperature != 1.0:
        x.div_(temperature)
    return x


def clear(gradient: Tensor, ignored: Tensor, outside: Tensor) -> None:
    """Zero rows for ignored targets, NaN rows for targets outside the vocabulary."""
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
    """``out = post (row x + other_row other)``, rounded once; rows whose factors are 0 are 0, whatever stands in x."""
    factors = [factor if post is None else factor * post for factor in (row, *([] if other is None else other[1:]))]
    if other is None and x.dtype == row.dtype == out.dtype:
        torch.mul(x, factors[0].unsqueeze(-1), out=out)
    else:
        step = max(1, plan.CAST_BYTES // (4 * max(x.shape[1], 1)))
        for start in range(0, x.shape[0], step):
            at = slice(start, start + step)
            part = x[at].to(row.dtype) * factors[0][at].unsqueeze(-1)
            if other is not None:
                part.addcmul_(other[0][at].to(row.dtype), factors[1][at].unsqueeze(-1))
            out[at] = part
    unread = (torch.stack(factors) == 0.0).all(0)
    if unread.any():
        out[unread] = 0.0
