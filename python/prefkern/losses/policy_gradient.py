"""The loss of a batch under a policy loss, which PPO, GRPO and RLOO share: checks, mask, terms, reduction, metrics."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.policy import POLICY_LOSSES, PolicyLoss
from prefkern.losses.ratios import kl_penalty, log_ratio, sequence_log_ratio, unbiased_kl_penalty
from prefkern.losses.reduce import masked_mean, masked_means, per_token, reduce_tokens, scored, widen
from prefkern.losses.surrogates import Tokens

if TYPE_CHECKING:
    from prefkern.losses.grpo import GRPO


class Batch(NamedTuple):
    """The tensors of one call, as they were given."""

    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor | None = None
    ref_logps: Tensor | None = None
    entropy: Tensor | None = None
    token_weights: Tensor | None = None
    is_correct: Tensor | None = None
    normalizer: Tensor | float | None = None
    cu_seqlens: Tensor | None = None
    generator: torch.Generator | None = None


class PolicyGradient(NamedTuple):
    """The loss of a batch, and what metrics are made of."""

    loss: Tensor
    per_token: Tensor
    """The policy term."""
    kl: Tensor | None
    tokens: Tokens


def policy_gradient(where: str, batch: Batch, options: "GRPO", kl_coef: str = "beta") -> PolicyGradient:
    """Returns the loss of a batch: the policy term and the divergence from the reference, reduced, less the entropy,
    plus the likelihood of what is right. ``kl_coef`` is what the coefficient of the divergence is called."""
    row, cu = POLICY_LOSSES[options.loss_type], batch.cu_seqlens
    reduction = options.reduction or row.reduction
    tokens = _tokens(where, batch, options, row, reduction)
    _check_terms(where, batch, options, reduction, kl_coef)
    normalizer = inputs.normalizer(where, batch.normalizer, reduction, batch.logps)
    if reduction == "token" and normalizer is None and "normalizer" in row.needs:
        check.fail(
            where,
            f"loss_type={options.loss_type!r} divides by the scored tokens of the whole batch: pass normalizer=, their "
            "number over all micro-batches (and ranks, over the ranks where gradients are averaged); for a single "
            "batch, normalizer=mask.sum()",
        )

    losses = row.function(tokens, options)
    if tokens.weights is not None and not row.weighs_itself:
        per_sequence = tokens.weights.shape != losses.shape
        losses = losses * (per_token(tokens.weights[:, 0], losses, cu) if per_sequence else tokens.weights)
    kl = None if batch.ref_logps is None else _divergence(tokens, scored(batch.ref_logps, tokens.mask), options)
    total = losses + options.beta * kl if kl is not None and options.beta else losses
    loss = reduce_tokens(
        total,
        tokens.mask,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu,
        length=options.max_completion_length,
    )
    if batch.entropy is not None and options.entropy_coef:
        loss = loss - options.entropy_coef * masked_mean(batch.entropy, tokens.mask)
    if batch.is_correct is not None and options.positive_nll_coef:
        right = _flags(where, batch.is_correct, batch.logps, cu)
        right = right if tokens.mask is None else right & tokens.mask
        loss = loss + options.positive_nll_coef * masked_mean(-tokens.logps, right)
    return PolicyGradient(loss, losses, kl, tokens)


def _tokens(where: str, batch: Batch, options: "GRPO", row: PolicyLoss, reduction: str) -> Tokens:
    """Checks the tensors of a batch, and applies the mask to them."""
    logps, old, level, cu = batch.logps, batch.old_logps, options.importance_sampling_level, batch.cu_seqlens
    inputs.required(where, logps=logps, **({} if old is None else {"old_logps": old}))
    if old is None and "old_logps" in row.needs:
        check.fail(where, f"loss_type={options.loss_type!r} needs old_logps, of the policy that sampled, got None")
    sums = old if level == "product" and old is not None and old.shape != logps.shape else None
    optional = {"old_logps": None if sums is not None else old, "ref_logps": batch.ref_logps, "entropy": batch.entropy}
    inputs.tokens(where, cu, logps=logps, optional=optional)
    per_row = reduction.startswith("sequence") or (reduction == "fixed" and batch.normalizer is None)
    if per_row or level != "token" or row.function.coupling == "sequence":
        inputs.sequences(where, "logps", logps, cu)
    if reduction == "fixed" and options.max_completion_length is None and logps.ndim == 1:
        check.fail(where, "reduction='fixed' of packed tokens needs max_completion_length, which they do not show")
    if sums is not None:
        inputs.spread(where, "old_logps", sums, logps, cu)
    advantages = inputs.spread(where, "advantages", batch.advantages, logps, cu)
    weights = batch.token_weights
    if weights is not None:
        spread = inputs.spread(where, "token_weights", weights, logps, cu)
        weights = weights[:, None] if spread is not weights else weights
    mask = inputs.scored(where, logps, batch.mask, None)

    lp, A = scored(logps, mask), scored(advantages, mask).detach()
    if weights is not None:
        weights = (scored(weights, mask) if weights.shape == logps.shape else widen(weights)).detach()
    other = lp.detach() if old is None else widen(old) if sums is not None else scored(old, mask)
    w = log_ratio(lp, other) if level == "token" else sequence_log_ratio(lp, other, mask, cu, level)
    return Tokens(lp, other, A, w, mask, cu, weights, batch.generator)


def _divergence(tokens: Tokens, ref_logps: Tensor, options: "GRPO") -> Tensor:
    if options.kl_gradient == "unbiased":
        ratio = tokens.log_ratio.detach().exp()
        return unbiased_kl_penalty(tokens.logps, ref_logps, ratio, options.kl_estimator)
    kl = kl_penalty(tokens.logps, ref_logps, options.kl_estimator)
    return kl * tokens.log_ratio.exp() if options.use_bias_correction_kl else kl


def _check_terms(where: str, batch: Batch, options: "GRPO", reduction: str, kl_coef: str) -> None:
    """Checks that every coefficient has the inputs that it weighs, and that they can do what it asks of them."""
    if options.beta and batch.ref_logps is None:
        check.fail(where, f"{kl_coef}={options.beta} needs ref_logps, got None")
    if options.entropy_coef:
        if batch.entropy is None:
            check.fail(where, f"entropy_coef={options.entropy_coef} needs entropy, got None")
        if torch.is_grad_enabled() and batch.logps.requires_grad and not batch.entropy.requires_grad:
            check.fail(
                where, f"entropy_coef={options.entropy_coef} needs an entropy with a gradient (entropy_grad=True)"
            )
    if options.positive_nll_coef and batch.is_correct is None:
        check.fail(
            where,
            f"positive_nll_coef={options.positive_nll_coef} needs is_correct, which sequences are right, got None",
        )
    if reduction == "none" and (options.entropy_coef or options.positive_nll_coef):
        check.fail(where, "reduction='none' is per token, without entropy and likelihood terms")


def _flags(where: str, is_correct: Tensor, logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = inputs.sequences(where, "logps", logps, cu_seqlens)
    right = inputs.flags(where, "is_correct", is_correct, like=logps.new_empty(count))
    return per_token(right, logps, cu_seqlens)


@torch.no_grad()
def clip_metrics(tokens: Tokens, options: "GRPO", shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token means of what is ``shown``, how often the ratio is past the clip that its advantage moves it to (below,
    above, either), ``E[w^2] / 2`` and the ratio; over sequences at another level than the token's."""
    w, A = tokens.log_ratio, tokens.advantages
    ratio = w.exp()
    low = (ratio < 1.0 - options.epsilon) & (A < 0)
    high = (ratio > 1.0 + options.high) & (A > 0)
    of_ratio = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "policy/approxkl_avg": w.square() / 2,
        "val/ratio": ratio,
    }
    if options.importance_sampling_level == "token":
        return masked_means({**of_ratio, **shown}, tokens.mask)
    means = {
        name: reduce_tokens(widen(x), tokens.mask, reduction="sequence", cu_seqlens=tokens.cu_seqlens)
        for name, x in of_ratio.items()
    }
    return means | (masked_means(shown, tokens.mask) if shown else {})
