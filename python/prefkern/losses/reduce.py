"""Sums and means over tokens, sequences and rows. A mean over nothing is 0, with a graph and a zero gradient."""

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefkern.types import Reduction

TokenReduction = Literal["token", "sequence", "sequence_sum", "fixed", "none"]


def widen(x: Tensor) -> Tensor:
    """float32, or float64 where it was that: what all row mathematics is done in."""
    return x if x.dtype == torch.float64 else x.float()


def scored(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x``, widened, 0 where not scored: applied before any mathematics, so that no masked value reaches a result."""
    return widen(x) if mask is None else widen(x).masked_fill(~mask, 0.0)


def scored_mask(mask: Tensor | None, targets: Tensor | None, ignore_index: int = -100) -> Tensor | None:
    """Where a token is scored: ``targets != ignore_index``, and the mask where one is given; None is everywhere."""
    if targets is None:
        return mask
    return targets != ignore_index if mask is None else mask & (targets != ignore_index)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x < 0; near 0, where ``e^x`` rounds to 1, log1p would have an infinite gradient to mask."""
    near = x > -math.log(2.0)
    by_expm1 = torch.log(-torch.expm1(x))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -math.log(2.0), x)))
    return torch.where(near, by_expm1, by_log1p)


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """``total / count``, 0 (with total's graph) where the count is 0."""
    if isinstance(count, Tensor):
        count = count.to(total.dtype)
        empty = count == 0
        return (total / count.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return total / count if count else total * 0.0


def masked_mean(x: Tensor, mask: Tensor | None, normalizer: Tensor | float | None = None) -> Tensor:
    """``sum over scored x / normalizer``, by default the number scored."""
    if normalizer is None:
        normalizer = x.numel() if mask is None else mask.sum()
    return divide(scored(x, mask).sum(), normalizer)


def masked_means(named: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """`masked_mean` of each, for metrics: one count and one division for all of them, and flags are counted as such."""
    count = next(iter(named.values())).numel() if mask is None else mask.sum()
    outside = None if mask is None else ~mask

    def total(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return (x if mask is None else x & mask).sum().float()
        return (widen(x) if outside is None else widen(x).masked_fill(outside, 0.0)).sum()

    sums = [total(x) for x in named.values()]
    means = divide(torch.stack(sums), count).unbind()
    return {name: mean.to(own.dtype) for name, mean, own in zip(named, means, sums, strict=True)}


def reduce_rows(x: Tensor, reduction: Reduction) -> Tensor:
    """``x [B]`` as its mean or sum, or as it is."""
    if reduction == "none":
        return x
    return x.sum() if reduction == "sum" else divide(x.sum(), x.numel())


def sequence_sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``x [B, T]``, or packed ``x [N]`` with ``cu_seqlens [S + 1]``, summed per sequence; an empty sequence gives 0.

    Packed sums are as exact as padded ones. ``torch.segment_reduce`` adds up one by one, which in float32 is 0.7 nats
    off over 131,072 tokens: it gets float64, and on the CPU numpy's pairwise sums, which are also faster.
    """
    if cu_seqlens is None:
        return x.sum(dim=-1)
    if not x.is_cpu or torch.compiler.is_compiling():
        return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens).to(x.dtype)
    if x.requires_grad and torch.is_grad_enabled():
        sums: Tensor = _PairwiseSums.apply(x, cu_seqlens)
        return sums
    offsets = cu_seqlens.numpy()
    return _pairwise_sums(x, offsets[:-1], offsets[1:] - offsets[:-1])


def _pairwise_sums(x: Tensor, begins: NDArray[Any], lengths: NDArray[Any]) -> Tensor:
    values = x.numpy()
    if lengths.all():
        return torch.from_numpy(np.add.reduceat(values, begins))
    sums = x.new_zeros(len(lengths))  # reduceat takes an empty sequence for its first token: those are left out
    if lengths.any():
        filled = lengths > 0
        sums.numpy()[filled] = np.add.reduceat(values, begins[filled])
    return sums


class _PairwiseSums(torch.autograd.Function):
    """``_pairwise_sums`` with a gradient: each token gets that of its sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        offsets = cu_seqlens.numpy()
        ctx.lengths = offsets[1:] - offsets[:-1]
        return _pairwise_sums(x, offsets[:-1], ctx.lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(np.repeat(grad.numpy(), ctx.lengths)), None


def sequence_lengths(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of scored tokens of each sequence of ``x``, int64 ``[S]``."""
    if cu_seqlens is None:
        return x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64) if mask is None else mask.sum(dim=-1)
    if mask is None:
        return cu_seqlens.diff().to(torch.int64)
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[cu_seqlens].diff()


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence of each of ``total`` packed tokens, ``[N]``; empty sequences own none."""
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def per_token(rows: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One value per sequence, ``[S]``, as one value per token, shaped like ``like``."""
    if cu_seqlens is None:
        return rows.unsqueeze(-1).expand(like.shape)
    return rows[sequence_ids(cu_seqlens, like.shape[0])]


def reduce_tokens(
    x: Tensor,
    mask: Tensor | None,
    *,
    reduction: TokenReduction,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    length: float | None = None,
) -> Tensor:
    """``x [B, T]`` or packed ``[N]``, reduced over its scored tokens.

    ``token``: sum / normalizer, by default the number of scored tokens. ``sequence``: the sum over sequences of their
    token means, / normalizer, by default the number of sequences, empty ones included. ``sequence_sum``: the same of
    token sums. ``fixed``: the same of token sums / ``length``, by default T. ``none``: per token, 0 where not scored.
    """
    if reduction == "token":
        return masked_mean(x, mask, normalizer)
    x = scored(x, mask)
    if reduction == "none":
        return x
    rows = sequence_sums(x, cu_seqlens)
    if reduction == "sequence":
        rows = divide(rows, sequence_lengths(x, mask, cu_seqlens))
    if reduction == "fixed":
        rows = divide(rows, x.shape[-1] if length is None else length)
    return divide(rows.sum(), rows.numel() if normalizer is None else normalizer)
