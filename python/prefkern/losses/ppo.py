"""Proximal policy optimisation, on token log-probabilities and on hidden states."""

from typing import Annotated, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs, policy
from prefkern.losses.linear import token_form
from prefkern.losses.policy import KLEstimator, PolicyOptions
from prefkern.losses.reduce import TokenReduction, masked_mean, reduce_tokens, scored
from prefkern.losses.reference_model import ReferenceModel
from prefkern.options import above, at_least, read, takes, within
from prefkern.types import LossOutput


class PPO(NamedTuple):
    """The options of `ppo_loss` that are no tensors, complete."""

    cliprange: Annotated[float, within(0.0, 1.0)] = 0.2
    cliprange_high: Annotated[float | None, at_least(0.0)] = None
    delta: Annotated[float | None, above(1.0)] = None
    kl_coef: Annotated[float, at_least(0.0)] = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: Annotated[float, at_least(0.0)] = 0.0
    vf_coef: Annotated[float, at_least(0.0)] = 0.1
    cliprange_value: Annotated[float, above(0.0)] = 0.2
    reduction: TokenReduction = "token"
    metrics: bool = True

    @property
    def clip(self) -> PolicyOptions:
        """The interval of the ratio, above as wide as below unless another is given."""
        high = self.cliprange if self.cliprange_high is None else self.cliprange_high
        return PolicyOptions(self.cliprange, high, self.delta)


class PPOOptions(TypedDict, total=False):
    """The keywords of `ppo_loss` that are no tensors."""

    cliprange: float
    cliprange_high: float | None
    delta: float | None
    kl_coef: float
    kl_estimator: KLEstimator
    entropy_coef: float
    vf_coef: float
    cliprange_value: float
    reduction: TokenReduction
    metrics: bool


class Critic(NamedTuple):
    """What `ppo_loss` reads of the value model, per token, and its mask; None: no value term."""

    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None


class CriticOptions(TypedDict, total=False):
    """The keywords of `ppo_loss` on the value model."""

    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    value_mask: Tensor | None


class PPOArguments(PPOOptions, CriticOptions, total=False):
    """The keywords of `ppo_loss`."""


@takes(Critic, PPO)
def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[PPOArguments],
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
    critic, ppo = read(where, options, Critic, PPO)
    values, old_values, returns, value_mask = critic
    optional = {"ref_logps": ref_logps, "entropy": entropy, **critic._replace(value_mask=None)._asdict()}
    inputs.tokens(where, cu_seqlens, logps=logps, old_logps=old_logps, optional=optional)
    _check_terms(where, logps, ref_logps, entropy, critic, ppo)
    if ppo.reduction.startswith("sequence"):
        inputs.sequences(where, "logps", logps, cu_seqlens)
    normalizer = inputs.normalizer(where, normalizer, ppo.reduction, logps)
    advantages = inputs.spread(where, "advantages", advantages, logps, cu_seqlens)
    mask = inputs.scored(where, logps, mask, None)
    value_mask = mask if value_mask is None else inputs.scored(where, logps, value_mask, None, name="value_mask")

    lp, old, A = scored(logps, mask), scored(old_logps, mask), scored(advantages, mask).detach()
    losses = policy.clipped_policy(lp, old, A, ppo.clip)
    kl = None if ref_logps is None else policy.kl_penalty(lp, scored(ref_logps, mask), ppo.kl_estimator)
    total = losses + ppo.kl_coef * kl if kl is not None and ppo.kl_coef else losses
    loss = reduce_tokens(total, mask, reduction=ppo.reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    if entropy is not None and ppo.entropy_coef:
        loss = loss - ppo.entropy_coef * masked_mean(entropy, mask)
    value_metrics: dict[str, Tensor] = {}
    if values is not None and old_values is not None and returns is not None:
        value, value_metrics = _value(values, old_values, returns, value_mask, ppo.cliprange_value, None, ppo.metrics)
        loss = loss + ppo.vf_coef * value
    if not ppo.metrics:
        return LossOutput(loss, {})
    terms = {"loss/policy_avg": losses, "kl": kl, "policy/entropy_avg": entropy}
    means = {name: masked_mean(x.detach(), mask) for name, x in terms.items() if x is not None}
    return LossOutput(loss, means | policy.policy_metrics(lp, old, A, mask, ppo.clip) | value_metrics)


class Value(NamedTuple):
    """The options of `value_loss`, complete."""

    cliprange_value: Annotated[float, above(0.0)] = 0.2
    metrics: bool = True


class ValueOptions(TypedDict, total=False):
    """The keywords of `value_loss` that are no tensors."""

    cliprange_value: float
    metrics: bool


@takes(Value)
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[ValueOptions],
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
    cliprange_value, metrics = read(where, options, Value)
    inputs.tokens(where, cu_seqlens, values=values, old_values=old_values, returns=returns)
    mask = inputs.scored(where, values, mask, None)
    normalizer = inputs.normalizer(where, normalizer, "token", values)
    return _value(values, old_values, returns, mask, cliprange_value, normalizer, metrics)


class LinearPPOOptions(PPOArguments, ReferenceOptions, HeadOptions, total=False):
    """The keywords of `linear_ppo_loss` on the loss, the value model, the reference's head and the policy's."""


@takes(Critic, PPO, Reference, Head)
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearPPOOptions],
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
    critic, ppo, form, head = read(where, options, Critic, PPO, Reference, Head)
    targets, scored = inputs.scored_targets(where, targets, mask, cu_seqlens, head.ignore_index)
    ref = ReferenceModel(ref_logps, ref_hidden, ref_weight, form).per_token(where, head, targets)
    given = {"ref_logps": ref, "normalizer": normalizer, "cu_seqlens": cu_seqlens}

    def loss(logps: Tensor, entropy: Tensor | None) -> LossOutput:
        others = {"entropy": entropy, **given, **critic._asdict(), **ppo._asdict()}
        return ppo_loss(logps, old_logps, advantages, scored, **others)

    wanted = {"entropy": ppo.metrics, "entropy_grad": bool(ppo.entropy_coef)}
    return token_form(where, hidden, weight, targets, head, loss, **wanted)


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


def _check_terms(
    where: str, logps: Tensor, ref_logps: Tensor | None, entropy: Tensor | None, critic: Critic, ppo: PPO
) -> None:
    """Checks that every option has the inputs that it reads, and that they can do what it asks of them."""
    if ppo.kl_coef and ref_logps is None:
        check.fail(where, f"kl_coef={ppo.kl_coef} needs ref_logps, got None")
    if ppo.entropy_coef:
        if entropy is None:
            check.fail(where, f"entropy_coef={ppo.entropy_coef} needs entropy, got None")
        if torch.is_grad_enabled() and logps.requires_grad and not entropy.requires_grad:
            check.fail(where, f"entropy_coef={ppo.entropy_coef} needs an entropy with a gradient (entropy_grad=True)")
    given = [name for name in ("values", "old_values", "returns") if getattr(critic, name) is not None]
    if len(given) not in (0, 3):
        check.fail(where, f"values, old_values and returns come together, got only {' and '.join(given)}")
    if ppo.reduction == "none" and (ppo.entropy_coef or given):
        check.fail(where, "reduction='none' is per token, without entropy and value terms: use value_loss beside it")
