"""Direct preference optimisation on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern import _check
from prefkern.logprobs import linear_token_logprobs
from prefkern.losses import _inputs
from prefkern.losses.dpo import DPOLossType, check_options, dpo_loss
from prefkern.losses.sequences import check_even, pair_logps
from prefkern.objectives.reduce import masked_mean, per_token
from prefkern.types import LossOutput, Output, Reduction, Temperature, TokenStats


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: bool = True,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    lora: None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> LossOutput:
    """``dpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    See ``dpo_loss`` for the formulas, https://arxiv.org/abs/2305.18290, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        ref_logps: sequence sums of the reference ``[2B]``, with the same ``ld_alpha``. Or instead of it:
        ref_hidden, ref_weight, ref_bias: the reference's hidden states (of any width) and head, scored here without a
            gradient, with the temperature, scale and softcap of the policy.
        beta, loss_type, label_smoothing, weights, reduction: as in ``dpo_loss``; the lengths are those of ``targets``.
        ld_alpha: as in ``pair_logps``, for policy and reference alike.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``dpo_loss``, and token means ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows, no reference or two; what the parts refuse, by name.
    """
    where = "linear_dpo_loss"
    check_options(where, beta, loss_type, label_smoothing, reduction)
    _check_rows(where, targets, cu_seqlens, ref_logps, weights)
    head = partial(
        linear_token_logprobs,
        targets=targets,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        compute_dtype=compute_dtype,
        num_scored=num_scored,
        group=group,
    )
    rows = partial(pair_logps, targets=targets, cu_seqlens=cu_seqlens, ld_alpha=ld_alpha, ignore_index=ignore_index)
    if ref_hidden is not None and ref_weight is not None and ref_logps is None:
        with torch.no_grad():
            scored = rows(head(ref_hidden, ref_weight, bias=_reference_bias(where, bias, ref_bias)).logps)
            ref_chosen, ref_rejected = scored.chosen, scored.rejected
    elif ref_logps is not None and ref_hidden is None and ref_weight is None and ref_bias is None:
        ref_chosen, ref_rejected = ref_logps.chunk(2)
    else:
        _check.fail(where, "the reference must be either ref_logps [2B], or ref_hidden and ref_weight")
    outputs: tuple[Output, ...] = ("logps", "entropy", "mean_logit", "is_top1") if metrics else ("logps",)
    stats = head(hidden, weight, bias=bias, lora=lora, max_memory=max_memory, outputs=outputs)
    policy = rows(stats.logps)
    loss, shown = dpo_loss(
        policy.chosen,
        policy.rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        weights=weights,
        reduction=reduction,
        metrics=metrics,
    )
    return LossOutput(loss, shown | _token_metrics(stats, targets != ignore_index, cu_seqlens) if metrics else {})


def _check_rows(
    where: str, targets: Tensor, cu_seqlens: Tensor | None, ref_logps: Tensor | None, weights: Tensor | None
) -> None:
    """What the loss itself needs, before any product is paid for."""
    _inputs.required(where, targets=targets)
    _check.integer(where, targets=targets)
    count = _inputs.sequences(where, "targets", targets, cu_seqlens)
    check_even(where, count)
    _check.floating(where, ref_logps=ref_logps, weights=weights)
    for name, value, length in (("ref_logps", ref_logps, count), ("weights", weights, count // 2)):
        if value is not None and value.shape != (length,):
            _check.fail(where, f"{name} must have shape ({length},), got {_check.describe(value)}")
    _check.same_device(where, targets=targets, cu_seqlens=cu_seqlens, ref_logps=ref_logps, weights=weights)


def _reference_bias(where: str, bias: Tensor | None, ref_bias: Tensor | None) -> Tensor | None:
    if bias is not None and ref_bias is None:
        _check.fail(where, "bias is given, so the reference's head needs its own: pass ref_bias")
    return ref_bias


@torch.no_grad()
def _token_metrics(stats: TokenStats, mask: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    assert stats.entropy is not None
    assert stats.mean_logit is not None
    assert stats.is_top1 is not None
    count = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = per_token(torch.arange(count, device=mask.device) < count // 2, mask, cu_seqlens)
    return {
        "entropy": masked_mean(stats.entropy, mask),
        "logits/chosen": masked_mean(stats.mean_logit, mask & first),
        "logits/rejected": masked_mean(stats.mean_logit, mask & ~first),
        "mean_token_accuracy": masked_mean(stats.is_top1, mask & first),
    }
