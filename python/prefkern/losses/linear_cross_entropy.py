"""The likelihood of the targets, on hidden states."""

import torch
from torch import Tensor

from prefkern import _check
from prefkern.logprobs import linear_token_logprobs
from prefkern.losses import _inputs
from prefkern.objectives.likelihood import negative_log_likelihood
from prefkern.objectives.reduce import masked_mean
from prefkern.types import LossOutput, Reduction, Temperature


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
    lora: None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> LossOutput:
    """Cross-entropy of the head ``softcap(logit_scale (h W^T + b)) / temperature``: ``sum_t -w_t lp_t / normalizer``.

    Without logits ``[N, V]`` in memory; see ``linear_token_logprobs``, and https://arxiv.org/abs/2411.09009 for the
    idea.

    Args:
        hidden, weight, targets: ``[..., H]``, ``[V, H]``, ``[...]``, aligned (``shift_labels``).
        reduction: ``mean`` divides by ``normalizer``; ``sum``; ``none`` gives one value per token, 0 if not scored.
        normalizer: by default the number of scored tokens of this call; give the count of the whole batch for equal
            gradients under accumulation. A number or a device tensor.
        token_weights: shaped like ``targets``, without a gradient; they never change the count.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64); metrics ``entropy`` and ``mean_token_accuracy``.
        Nothing scored gives 0, with a graph and zero gradients.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "linear_cross_entropy"
    _check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    _inputs.required(where, targets=targets)
    normalizer = _inputs.normalizer(where, normalizer, reduction, targets)
    _check.integer(where, targets=targets)
    _check.floating(where, token_weights=token_weights)
    _check.same_shape(where, targets=targets, token_weights=token_weights)
    _check.same_device(where, targets=targets, token_weights=token_weights)
    stats = linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        outputs=("logps", "entropy", "is_top1") if metrics else ("logps",),
        lora=lora,
        compute_dtype=compute_dtype,
        max_memory=max_memory,
        num_scored=num_scored,
        group=group,
    )
    mask = targets != ignore_index
    losses = negative_log_likelihood(stats.logps, mask, token_weights)
    loss = masked_mean(losses, mask, normalizer) if reduction == "mean" else losses
    shown: dict[str, Tensor] = {}
    if stats.entropy is not None and stats.is_top1 is not None:
        shown = {
            "entropy": masked_mean(stats.entropy.detach(), mask),
            "mean_token_accuracy": masked_mean(stats.is_top1, mask),
        }
    return LossOutput(loss.sum() if reduction == "sum" else loss, shown)
