"""From tokens to sequences: aligned targets, sequence log-probabilities, and those of preference pairs."""

import torch
from torch import Tensor

from prefkern.losses.reduce import divide, per_token, scored, sequence_ids, sequence_lengths, sequence_sums
from prefkern.types import PairLogps


def shift_labels(
    labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """``targets[t] = labels[t + 1]`` where that token is in the same sequence and in ``mask``, else ignore_index."""
    if mask is not None:
        labels = labels.masked_fill(~mask, ignore_index)
    targets = labels.roll(-1, dims=-1)
    if cu_seqlens is None:
        last = torch.arange(labels.shape[-1], device=labels.device) == labels.shape[-1] - 1
    else:
        begins = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
        last = begins.index_fill(0, cu_seqlens.long(), True)[1:]
    return targets.masked_fill(last, ignore_index)


def scored_mask(mask: Tensor | None, targets: Tensor | None, ignore_index: int = -100) -> Tensor | None:
    """Where a token is scored: ``targets != ignore_index``, and the mask where one is given; None is everywhere."""
    if targets is None:
        return mask
    return targets != ignore_index if mask is None else mask & (targets != ignore_index)


def sequence_logps(logps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *, average: bool) -> Tensor:
    """The sum, or mean, of ``logps`` over the scored tokens of each sequence."""
    sums = sequence_sums(scored(logps, mask), cu_seqlens)
    return divide(sums, sequence_lengths(logps, mask, cu_seqlens)) if average else sums


def pair_logps(
    logps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *, ld_alpha: float | None, average: bool
) -> PairLogps:
    """Sequence log-probabilities of rows ``[2B]``, chosen first, with their scored lengths.

    With ``ld_alpha``, scored tokens past the shorter length of the pair count ``ld_alpha`` times.
    """
    logps = scored(logps, mask)
    lengths = sequence_lengths(logps, mask, cu_seqlens)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    if ld_alpha is not None:
        shared = per_token(torch.minimum(chosen_lengths, rejected_lengths).repeat(2), logps, cu_seqlens)
        tail = _ordinals(logps, mask, cu_seqlens) > shared
        logps = torch.where(tail, ld_alpha * logps, logps)
    sums = sequence_sums(logps, cu_seqlens)
    chosen, rejected = (divide(sums, lengths) if average else sums).chunk(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)


def _ordinals(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of scored tokens of its own sequence up to and with each token."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    counted = mask.cumsum(-1)
    if cu_seqlens is None:
        return counted
    before = torch.nn.functional.pad(counted, (1, 0))[cu_seqlens]
    return counted - before[sequence_ids(cu_seqlens, x.shape[0])]
