"""The likelihood of the targets, on hidden states."""

from typing import Any

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.logprob_sum import linear_logprob_sum
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses import inputs
from prefkern.losses.reduce import divide, masked_mean
from prefkern.objectives.likelihood import negative_log_likelihood
from prefkern.types import LoRA, LossOutput, Reduction, Temperature


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    token_weights: Tensor | None = None,
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
    """Cross-entropy of the head ``softcap(logit_scale (h W^T + b)) / temperature``: ``sum_t -w_t lp_t / normalizer``.

    Without logits ``[N, V]`` in memory (https://arxiv.org/abs/2411.09009). A mean or a sum makes its gradients in the
    forward, in 3 matrix products (2 for a frozen weight, 1 without gradients) and memory that does not grow with the
    tokens; the backward multiplies them by the gradient of the loss, in place unless the graph is kept. Per token
    (``none``), or with an adapter on the head, it is ``linear_token_logprobs`` with a minus sign.

    Args:
        hidden, weight, targets: ``[..., H]``, ``[V, H]``, ``[...]``, aligned (``shift_labels``).
        reduction: ``mean`` divides by ``normalizer``; ``sum``; ``none`` gives one value per token, 0 if not scored.
        normalizer: by default the number of scored tokens of this call; give the count of the whole batch for equal
            gradients under accumulation. A number or a device tensor.
        token_weights: shaped like ``targets``, without a gradient; they never change the count.
        max_memory: bytes of the transient tile of logits, at least one row of it (64 MiB on a CPU by default; on an
            accelerator what a float32 gradient of the weight takes, and at least 1 GiB). Smaller tiles cost an addition
            to the gradient of the weight each, never a product. With ``none`` as in ``linear_token_logprobs``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64); metrics ``entropy`` and ``mean_token_accuracy``.
        Nothing scored gives 0, with a graph and zero gradients.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "linear_cross_entropy"
    check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    inputs.required(where, targets=targets)
    normalizer = inputs.normalizer(where, normalizer, reduction, targets)
    check.integer(where, targets=targets)
    check.floating(where, token_weights=token_weights)
    check.same_shape(where, targets=targets, token_weights=token_weights)
    check.same_device(where, targets=targets, token_weights=token_weights)
    mask = targets != ignore_index
    head: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "outputs": ("logps", "entropy", "is_top1") if metrics else ("logps",),
        "vocab_mask": vocab_mask,
        "compute_dtype": compute_dtype,
        "max_memory": max_memory,
        "num_scored": num_scored,
        "group": group,
    }
    if reduction == "none" or lora is not None:
        stats = linear_token_logprobs(hidden, weight, targets, lora=lora, **head)
        loss = negative_log_likelihood(stats.logps, mask, token_weights)
        if reduction != "none":
            loss = masked_mean(loss, mask, normalizer) if reduction == "mean" else loss.sum()
    else:
        # the loss is linear in the log-probabilities: its value at 1 in every token is its derivative there
        wide = torch.float64 if torch.float64 in (hidden.dtype, compute_dtype) else torch.float32
        ones = torch.ones_like(targets, dtype=wide)
        factors = negative_log_likelihood(ones, mask, token_weights)
        if reduction == "mean":
            factors = divide(factors, mask.sum() if normalizer is None else normalizer)
        loss, stats = linear_logprob_sum(where, hidden, weight, targets, factors, **head)
    shown: dict[str, Tensor] = {}
    if stats.entropy is not None and stats.is_top1 is not None:
        shown = {
            "entropy": masked_mean(stats.entropy.detach(), mask),
            "mean_token_accuracy": masked_mean(stats.is_top1, mask),
        }
    return LossOutput(loss, shown)
