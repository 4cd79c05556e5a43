"""Group relative policy optimisation and its kin, on token log-probabilities and on hidden states."""

from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.linear import token_form
from prefkern.losses.policy import PolicyLossType, check_policy_options
from prefkern.losses.policy_gradient import Batch, PolicyGradient, clip_metrics, policy_gradient
from prefkern.losses.ratios import KLEstimator, KLGradient, RatioLevel
from prefkern.losses.reduce import TokenReduction
from prefkern.losses.reference_model import ReferenceModel
from prefkern.options import FINITE, above, at_least, read, takes, within
from prefkern.types import LossOutput


class GRPO(NamedTuple):
    """The options of `grpo_loss` that are no tensors, complete: those of all policy losses."""

    epsilon: Annotated[float, within(0.0, 1.0)] = 0.2
    epsilon_high: Annotated[float | None, at_least(0.0)] = None
    delta: Annotated[float | None, above(1.0)] = None
    loss_type: PolicyLossType = "dapo"
    importance_sampling_level: RatioLevel = "token"
    beta: Annotated[float, at_least(0.0)] = 0.0
    use_bias_correction_kl: bool = True
    kl_estimator: KLEstimator = "k3"
    kl_gradient: KLGradient = "plain"
    entropy_coef: Annotated[float, at_least(0.0)] = 0.0
    positive_nll_coef: Annotated[float, at_least(0.0)] = 0.0
    sapo_temperature_pos: Annotated[float, above(0.0)] = 1.0
    sapo_temperature_neg: Annotated[float, above(0.0)] = 1.05
    vespo_k_pos: Annotated[float, at_least(0.0)] = 2.0
    vespo_lambda_pos: Annotated[float, above(0.0)] = 3.0
    vespo_k_neg: Annotated[float, at_least(0.0)] = 3.0
    vespo_lambda_neg: Annotated[float, above(0.0)] = 2.0
    importance_tau: Annotated[float, at_least(0.0)] = 1e-3
    cov_ratio: Annotated[float, within(0.0, 1.0)] = 2e-4
    clip_cov_low: Annotated[float, FINITE] = 1.0
    clip_cov_high: Annotated[float, FINITE] = 5.0
    kl_cov_coef: Annotated[float, at_least(0.0)] = 0.1
    dro_beta: Annotated[float | None, above(0.0)] = None
    reduction: TokenReduction | None = None
    max_completion_length: Annotated[float | None, above(0.0)] = None
    metrics: bool = True

    @property
    def high(self) -> float:
        """The distance above 1, that below it unless another is given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def check(self, where: str) -> None:
        check_policy_options(where, self)


class GRPOOptions(TypedDict, total=False):
    """The keywords of `grpo_loss` that are no tensors."""

    epsilon: float
    epsilon_high: float | None
    delta: float | None
    loss_type: PolicyLossType
    importance_sampling_level: RatioLevel
    beta: float
    use_bias_correction_kl: bool
    kl_estimator: KLEstimator
    kl_gradient: KLGradient
    entropy_coef: float
    positive_nll_coef: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    importance_tau: float
    cov_ratio: float
    clip_cov_low: float
    clip_cov_high: float
    kl_cov_coef: float
    dro_beta: float | None
    reduction: TokenReduction | None
    max_completion_length: float | None
    metrics: bool


@takes(GRPO)
def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weights: Tensor | None = None,
    is_correct: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[GRPOOptions],
) -> LossOutput:
    """Group relative policy optimisation and its kin, https://arxiv.org/abs/2402.03300.

    With ``w = lp - lp_old``, ``c = e^w`` and ``clip(c) = clamp(c, 1 - epsilon, 1 + epsilon_high)``, per token, and then
    reduced in the way that the type names (``reduction`` overrides it)::

        grpo, sapo                     sequence: the mean over sequences of their token means
        bnpo                           token: sum / normalizer, by default the scored tokens of this call
        dapo, cispo, vespo             token, with a normalizer: the scored tokens of the whole batch
        dr_grpo                        fixed: sum / (sequences x max_completion_length)
        luspo                          sequence_sum: the mean over sequences of their token sums

        grpo bnpo dr_grpo dapo luspo   -min(c A, clip(c) A), dual clip: the first c is min(c, delta)
        cispo                          -sg[min(c, epsilon_high)] A lp: the cap is absolute, and required
        sapo                           -A (4 / t) s(t (c - 1)), t = sapo_temperature_pos or _neg by the sign of A
        vespo                          -sg[phi] A lp, phi = e^(l + k log w - l w) of the sequence's product of ratios
        gspo_token   (sequence)        as grpo, of exp(lp - sg[lp] + sg[mean w])
        gmpo         (sequence)        -mean(A) exp(mean w'), w clipped to [-epsilon, epsilon_high] where A says so
        dppo_tv      (token)           -A sg[min(c, delta)] lp while p - p_old is within [-epsilon, epsilon_high]
        dppo_kl      (token)           the same while the binary divergence is; delta defaults to 20
        importance_mask (token)        -A c while p - p_old is within, + importance_tau w^2
        clip_cov     (token)           as bnpo, 0 at a few random tokens of high covariance of A and lp
        kl_cov       (token)           -A c + kl_cov_coef |w| at the tokens of highest covariance
        importance_sampling (token)    -A c
        reinforce    (token)           -A lp
        dro          (token)           -(A lp - dro_beta / 2 w^2)

    `prefkern.losses.policy` has the paper of each, and how it differs from TRL or verl where it does. GSPO is ``grpo``
    with ``importance_sampling_level="sequence"``: w is its mean over the sequence. The total is::

        reduce( token_weights loss + beta k c ) - entropy_coef mean(entropy) + positive_nll_coef mean(-lp where correct)

    k estimates ``KL(policy || reference)`` with ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``.
    Times the ratio, as here (TRL 1.16's default) unless ``use_bias_correction_kl=False``, k1 and k3 have the gradient
    of the divergence on average. Alone they have not: k1's is 0 on average, k3's follows the divergence the other way
    round (k2's is right on policy). ``kl_gradient="unbiased"`` keeps the value of k alone and takes the gradient
    ``sg[c k1] grad lp``. Log-ratios are held within +-20, without a gradient beyond (in TRL they are not).
    Gradients reach ``logps`` and ``entropy`` only.

    Args:
        logps, ref_logps: of the tokens taken, under the policy and the reference; padded ``[B, T]`` or packed ``[N]``.
        old_logps: under the policy that sampled them. None says that it is this one, at its first update (TRL's
            ``num_iterations=1``): every ratio is 1 and has a gradient.
        advantages: per token, or per sequence ``[B]`` (packed ``[S]``, with ``cu_seqlens``).
        mask: scored tokens, bool or 0/1, shaped like ``logps``; what it excludes may hold anything.
        epsilon, epsilon_high: distances below and above, above defaulting to below: of the ratio from 1, of its
            logarithm (gmpo), of probabilities (dppo_tv, importance_mask), or a divergence (dppo_kl).
        delta: above 1.
        importance_sampling_level: ``token``, ``sequence`` (w is its mean over the sequence) or ``product`` (its sum).
        entropy: per token; with ``entropy_coef`` it must carry a gradient (ask for ``entropy_grad=True``).
        token_weights: corrections for the sampler (``importance_weights``), per token or per sequence. They multiply
            the policy term, not k (vespo: they are part of the sequence's ratio), and never change a count: what they
            reject leaves through ``mask``.
        is_correct: bool or 0/1 per sequence, whose likelihood ``positive_nll_coef`` raises, https://arxiv.org/abs/2504.05118.
        normalizer: the count of the whole batch, of what the reduction divides by: scored tokens, or sequences. A
            number or a device tensor; 0 gives 0. For one batch alone: ``mask.sum()``.
        max_completion_length: of ``fixed``; default T, required where packed.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences.
        generator: of clip_cov's draws; it makes them repeat.
        cov_ratio: of clip_cov and kl_cov, the share of the scored tokens, rounded down, at least one.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, token means (over sequences at another
        level): ``clip_ratio/low_mean``, ``clip_ratio/high_mean``, ``clip_ratio/region_mean`` (the ratio is past the
        clip that the advantage moves it to), ``policy/approxkl_avg`` (``E[w^2] / 2``), ``val/ratio``; where their
        inputs are given ``kl``, ``entropy``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, or what a type needs, by name.
    """
    where = "grpo_loss"
    grpo = read(where, options, GRPO)
    batch = Batch(
        logps,
        old_logps,
        advantages,
        mask,
        ref_logps,
        entropy,
        token_weights,
        is_correct,
        normalizer,
        cu_seqlens,
        generator,
    )
    return shown(policy_gradient(where, batch, grpo), grpo, entropy)


def shown(result: PolicyGradient, options: GRPO, entropy: Tensor | None) -> LossOutput:
    """The loss with its metrics under TRL's names."""
    if not options.metrics:
        return LossOutput(result.loss, {})
    terms = {"kl": result.kl, "entropy": entropy}
    means = {name: x.detach() for name, x in terms.items() if x is not None}
    return LossOutput(result.loss, clip_metrics(result.tokens, options, means))


class LinearGRPOOptions(GRPOOptions, ReferenceOptions, HeadOptions, total=False):
    """The keywords of `linear_grpo_loss` on the loss, the reference's head and the policy's."""


@takes(GRPO, Reference, Head)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
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
    generator: torch.Generator | None = None,
    **options: Unpack[LinearGRPOOptions],
) -> LossOutput:
    """``grpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    With ``entropy_coef`` the entropy carries its gradient to the head; without, it is a metric. See ``grpo_loss`` for
    the formulas, https://arxiv.org/abs/2402.03300, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]``, with ``cu_seqlens`` where sequences matter.
        weight: ``[V, H]``.
        targets: the tokens taken, ``[B, T]`` or ``[N]``, aligned (``shift_labels``).
        old_logps, advantages: as in ``grpo_loss``.
        mask: scored tokens, with ``targets != ignore_index``; what it excludes costs no product.
        ref_logps: of the tokens taken under the reference, shaped like ``targets``; optional. Or instead of it:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        token_weights, is_correct, normalizer, generator, epsilon, ..., metrics: as in ``grpo_loss``.
        num_scored: counts the targets that are scored and in ``mask``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``grpo_loss``, ``entropy`` among them.

    Raises:
        TypeError, ValueError: two references; what the parts refuse, by name.
    """
    where = "linear_grpo_loss"
    grpo, form, head = read(where, options, GRPO, Reference, Head)
    targets, scored = inputs.scored_targets(where, targets, mask, cu_seqlens, head.ignore_index)
    ref = ReferenceModel(ref_logps, ref_hidden, ref_weight, form).per_token(where, head, targets)
    given: dict[str, Any] = {
        "ref_logps": ref,
        "token_weights": token_weights,
        "is_correct": is_correct,
        "generator": generator,
    }
    given |= {"normalizer": normalizer, "cu_seqlens": cu_seqlens}

    def loss(logps: Tensor, entropy: Tensor | None) -> LossOutput:
        return grpo_loss(logps, old_logps, advantages, scored, entropy=entropy, **given, **grpo._asdict())

    wanted = {"entropy": grpo.metrics, "entropy_grad": bool(grpo.entropy_coef)}
    return token_form(where, hidden, weight, targets, head, loss, **wanted)
