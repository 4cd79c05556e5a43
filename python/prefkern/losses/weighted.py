"""Likelihoods with a reward or a score, as introductions write ORPO: on log-probabilities and on hidden states."""

from typing import Annotated, NamedTuple, TypedDict, Unpack

from torch import Tensor

from prefkern.head.inputs import Head, HeadOptions
from prefkern.head.logprobs import token_stats
from prefkern.losses import inputs
from prefkern.losses.cross_entropy import linear_cross_entropy
from prefkern.losses.objective import objective
from prefkern.losses.reduce import masked_mean, reduce_rows, widen
from prefkern.losses.sequences import sequence_logps
from prefkern.options import FINITE, at_least, read, takes
from prefkern.types import LossOutput, Reduction


class RewardRegularized(NamedTuple):
    """The options of `reward_regularized_loss`, complete."""

    reward_coef: Annotated[float, at_least(0.0)] = 0.1
    reduction: Reduction = "mean"
    metrics: bool = True


class RewardRegularizedOptions(TypedDict, total=False):
    """The keywords of `reward_regularized_loss` that are no tensors."""

    reward_coef: float
    reduction: Reduction
    metrics: bool


@takes(RewardRegularized)
def reward_regularized_loss(nll: Tensor, rewards: Tensor, **options: Unpack[RewardRegularizedOptions]) -> LossOutput:
    """``L_MLE - reward_coef R(y)``: what some introductions call ORPO.

    It learns from R only through a gradient of R. A score that comes with the data is a constant: it changes the value
    of the loss and nothing else, and the model is trained on the likelihood alone; ``score_weighted_loss`` does learn
    from it. The published ORPO, https://arxiv.org/abs/2403.07691, is ``orpo_loss``: this form, with R the logarithm of
    the sigmoid of the log-odds of the chosen over the rejected. The same pair in all three:

    >>> import torch, prefkern as pk
    >>> chosen, rejected = torch.tensor([-0.5], requires_grad=True), torch.tensor([-1.0])  # averages
    >>> odds = lambda a: a - torch.log(-torch.expm1(a))
    >>> R = torch.nn.functional.logsigmoid(odds(chosen) - odds(rejected))
    >>> for loss in (
    ...     pk.orpo_loss(chosen, rejected, -chosen, beta=0.1).loss,
    ...     pk.reward_regularized_loss(-chosen, R, reward_coef=0.1).loss,
    ...     pk.reward_regularized_loss(-chosen, torch.tensor([0.8]), reward_coef=0.1).loss,  # a score of the data
    ... ):
    ...     print(round(loss.item(), 4), round(torch.autograd.grad(loss, chosen, retain_graph=True)[0].item(), 4))
    0.532 -1.0697
    0.532 -1.0697
    0.42 -1.0

    Args:
        nll: the negative log-likelihood of the examples: a scalar (the mean over tokens), or one value each ``[B]``.
        rewards: a scalar or ``[B]``: a tensor with a gradient, or scores of the data.
        reward_coef: weight of the reward, not negative.
        reduction: ``mean`` over examples, ``sum``, or ``none``; a scalar counts in every example of the other.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics: the means ``nll_loss`` and ``reward``. An
        empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "reward_regularized_loss"
    given = read(where, options, RewardRegularized)
    inputs.required(where, nll=nll, rewards=rewards)
    if nll.ndim == 0:
        inputs.scalar_or_rows(where, "rewards", rewards, rewards)
    else:
        inputs.rows(where, nll=nll)
        inputs.scalar_or_rows(where, "rewards", rewards, nll)
    losses = widen(nll) - given.reward_coef * widen(rewards)
    shown: dict[str, Tensor] = {}
    if given.metrics:
        shown = {"nll_loss": masked_mean(nll.detach(), None), "reward": masked_mean(rewards.detach(), None)}
    return LossOutput(reduce_rows(losses, given.reduction), shown)


class LinearRewardRegularizedOptions(RewardRegularizedOptions, HeadOptions, total=False):
    """The keywords of `linear_reward_regularized_loss` on the loss and the head."""


@takes(RewardRegularized, Head)
def linear_reward_regularized_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, rewards: Tensor, **options: Unpack[LinearRewardRegularizedOptions]
) -> LossOutput:
    """``reward_regularized_loss`` of the mean over the scored tokens of ``linear_cross_entropy``, as it is made there.

    Args:
        hidden, weight, targets: ``[..., H]``, ``[V, H]``, ``[...]``, aligned (``shift_labels``).
        rewards, reward_coef, reduction, metrics: as in ``reward_regularized_loss``.
        bias, temperature, ..., group: as in ``linear_cross_entropy``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of both.

    Raises:
        TypeError, ValueError: what the parts refuse, by name.
    """
    where = "linear_reward_regularized_loss"
    given, head = read(where, options, RewardRegularized, Head)
    nll, shown = linear_cross_entropy(hidden, weight, targets, metrics=given.metrics, **head._asdict())
    loss, metrics = reward_regularized_loss(nll, rewards, **given._asdict())
    return LossOutput(loss, metrics | shown)


class ScoreWeighted(NamedTuple):
    """The options of `score_weighted_loss`, complete."""

    baseline: Annotated[float, FINITE] = 0.0
    reduction: Reduction = "mean"
    metrics: bool = True


class ScoreWeightedOptions(TypedDict, total=False):
    """The keywords of `score_weighted_loss` that are no tensors."""

    baseline: float
    reduction: Reduction
    metrics: bool


@objective("token")
def score_weighted(logps: Tensor, scores: Tensor, baseline: float) -> Tensor:
    """``-(score - baseline) lp``."""
    return (baseline - scores) * logps


@takes(ScoreWeighted)
def score_weighted_loss(logps: Tensor, scores: Tensor, **options: Unpack[ScoreWeightedOptions]) -> LossOutput:
    """The likelihood of answers, each weighed by its score: ``-(score - baseline) lp``.

    What rows of prompt, response and score can teach: with scores from 0 to 1 it is the likelihood, most of all that of
    the best answers. On answers that the model wrote itself its gradient is that of the expected score (REINFORCE).
    It is neither of the published losses: ``orpo_loss`` needs a rejected answer to each, and ``kto_loss`` makes two
    classes of the scores and saturates, where this one goes on.

    >>> import torch, prefkern as pk
    >>> logps, scores = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([1.0, 0.25])
    >>> loss = pk.score_weighted_loss(logps, scores).loss
    >>> loss.item(), torch.autograd.grad(loss, logps)[0].tolist()
    (0.75, [-0.5, -0.125])

    A score below the baseline lowers the likelihood of its answer, without a bound: prefer scores from 0 to 1, or stop
    early.

    Args:
        logps: of the answers, ``[B]``: means over scored tokens (``sequence_logps(average=True)``), with which each
            answer counts the same, or sums.
        scores: ``[B]``; no gradient reaches them.
        baseline: what is subtracted from every score.
        reduction: ``mean`` over examples, ``sum``, or ``none`` for ``[B]``.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics: the means ``score`` and ``logps``. An
        empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "score_weighted_loss"
    given = read(where, options, ScoreWeighted)
    inputs.rows(where, logps=logps, scores=scores)
    losses = score_weighted(widen(logps), widen(scores).detach(), given.baseline)
    shown: dict[str, Tensor] = {}
    if given.metrics:
        shown = {"score": masked_mean(scores.detach(), None), "logps": masked_mean(logps.detach(), None)}
    return LossOutput(reduce_rows(losses, given.reduction), shown)


class LinearScoreWeightedOptions(ScoreWeightedOptions, HeadOptions, total=False):
    """The keywords of `linear_score_weighted_loss` on the loss and the head."""


@takes(ScoreWeighted, Head)
def linear_score_weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scores: Tensor,
    *,
    average: bool = True,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearScoreWeightedOptions],
) -> LossOutput:
    """``score_weighted_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens [B + 1]``.
        weight: ``[V, H]``.
        targets: ``[B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        scores: ``[B]``.
        average: whether an answer counts by the mean over its tokens, or by their sum.
        baseline, reduction, metrics: as in ``score_weighted_loss``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``score_weighted_loss``.

    Raises:
        TypeError, ValueError: what the parts refuse, by name.
    """
    where = "linear_score_weighted_loss"
    given, head = read(where, options, ScoreWeighted, Head)
    inputs.check_rows(where, targets, cu_seqlens)
    logps = token_stats(where, hidden, weight, targets, head).logps
    layout = {"targets": targets, "cu_seqlens": cu_seqlens}
    rows = sequence_logps(logps, average=average, ignore_index=head.ignore_index, **layout)
    return score_weighted_loss(rows, scores, **given._asdict())
