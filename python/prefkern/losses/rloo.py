"""REINFORCE with a leave-one-out baseline, on token log-probabilities and on hidden states."""

from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

from torch import Tensor

from prefkern.head.inputs import Head, HeadOptions
from prefkern.losses import inputs
from prefkern.losses.grpo import GRPO, shown
from prefkern.losses.linear import token_form
from prefkern.losses.policy_gradient import Batch, policy_gradient
from prefkern.losses.reduce import TokenReduction
from prefkern.options import above, at_least, read, takes, within
from prefkern.types import LossOutput


class RLOO(NamedTuple):
    """The options of `rloo_loss` that are no tensors, complete."""

    epsilon: Annotated[float, within(0.0, 1.0)] = 0.2
    epsilon_high: Annotated[float | None, at_least(0.0)] = None
    delta: Annotated[float | None, above(1.0)] = None
    entropy_coef: Annotated[float, at_least(0.0)] = 0.0
    reduction: TokenReduction = "sequence"
    max_completion_length: Annotated[float | None, above(0.0)] = None
    metrics: bool = True

    @property
    def policy(self) -> GRPO:
        """The clipped objective of the ratio of whole sequences."""
        return GRPO(loss_type="grpo", importance_sampling_level="product", **self._asdict())


class RLOOOptions(TypedDict, total=False):
    """The keywords of `rloo_loss` that are no tensors."""

    epsilon: float
    epsilon_high: float | None
    delta: float | None
    entropy_coef: float
    reduction: TokenReduction
    max_completion_length: float | None
    metrics: bool


@takes(RLOO)
def rloo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[RLOOOptions],
) -> LossOutput:
    """REINFORCE with a leave-one-out baseline, https://arxiv.org/abs/2402.14740.

    With the ratio of whole sequences, ``c1 = e^(sum lp - sum lp_old)``, per sequence::

        -min(c1 A, c2 A),   c2 = clamp(c1, 1 - epsilon, 1 + epsilon_high)

    and its mean over the sequences. A sequence without a scored token counts, as 0 (TRL 1.16 counts it as -A, without a
    gradient). The divergence from a reference belongs in the rewards. Log-ratios are held within +-20, without a
    gradient beyond. Gradients reach ``logps`` and ``entropy`` only.

    Args:
        logps: of the tokens taken, padded ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``.
        old_logps: under the policy that sampled them: per token, or their sums ``[B]`` (packed ``[S]``; as many
            values as tokens are taken per token). None says that it is this one, at its first update.
        advantages: per sequence ``[B]`` (packed ``[S]``), of ``data.group_advantages(method="rloo")``; or per token,
            and a sequence then counts the mean of its tokens' losses.
        mask: scored tokens, bool or 0/1, shaped like ``logps``; what it excludes may hold anything.
        epsilon, epsilon_high: distances below and above 1, above defaulting to below.
        delta: the dual clip: the first c1 becomes ``min(c1, delta)``; above 1.
        entropy: per token; with ``entropy_coef`` it must carry a gradient (ask for ``entropy_grad=True``).
        token_weights: as in ``grpo_loss``.
        reduction: as in ``grpo_loss``, where a token has the loss of its sequence; ``none`` is per token.
        normalizer: the number of sequences of the whole batch, for equal gradients under accumulation.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64), with the metrics of ``grpo_loss``, means over the
        sequences.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "rloo_loss"
    rloo = read(where, options, RLOO).policy
    batch = Batch(
        logps,
        old_logps,
        advantages,
        mask,
        entropy=entropy,
        token_weights=token_weights,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    return shown(policy_gradient(where, batch, rloo), rloo, entropy)


class LinearRLOOOptions(RLOOOptions, HeadOptions, total=False):
    """The keywords of `linear_rloo_loss` on the loss and the head."""


@takes(RLOO, Head)
def linear_rloo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearRLOOOptions],
) -> LossOutput:
    """``rloo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    With ``entropy_coef`` the entropy carries its gradient to the head; without, it is a metric. See ``rloo_loss`` for
    the formulas, https://arxiv.org/abs/2402.14740, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``.
        weight: ``[V, H]``.
        targets: the tokens taken, ``[B, T]`` or ``[N]``, aligned (``shift_labels``).
        mask: scored tokens, with ``targets != ignore_index``; what it excludes costs no product.
        old_logps, advantages, token_weights, normalizer, epsilon, ..., metrics: as in ``rloo_loss``.
        num_scored: counts the targets that are scored and in ``mask``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``rloo_loss``, ``entropy`` among them.

    Raises:
        TypeError, ValueError: what the parts refuse, by name.
    """
    where = "linear_rloo_loss"
    rloo, head = read(where, options, RLOO, Head)
    targets, scored = inputs.scored_targets(where, targets, mask, cu_seqlens, head.ignore_index)
    given: dict[str, Any] = {"token_weights": token_weights, "normalizer": normalizer, "cu_seqlens": cu_seqlens}

    def loss(logps: Tensor, entropy: Tensor | None) -> LossOutput:
        return rloo_loss(logps, old_logps, advantages, scored, entropy=entropy, **given, **rloo._asdict())

    wanted = {"entropy": rloo.metrics, "entropy_grad": bool(rloo.entropy_coef)}
    return token_form(where, hidden, weight, targets, head, loss, **wanted)
