"""Direct preference optimisation on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern.losses._forms import check_pairs, first_half, sequence_form
from prefkern.losses._head import Head, Reference
from prefkern.losses.dpo import DPOLossType, check_options, dpo_loss
from prefkern.losses.sequences import pair_logps
from prefkern.types import LoRA, LossOutput, Reduction, Temperature


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_temperature: Temperature | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
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
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
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
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
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
    check_pairs(where, targets, cu_seqlens, ref_logps=ref_logps, weights=weights)
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    rows = partial(pair_logps, targets=targets, cu_seqlens=cu_seqlens, ld_alpha=ld_alpha, ignore_index=ignore_index)
    reference = Reference(ref_logps, ref_hidden, ref_weight, ref_bias, ref_temperature, ref_logit_scale, ref_softcap)
    ref = reference.per_sequence(where, "[2B]", head, targets, lambda logps: torch.cat(rows(logps)[:2]))
    loss = partial(dpo_loss, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, weights=weights)
    loss = partial(loss, reduction=reduction, metrics=metrics)

    def fn(logps: Tensor) -> LossOutput:
        chosen, rejected, n_chosen, n_rejected = rows(logps)
        return loss(chosen, rejected, *ref.chunk(2), chosen_lengths=n_chosen, rejected_lengths=n_rejected)

    return sequence_form(hidden, weight, targets, fn, head, chosen=first_half(targets, cu_seqlens), metrics=metrics)
