"""Proximal policy optimisation, on token log-probabilities and on hidden states."""

from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.grpo import GRPO
from prefkern.losses.linear import token_form
from prefkern.losses.policy_gradient import Batch, policy_gradient
from prefkern.losses.ratios import KLEstimator, KLGradient
from prefkern.losses.reduce import TokenReduction, masked_mean, masked_means
from prefkern.losses.reference_model import ReferenceModel
from prefkern.losses.surrogates import Tokens
from prefkern.losses.value import Critic, CriticOptions, reduced_value
from prefkern.options import above, at_least, read, takes, within
from prefkern.types import LossOutput


class PPO(NamedTuple):
    """The options of `ppo_loss` that are no tensors, complete."""

    cliprange: Annotated[float, within(0.0, 1.0)] = 0.2
    cliprange_high: Annotated[float | None, at_least(0.0)] = None
    delta: Annotated[float | None, above(1.0)] = None
    kl_coef: Annotated[float, at_least(0.0)] = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_gradient: KLGradient = "plain"
    entropy_coef: Annotated[float, at_least(0.0)] = 0.0
    positive_nll_coef: Annotated[float, at_least(0.0)] = 0.0
    vf_coef: Annotated[float, at_least(0.0)] = 0.1
    cliprange_value: Annotated[float, above(0.0)] = 0.2
    reduction: TokenReduction = "token"
    max_completion_length: Annotated[float | None, above(0.0)] = None
    metrics: bool = True

    @property
    def policy(self) -> GRPO:
        """What it is beside the value model: the clipped objective, with a plain divergence from the reference."""
        return GRPO(
            epsilon=self.cliprange,
            epsilon_high=self.cliprange_high,
            delta=self.delta,
            loss_type="bnpo",
            beta=self.kl_coef,
            use_bias_correction_kl=False,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            entropy_coef=self.entropy_coef,
            positive_nll_coef=self.positive_nll_coef,
            reduction=self.reduction,
            max_completion_length=self.max_completion_length,
        )


class PPOOptions(TypedDict, total=False):
    """The keywords of `ppo_loss` that are no tensors."""

    cliprange: float
    cliprange_high: float | None
    delta: float | None
    kl_coef: float
    kl_estimator: KLEstimator
    kl_gradient: KLGradient
    entropy_coef: float
    positive_nll_coef: float
    vf_coef: float
    cliprange_value: float
    reduction: TokenReduction
    max_completion_length: float | None
    metrics: bool


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
    token_weights: Tensor | None = None,
    is_correct: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[PPOArguments],
) -> LossOutput:
    """Proximal policy optimisation, https://arxiv.org/abs/1707.06347.

    With ``c1 = e^(lp - lp_old)`` and ``c2 = clamp(c1, 1 - cliprange, 1 + cliprange_high)``::

        reduce( -token_weights min(c1 A, c2 A) + kl_coef k )
            - entropy_coef mean(entropy) + positive_nll_coef mean(-lp where correct) + vf_coef value_loss

    ``delta`` is the dual clip: the first c1 becomes ``min(c1, delta)``, which bounds the loss of a negative advantage.
    k estimates ``KL(policy || reference)`` with ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``; see
    ``grpo_loss`` for what their gradients estimate, and for ``kl_gradient="unbiased"``. Without value model and
    reference it is the textbook's ``E min(r A, clip(r, 1 - e, 1 + e) A)``. Log-ratios are held within +-20, without a
    gradient beyond. The entropy, likelihood and value terms are means over their own tokens in this call, whatever the
    reduction. Gradients reach ``logps``, ``entropy`` and ``values`` only.

    Args:
        logps, old_logps, ref_logps: of the tokens taken, under the policy, the policy that sampled them and the
            reference; padded ``[B, T]`` or packed ``[N]``.
        advantages: per token, or per sequence ``[B]`` (packed ``[S]``, with ``cu_seqlens``).
        mask: scored tokens, bool or 0/1, shaped like ``logps``; what it excludes may hold anything.
        cliprange, cliprange_high: distances below and above 1, above defaulting to below.
        delta: above 1.
        entropy: per token; with ``entropy_coef`` it must carry a gradient (ask for ``entropy_grad=True``).
        token_weights: corrections for the sampler (``importance_weights``), per token or per sequence; they multiply
            the policy term, and never change a count.
        is_correct: bool or 0/1 per sequence, whose likelihood ``positive_nll_coef`` raises, https://arxiv.org/abs/2504.05118.
        values, old_values, returns, value_mask: per token, of the value model; ``value_mask`` defaults to ``mask``.
        reduction: ``token`` (sum / normalizer, by default the scored tokens of this call), ``sequence`` (sum of the
            sequences' token means / normalizer, by default the number of sequences, empty ones included),
            ``sequence_sum`` (the same of token sums), ``fixed`` (the same of token sums / max_completion_length, T if
            padded and not given), ``none`` (per token; without entropy, likelihood and value terms).
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
    inputs.tokens(
        where, cu_seqlens, logps=logps, old_logps=old_logps, optional=critic._replace(value_mask=None)._asdict()
    )
    _check_critic(where, critic, ppo)
    batch = Batch(
        logps, old_logps, advantages, mask, ref_logps, entropy, token_weights, is_correct, normalizer, cu_seqlens
    )
    loss, losses, kl, tokens = policy_gradient(where, batch, ppo.policy, "kl_coef")
    value_metrics: dict[str, Tensor] = {}
    if values is not None and old_values is not None and returns is not None:
        scored = tokens.mask if value_mask is None else inputs.scored(where, logps, value_mask, None, name="value_mask")
        value, value_metrics = reduced_value(
            values, old_values, returns, scored, ppo.cliprange_value, None, ppo.metrics
        )
        loss = loss + ppo.vf_coef * value
    if not ppo.metrics:
        return LossOutput(loss, {})
    terms = {"loss/policy_avg": losses, "kl": kl, "policy/entropy_avg": entropy}
    shown = {name: x.detach() for name, x in terms.items() if x is not None}
    return LossOutput(loss, policy_metrics(tokens, ppo.policy, shown) | value_metrics)


@torch.no_grad()
def policy_metrics(tokens: Tokens, options: GRPO, shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token means: of what is ``shown``, how often the clip removed the gradient (below, above, either), ``E[w^2] / 2``
    and the ratio."""
    w, A = tokens.log_ratio, tokens.advantages
    ratio = w.exp()
    low = (ratio < 1.0 - options.epsilon) & (A < 0)
    high = (ratio > 1.0 + options.high) & (A > 0)
    means = masked_means(
        {
            **shown,
            "policy/clipfrac_avg": low | high,
            "policy/clipfrac_low": low,
            "policy/clipfrac_high": high,
            "policy/approxkl_avg": w.square() / 2,
            "val/ratio": ratio,
        },
        tokens.mask,
    )
    return means | {"val/ratio_var": masked_mean((ratio - means["val/ratio"]).square(), tokens.mask)}


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
    token_weights: Tensor | None = None,
    is_correct: Tensor | None = None,
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
        token_weights, is_correct, cliprange, ..., metrics: as in ``ppo_loss``.
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
    given: dict[str, Any] = {"ref_logps": ref, "token_weights": token_weights, "is_correct": is_correct}
    given |= {"normalizer": normalizer, "cu_seqlens": cu_seqlens}

    def loss(logps: Tensor, entropy: Tensor | None) -> LossOutput:
        others = {"entropy": entropy, **given, **critic._asdict(), **ppo._asdict()}
        return ppo_loss(logps, old_logps, advantages, scored, **others)

    wanted = {"entropy": ppo.metrics, "entropy_grad": bool(ppo.entropy_coef)}
    return token_form(where, hidden, weight, targets, head, loss, **wanted)


def _check_critic(where: str, critic: Critic, ppo: PPO) -> None:
    given = [name for name in ("values", "old_values", "returns") if getattr(critic, name) is not None]
    if len(given) not in (0, 3):
        check.fail(where, f"values, old_values and returns come together, got only {' and '.join(given)}")
    if ppo.reduction == "none" and (ppo.entropy_coef or given):
        check.fail(where, "reduction='none' is per token, without entropy and value terms: use value_loss beside it")
