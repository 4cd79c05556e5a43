"""From tokens to sequences: aligned targets, sequence log-probabilities, those of pairs, and the weights of pairs."""

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.reduce import divide, per_token, scored, sequence_ids, sequence_lengths, sequence_sums
from prefkern.types import PairLogps


def shift_labels(
    input_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Aligned targets from Hugging Face labels: ``targets[t] = input_ids[t + 1]``, the token that row t predicts.

    Hugging Face labels are unshifted (label t is token t, the shift happens inside the model); every function here
    takes targets aligned with the row that predicts them.

    Args:
        input_ids: token ids or labels, int64 or int32, ``[B, T]``, one sequence ``[T]``, or packed ``[N]``. Labels
            that are ``ignore_index`` stay so.
        mask: which *tokens* are scored (TRL's ``completion_mask``), bool or 0/1, shaped like ``input_ids``; it is
            shifted with them.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences: no target crosses a boundary.

    Returns:
        Targets of the shape and dtype of ``input_ids``; the last position of each sequence is ``ignore_index``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, mask value or offset, by name.
    """
    where = "shift_labels"
    inputs.required(where, input_ids=input_ids)
    check.integer(where, input_ids=input_ids)
    if input_ids.ndim == 0 or (cu_seqlens is not None and input_ids.ndim != 1):
        layout = "[B, T] or [T]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        check.fail(where, f"input_ids must be {layout}, got {check.describe(input_ids)}")
    mask = check.mask(where, "mask", mask, input_ids.shape)
    check.same_device(where, input_ids=input_ids, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check.offsets(where, cu_seqlens, input_ids.numel())
    if mask is not None:
        input_ids = input_ids.masked_fill(~mask, ignore_index)
    targets = input_ids.roll(-1, dims=-1)
    if cu_seqlens is None:
        last = torch.arange(input_ids.shape[-1], device=input_ids.device) == input_ids.shape[-1] - 1
    else:
        begins = torch.zeros(input_ids.shape[0] + 1, dtype=torch.bool, device=input_ids.device)
        last = begins.index_fill(0, cu_seqlens.long(), True)[1:]
    return targets.masked_fill(last, ignore_index)


def sequence_logps(
    logps: Tensor,
    *,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """The log-probability of each sequence: the sum of its scored tokens', ``sum_t m_t lp_t``, or their mean.

    Scored is ``targets != ignore_index`` and ``mask``, where given; with neither, every token. A sequence with
    nothing scored gives 0, with a graph and a zero gradient.

    Args:
        logps: per token, padded ``[B, T]``, or packed ``[N]`` with ``cu_seqlens [S + 1]``.
        mask: bool or 0/1, shaped like ``logps``. What it excludes never reaches the result, NaN and inf included.
        targets: the targets that ``logps`` were scored against, shaped like it.
        average: divide by the number of scored tokens. Padded rows then need ``targets`` or ``mask``: padding is part
            of no sum, but of every count.

    Returns:
        ``[B]`` or ``[S]``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, mask value or offset, by name.
    """
    where = "sequence_logps"
    inputs.tokens(where, cu_seqlens, logps=logps)
    inputs.sequences(where, "logps", logps, cu_seqlens)
    mask = inputs.scored(where, logps, mask, targets, ignore_index)
    if average:
        _check_counted(where, "average=True", mask, cu_seqlens)
    sums = sequence_sums(scored(logps, mask), cu_seqlens)
    return divide(sums, sequence_lengths(logps, mask, cu_seqlens)) if average else sums


def pair_logps(
    logps: Tensor,
    *,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> PairLogps:
    """Sequence log-probabilities and scored lengths of preference pairs, whose rows are all chosen, then all rejected.

    With ``ld_alpha`` in [0, 1] the scored tokens past the shorter length of the pair count ``ld_alpha`` times, which
    removes the advantage of a longer answer: LD-DPO, https://arxiv.org/abs/2409.06411.

    Args:
        logps: per token, padded ``[2B, T]``, or packed ``[N]`` with ``cu_seqlens [2B + 1]``.
        mask, targets: what is scored, as in ``sequence_logps``.
        average: divide by the number of scored tokens. Padded rows then need ``targets`` or ``mask``, and so they do
            with ``ld_alpha``: padding is part of no sum, but of every count.

    Returns:
        ``PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)``, each ``[B]``; lengths are int64, and those of
        padded rows without ``targets`` and ``mask`` are T.

    Raises:
        TypeError, ValueError: an odd number of rows; a wrong dtype, shape, device, mask value, offset or ``ld_alpha``.
    """
    where = "pair_logps"
    inputs.tokens(where, cu_seqlens, logps=logps)
    inputs.check_even(where, inputs.sequences(where, "logps", logps, cu_seqlens))
    if ld_alpha is not None:
        ld_alpha = check.number(where, "ld_alpha", ld_alpha, low=0.0, high=1.0)
    mask = inputs.scored(where, logps, mask, targets, ignore_index)
    if average or ld_alpha is not None:
        _check_counted(where, "average=True" if average else "ld_alpha", mask, cu_seqlens)
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


def wpo_weights(
    logps: Tensor,
    log_sum_sq_probs: Tensor,
    *,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The weights of pairs by how likely the policy would write them itself, https://arxiv.org/abs/2406.11827.

    ``exp mean_t(lp - log sum_v p_v^2)`` of the chosen times that of the rejected: 1 where each token is as likely as a
    token of the policy is on average. Rows are all chosen, then all rejected; a row of no tokens counts 1::

        stats = pk.linear_token_logprobs(hidden, weight, targets, outputs=("logps", "log_sum_sq_probs"))
        weights = pk.wpo_weights(stats.logps, stats.log_sum_sq_probs, targets=targets)
        loss = pk.dpo_loss(*logps, weights=weights)        # linear_dpo_loss(use_weighting=True) does both

    Args:
        logps, log_sum_sq_probs: per token, padded ``[2B, T]``, or packed ``[N]`` with ``cu_seqlens [2B + 1]``.
        mask, targets: what is scored, as in ``sequence_logps``; padded rows need one of them.

    Returns:
        ``[B]``, float32 (float64 for float64), without a gradient.

    Raises:
        TypeError, ValueError: an odd number of rows; a wrong dtype, shape, device, mask value or offset, by name.
    """
    where = "wpo_weights"
    inputs.tokens(where, cu_seqlens, logps=logps, log_sum_sq_probs=log_sum_sq_probs)
    inputs.check_even(where, inputs.sequences(where, "logps", logps, cu_seqlens))
    mask = inputs.scored(where, logps, mask, targets, ignore_index)
    _check_counted(where, "a mean over tokens", mask, cu_seqlens)
    with torch.no_grad():
        aligned = scored(logps, mask) - scored(log_sum_sq_probs, mask)
        means = divide(sequence_sums(aligned, cu_seqlens), sequence_lengths(aligned, mask, cu_seqlens))
        chosen, rejected = means.exp().chunk(2)
        return chosen * rejected


def _check_counted(where: str, what: str, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """The scored tokens of padded rows are known: a count that padding is part of would give a plausible number."""
    if mask is None and cu_seqlens is None:
        check.fail(
            where,
            f"{what} counts the scored tokens of each row, and padding cannot be told from them: pass the targets "
            "that logps were scored against, or a mask (all ones where no row is padded)",
        )


def _ordinals(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of scored tokens of its own sequence up to and with each token."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    counted = mask.cumsum(-1)
    if cu_seqlens is None:
        return counted
    before = torch.nn.functional.pad(counted, (1, 0))[cu_seqlens]
    return counted - before[sequence_ids(cu_seqlens, x.shape[0])]
