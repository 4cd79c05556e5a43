"""Contrastive preference optimisation (CPO, SimPO, AlphaPO) on sequence log-probabilities."""

from torch import Tensor

from prefkern import check
from prefkern.losses import dpo, inputs
from prefkern.losses.preference import Pairs, pair_metrics
from prefkern.losses.reduce import masked_mean, reduce_rows, widen
from prefkern.objectives.cpo import CPO_LOSSES, CPOLossType, CPOOptions, cpo, reward
from prefkern.types import LossOutput, Reduction


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: CPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    reduction: Reduction = "mean",
    metrics: bool = True,
) -> LossOutput:
    """Contrastive preference optimisation, without a reference model, https://arxiv.org/abs/2401.08417.

    The pair loss plus ``cpo_alpha NLL(chosen)``, with ``x = r_c - r_r`` of the rewards, e = label_smoothing, per pair::

        sigmoid   -(1 - e) ls(beta x) - e ls(-beta x)         r = lp, a sum over tokens
        simpo     the same of x - simpo_gamma / beta          r = lp, a mean over tokens: SimPO is cpo_alpha=0
        hinge     relu(1 - beta x)                            r = lp, a sum
        ipo       (x - 1 / (2 beta))^2                        r = lp, a mean

    With ``alpha`` the reward is AlphaPO's ``(1 - p^-alpha) / alpha``, which is lp at alpha = 0; ``p^-alpha`` is held at
    e^80, without a gradient beyond.

    Args:
        chosen_logps, rejected_logps: sums over scored tokens (``pair_logps``), for ``ipo`` and ``simpo`` means
            (``average=True``), each ``[B]``.
        chosen_nll: the negative log-likelihood of the chosen: a scalar (TRL: the mean over the completion tokens of the
            batch), or one value per pair ``[B]``. Left out only with ``cpo_alpha=0``.
        beta: scale of the rewards, above 0.
        label_smoothing: the chance that a label is flipped, in [0, 1/2); for ``sigmoid`` and ``simpo``.
        cpo_alpha: weight of the likelihood, not negative.
        simpo_gamma: the margin of ``simpo``, not negative.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]``; a scalar ``chosen_nll`` counts in every pair.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, means over the batch: ``rewards/chosen``
        (``beta r``), ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, and ``nll_loss`` where it is given. An empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "cpo_loss"
    options = check_options(where, beta, loss_type, label_smoothing, cpo_alpha, simpo_gamma, alpha, reduction)
    inputs.rows(where, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    if chosen_nll is None and cpo_alpha:
        check.fail(where, f"cpo_alpha={cpo_alpha} weighs chosen_nll, got None: pass it, or cpo_alpha=0")
    inputs.likelihood(where, chosen_nll, chosen_logps)
    losses = cpo(chosen_logps, rejected_logps, options)
    if chosen_nll is not None and cpo_alpha:
        losses = losses + cpo_alpha * widen(chosen_nll)
    shown: dict[str, Tensor] = {}
    if metrics:
        rewards = Pairs(reward(chosen_logps.detach(), alpha), reward(rejected_logps.detach(), alpha))
        shown = pair_metrics(rewards, chosen_logps, rejected_logps, options.beta)
        shown |= {} if chosen_nll is None else {"nll_loss": masked_mean(chosen_nll.detach(), None)}
    return LossOutput(reduce_rows(losses, reduction), shown)


def check_options(
    where: str,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    cpo_alpha: float,
    simpo_gamma: float,
    alpha: float,
    reduction: str,
) -> CPOOptions:
    beta, label_smoothing = dpo.check_options(where, beta, loss_type, label_smoothing, reduction, CPO_LOSSES)
    check.number(where, "cpo_alpha", cpo_alpha, low=0.0)
    gamma = check.number(where, "simpo_gamma", simpo_gamma, low=0.0)
    return CPOOptions(loss_type, beta, label_smoothing, gamma, check.number(where, "alpha", alpha))
