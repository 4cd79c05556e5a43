"""Proximal policy optimisation on token log-probabilities."""

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs, policy
from prefkern.losses.policy import KLEstimator, PolicyOptions
from prefkern.losses.reduce import TokenReduction, masked_mean, reduce_tokens, scored
from prefkern.types import LossOutput


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy: Tensor | None = None,
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
) -> LossOutput:
    """Proximal policy optimisation, https://arxiv.org/abs/1707.06347.

    With ``c1 = e^(lp - lp_old)`` and ``c2 = clamp(c1, 1 - cliprange, 1 + cliprange_high)``::

        reduce( -min(c1 A, c2 A) + kl_coef k ) - entropy_coef mean(entropy) + vf_coef value_loss

    ``delta`` is the dual clip: the first c1 becomes ``min(c1, delta)``, which bounds the loss of a negative advantage.
    k estimates ``KL(policy || reference)`` with ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``.
    Log-ratios are held within +-20, without a gradient beyond. The entropy and value terms are means over their own
    tokens in this call, whatever the reduction. Gradients reach ``logps``, ``entropy`` and ``values`` only.

    Args:
        logps, old_logps, ref_logps: of the tokens taken, under the policy, the policy that sampled them and the
            reference; padded ``[B, T]`` or packed ``[N]``.
        advantages: per token, or per sequence ``[B]`` (packed ``[S]``, with ``cu_seqlens``).
        mask: scored tokens, bool or 0/1, shaped like ``logps``; what it excludes may hold anything.
        cliprange, cliprange_high: distances below and above 1, above defaulting to below.
        delta: above 1.
        entropy: per token; with ``entropy_coef`` it must carry a gradient (ask for ``entropy_grad=True``).
        values, old_values, returns, value_mask: per token, of the value model; ``value_mask`` defaults to ``mask``.
        reduction: ``token`` (sum / normalizer, by default the scored tokens of this call), ``sequence`` (sum of the
            sequences' token means / normalizer, by default the number of sequences, empty ones included),
            ``sequence_sum`` (the same of token sums), ``none`` (per token; without entropy and value terms).
        normalizer: the count of the whole batch, for equal gradients under accumulation; a number or a device tensor.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, token means: ``loss/policy_avg``,
        ``policy/clipfrac_avg``, ``policy/clipfrac_low``, ``policy/clipfrac_high`` (the clip removes the gradient),
        ``policy/approxkl_avg`` (``E[(lp - lp_old)^2] / 2``), ``val/ratio``, ``val/ratio_var``; where their inputs are
        given ``kl``, ``policy/entropy_avg``, ``loss/value_avg``, ``val/clipfrac_avg``, ``val/var_explained``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, or an input that an option needs, by name.
    """
    where = "ppo_loss"
    options = check_options(
        where,
        cliprange,
        cliprange_high,
        delta,
        kl_coef,
        kl_estimator,
        entropy_coef,
        vf_coef,
        cliprange_value,
        reduction,
    )
    optional = {"ref_logps": ref_logps, "entropy": entropy, "values": values, "old_values": old_values}
    inputs.tokens(where, cu_seqlens, logps=logps, old_logps=old_logps, optional={**optional, "returns": returns})
    _check_terms(where, logps, ref_logps, kl_coef, entropy, entropy_coef, values, old_values, returns, reduction)
    if reduction.startswith("sequence"):
        inputs.sequences(where, "logps", logps, cu_seqlens)
    normalizer = inputs.normalizer(where, normalizer, reduction, logps)
    advantages = inputs.spread(where, "advantages", advantages, logps, cu_seqlens)
    mask = inputs.scored(where, logps, mask, None)
    value_mask = mask if value_mask is None else inputs.scored(where, logps, value_mask, None, name="value_mask")

    lp, old, A = scored(logps, mask), scored(old_logps, mask), scored(advantages, mask).detach()
    losses = policy.clipped_policy(lp, old, A, options)
    kl = None if ref_logps is None else policy.kl_penalty(lp, scored(ref_logps, mask), kl_estimator)
    total = losses + kl_coef * kl if kl is not None and kl_coef else losses
    loss = reduce_tokens(total, mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    if entropy is not None and entropy_coef:
        loss = loss - entropy_coef * masked_mean(entropy, mask)
    value_metrics: dict[str, Tensor] = {}
    if values is not None and old_values is not None and returns is not None:
        value, value_metrics = _value(values, old_values, returns, value_mask, cliprange_value, None, metrics)
        loss = loss + vf_coef * value
    if not metrics:
        return LossOutput(loss, {})
    terms = {"loss/policy_avg": losses, "kl": kl, "policy/entropy_avg": entropy}
    means = {name: masked_mean(x.detach(), mask) for name, x in terms.items() if x is not None}
    return LossOutput(loss, means | policy.policy_metrics(lp, old, A, mask, options) | value_metrics)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange_value: float = 0.2,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    metrics: bool = True,
) -> LossOutput:
    """The clipped value loss of PPO, ``mean max((v - R)^2, (clip(v, v_old +- c) - R)^2) / 2``.

    The clip around the old values is that of the implementations, https://arxiv.org/abs/2005.12729.

    Args:
        values, old_values, returns: per token, padded ``[B, T]`` or packed ``[N]``; the gradient reaches ``values``.
        mask: scored tokens, bool or 0/1; what it excludes may hold anything.
        cliprange_value: c, above 0.
        normalizer: divides the sum, by default the number of scored tokens of this call.

    Returns:
        ``LossOutput(loss, metrics)``, metrics ``loss/value_avg``, ``val/clipfrac_avg``, ``val/var_explained``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "value_loss"
    check.number(where, "cliprange_value", cliprange_value, low=0.0, open_low=True)
    inputs.tokens(where, cu_seqlens, values=values, old_values=old_values, returns=returns)
    mask = inputs.scored(where, values, mask, None)
    normalizer = inputs.normalizer(where, normalizer, "token", values)
    return _value(values, old_values, returns, mask, cliprange_value, normalizer, metrics)


def _value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cliprange: float,
    normalizer: Tensor | float | None,
    metrics: bool,
) -> LossOutput:
    v, old, R = scored(values, mask), scored(old_values, mask), scored(returns, mask)
    losses = policy.clipped_value(v, old, R, cliprange)
    loss = masked_mean(losses, mask, normalizer)
    if not metrics:
        return LossOutput(loss, {})
    shown = {"loss/value_avg": masked_mean(losses.detach(), mask)}
    return LossOutput(loss, shown | policy.value_metrics(v, old, R, mask, cliprange))


def check_options(
    where: str,
    cliprange: float,
    cliprange_high: float | None,
    delta: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    vf_coef: float,
    cliprange_value: float,
    reduction: str,
) -> PolicyOptions:
    check.one_of(where, "reduction", reduction, ("token", "sequence", "sequence_sum", "none"))
    check.one_of(where, "kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    check.number(where, "kl_coef", kl_coef, low=0.0)
    check.number(where, "entropy_coef", entropy_coef, low=0.0)
    check.number(where, "vf_coef", vf_coef, low=0.0)
    check.number(where, "cliprange_value", cliprange_value, low=0.0, open_low=True)
    low = check.number(where, "cliprange", cliprange, low=0.0, high=1.0)
    high = low if cliprange_high is None else check.number(where, "cliprange_high", cliprange_high, low=0.0)
    if delta is not None:
        delta = check.number(where, "delta", delta, low=1.0, open_low=True)
    return PolicyOptions(low, high, delta)


def _check_terms(
    where: str,
    logps: Tensor,
    ref_logps: Tensor | None,
    kl_coef: float,
    entropy: Tensor | None,
    entropy_coef: float,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    reduction: str,
) -> None:
    """Every option has the inputs that it reads, and they can do what it asks of them."""
    if kl_coef and ref_logps is None:
        check.fail(where, f"kl_coef={kl_coef} needs ref_logps, got None")
    if entropy_coef:
        if entropy is None:
            check.fail(where, f"entropy_coef={entropy_coef} needs entropy, got None")
        if torch.is_grad_enabled() and logps.requires_grad and not entropy.requires_grad:
            check.fail(where, f"entropy_coef={entropy_coef} needs an entropy with a gradient (entropy_grad=True)")
    given = [
        name for name, x in (("values", values), ("old_values", old_values), ("returns", returns)) if x is not None
    ]
    if len(given) not in (0, 3):
        check.fail(where, f"values, old_values and returns come together, got only {' and '.join(given)}")
    if reduction == "none" and (entropy_coef or given):
        check.fail(where, "reduction='none' is per token, without entropy and value terms: use value_loss beside it")
