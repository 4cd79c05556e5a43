"""The likelihood of the targets: one value per token, its mean on hidden states, and that of chosen rows."""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions
from prefkern.head.logprobs import linear_logprob_sum, token_stats
from prefkern.losses import inputs
from prefkern.losses.objective import objective
from prefkern.losses.reduce import divide, masked_mean, scored
from prefkern.options import read, takes
from prefkern.types import LossOutput, Output, Reduction


@objective("token")
def negative_log_likelihood(logps: Tensor, mask: Tensor | None, token_weights: Tensor | None) -> Tensor:
    """``-w lp`` per token, 0 where not scored; no gradient reaches the weights."""
    losses = -scored(logps, mask)
    return losses if token_weights is None else losses * scored(token_weights, mask).detach()


class CrossEntropy(NamedTuple):
    """The options of `linear_cross_entropy` that are not the head's, complete."""

    reduction: Reduction = "mean"
    dft: bool = False
    metrics: bool = True


class LinearCrossEntropyOptions(HeadOptions, total=False):
    """The keywords of `linear_cross_entropy` that are no tensors of the loss."""

    reduction: Reduction
    dft: bool
    metrics: bool


@takes(CrossEntropy, Head)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    normalizer: Tensor | float | None = None,
    token_weights: Tensor | None = None,
    **options: Unpack[LinearCrossEntropyOptions],
) -> LossOutput:
    """Cross-entropy of the head ``softcap(logit_scale (h W^T + b)) / temperature``: ``sum_t -w_t lp_t / normalizer``.

    Without logits ``[N, V]`` in memory (https://arxiv.org/abs/2411.09009). A mean or a sum makes its gradients in the
    forward, in 3 matrix products (2 for a frozen weight, 1 without gradients) and memory that does not grow with the
    tokens; the backward multiplies them by the gradient of the loss, in place unless the graph is kept. Per token
    (``none``), with ``dft`` or an adapter on the head, it is ``linear_token_logprobs`` with a minus sign.

    Args:
        hidden, weight, targets: ``[..., H]``, ``[V, H]``, ``[...]``, aligned (``shift_labels``).
        reduction: ``mean`` divides by ``normalizer``; ``sum``; ``none`` gives one value per token, 0 if not scored.
        normalizer: by default the number of scored tokens of this call; give the count of the whole batch for equal
            gradients under accumulation. A number or a device tensor.
        token_weights: shaped like ``targets``, without a gradient; they never change the count.
        dft: weighs every token by its probability, without a gradient: ``-sg[p_t] lp_t``, which learns least from what
            the model finds unlikely, https://arxiv.org/abs/2508.05629. The weights are known only after the
            log-probabilities, so that it holds logits as ``linear_token_logprobs`` does.
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
    chosen, head = read(where, options, CrossEntropy, Head)
    reduction = chosen.reduction
    inputs.required(where, targets=targets)
    normalizer = inputs.normalizer(where, normalizer, reduction, targets)
    check.integer(where, targets=targets)
    check.floating(where, token_weights=token_weights)
    check.same_shape(where, targets=targets, token_weights=token_weights)
    check.same_device(where, targets=targets, token_weights=token_weights)
    mask = targets != head.ignore_index
    outputs: tuple[Output, ...] = ("logps", "entropy", "is_top1") if chosen.metrics else ("logps",)
    if reduction == "none" or chosen.dft or head.lora is not None:
        stats = token_stats(where, hidden, weight, targets, head, outputs)
        loss = negative_log_likelihood(stats.logps, mask, token_weights)
        if chosen.dft:
            loss = loss * stats.logps.detach().exp()
        if reduction != "none":
            loss = masked_mean(loss, mask, normalizer) if reduction == "mean" else loss.sum()
    else:
        # the loss is linear in the log-probabilities: its value at 1 in every token is its derivative there
        wide = torch.float64 if torch.float64 in (hidden.dtype, head.compute_dtype) else torch.float32
        ones = torch.ones_like(targets, dtype=wide)
        factors = negative_log_likelihood(ones, mask, token_weights)
        if reduction == "mean":
            factors = divide(factors, mask.sum() if normalizer is None else normalizer)
        loss, stats = linear_logprob_sum(where, hidden, weight, targets, factors, head, outputs)
    shown: dict[str, Tensor] = {}
    if stats.entropy is not None and stats.is_top1 is not None:
        shown = {
            "entropy": masked_mean(stats.entropy.detach(), mask),
            "mean_token_accuracy": masked_mean(stats.is_top1, mask),
        }
    return LossOutput(loss, shown)


class ChosenLikelihood:
    """The mean negative log-likelihood of the chosen rows, over ``nll_targets``, from the same pass as the pairs.

    ``targets`` become the union of both: a chosen row scored in either is scored once. Where both are, they must
    agree: on the CPU that is checked, and on an accelerator such a token gives NaN, as one out of range does.
    """

    def __init__(
        self, where: str, targets: Tensor, nll_targets: Tensor | None, chosen: Tensor, ignore_index: int
    ) -> None:
        self.mask, self.targets = chosen & (targets != ignore_index), targets
        if nll_targets is None:
            return
        check.integer(where, nll_targets=nll_targets)
        check.same_shape(where, targets=targets, nll_targets=nll_targets)
        check.same_device(where, targets=targets, nll_targets=nll_targets)
        paired, self.mask = targets != ignore_index, chosen & (nll_targets != ignore_index)
        differ = paired & self.mask & (targets != nll_targets)
        if targets.device.type == "cpu" and not torch.compiler.is_compiling() and differ.any():
            check.fail(where, "nll_targets must equal targets wherever both are scored in a chosen row, got others")
        outside = -1 if ignore_index != -1 else -2
        self.targets = torch.where(paired, targets, nll_targets.masked_fill(~self.mask, ignore_index))
        self.targets = self.targets.masked_fill(differ, outside)

    def nll(self, logps: Tensor) -> Tensor:
        return masked_mean(negative_log_likelihood(logps, self.mask, None), self.mask)
