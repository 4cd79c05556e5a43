"""Proximal policy optimisation on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern.losses._forms import scored_targets, token_form
from prefkern.losses._head import Head, Reference
from prefkern.losses.policy import KLEstimator
from prefkern.losses.ppo import check_options, ppo_loss
from prefkern.losses.reduce import TokenReduction
from prefkern.types import LoRA, LossOutput, Temperature


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_temperature: Temperature | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coef: float = 0.0,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_mask: Tensor | None = None,
    vf_coef: float = 0.1,
    cliprange_value: float = 0.2,
    reduction: TokenReduction = "token",
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    metrics: bool = True,
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
    """``ppo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    With ``entropy_coef`` the entropy carries its gradient to the head; without, it is a metric. See ``ppo_loss`` for
    the formulas, https://arxiv.org/abs/1707.06347, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]``, with ``cu_seqlens`` where sequences matter.
        weight: ``[V, H]``.
        targets: the tokens taken, ``[B, T]`` or ``[N]``, aligned (``shift_labels``).
        old_logps, advantages: as in ``ppo_loss``.
        mask: scored tokens, with ``targets != ignore_index``; what it excludes costs no product.
        ref_logps: of the tokens taken under the reference, shaped like ``targets``; optional. Or instead of it:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        cliprange, ..., metrics: as in ``ppo_loss``.
        num_scored: counts the targets that are scored and in ``mask``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``ppo_loss``, ``policy/entropy_avg`` among them.

    Raises:
        TypeError, ValueError: two references; what the parts refuse, by name.
    """
    where = "linear_ppo_loss"
    options = (cliprange, cliprange_high, delta, kl_coef, kl_estimator, entropy_coef)
    check_options(where, *options, vf_coef, cliprange_value, reduction)
    targets, scored = scored_targets(where, targets, mask, cu_seqlens, ignore_index)
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    reference = Reference(ref_logps, ref_hidden, ref_weight, ref_bias, ref_temperature, ref_logit_scale, ref_softcap)
    ref = reference.per_token(where, head, targets)
    loss = partial(ppo_loss, old_logps=old_logps, advantages=advantages, mask=scored, cu_seqlens=cu_seqlens)
    loss = partial(loss, cliprange=cliprange, cliprange_high=cliprange_high, delta=delta, reduction=reduction)
    loss = partial(loss, ref_logps=ref, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy_coef=entropy_coef)
    loss = partial(loss, values=values, old_values=old_values, returns=returns, value_mask=value_mask)
    loss = partial(loss, vf_coef=vf_coef, cliprange_value=cliprange_value, normalizer=normalizer, metrics=metrics)
    return token_form(hidden, weight, targets, loss, head, entropy=metrics, entropy_grad=bool(entropy_coef))
