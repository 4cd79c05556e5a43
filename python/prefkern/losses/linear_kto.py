"""Kahneman-Tversky optimisation on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern.losses import inputs
from prefkern.losses._forms import check_rows, sequence_form
from prefkern.losses._head import Head, Reference
from prefkern.losses.kto import KTOLossType, check_options, kto_loss
from prefkern.losses.reduce import per_token
from prefkern.losses.sequences import sequence_logps
from prefkern.types import LoRA, LossOutput, Reduction, Temperature


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    is_desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_temperature: Temperature | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    kl: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: KTOLossType = "kto",
    reduction: Reduction = "mean",
    metrics: bool = True,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> LossOutput:
    """``kto_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    See ``kto_loss`` for the formulas, https://arxiv.org/abs/2402.01306, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens [B + 1]``.
        weight: ``[V, H]``.
        targets: ``[B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        is_desirable: bool or 0/1, ``[B]``.
        ref_logps: sequence sums of the reference ``[B]``. Or instead of it:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        kl: the baseline, from mismatched completions: ``kto_kl`` of their ``sequence_logps``, scored under
            ``torch.no_grad()``. None is 0.
        beta, desirable_weight, undesirable_weight, loss_type, reduction, metrics: as in ``kto_loss``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``kto_loss``, and token means ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy`` (of the desirable).

    Raises:
        TypeError, ValueError: no reference or two; what the parts refuse, by name.
    """
    where = "linear_kto_loss"
    check_options(where, beta, desirable_weight, undesirable_weight, loss_type, reduction)
    count = check_rows(where, targets, cu_seqlens, ref_logps)
    desirable = inputs.flags(where, "is_desirable", is_desirable, like=targets.new_empty(count))
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    rows = partial(sequence_logps, targets=targets, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    reference = Reference(ref_logps, ref_hidden, ref_weight, ref_bias, ref_temperature, ref_logit_scale, ref_softcap)
    ref = reference.per_sequence(where, "[B]", head, targets, rows)
    loss = partial(kto_loss, kl=kl, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def fn(logps: Tensor) -> LossOutput:
        return loss(rows(logps), ref, desirable, loss_type=loss_type, reduction=reduction, metrics=metrics)

    chosen = per_token(desirable, targets, cu_seqlens)
    return sequence_form(hidden, weight, targets, fn, head, chosen=chosen, metrics=metrics)
