"""Direct preference optimisation on sequence log-probabilities."""

from typing import Literal

from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.preference import PAIR_LOSSES, PairLoss, PairOptions, Pairs, log_ratios, pair_metrics
from prefkern.losses.reduce import reduce_rows, widen
from prefkern.types import LossOutput, Reduction

DPOLossType = Literal["sigmoid", "hinge", "ipo"]


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: bool = True,
) -> LossOutput:
    """Direct preference optimisation, https://arxiv.org/abs/2305.18290.

    With ``D = lp_theta - lp_ref`` of each side and ``d = D_c - D_r``, per pair::

        sigmoid   -(1 - e) ls(beta d) - e ls(-beta d)        e = label_smoothing; TRL 1.16 ignores e here
        hinge     relu(1 - beta d)
        ipo       (D_c / n_c - D_r / n_r - 1 / (2 beta))^2   n = lengths, at least 1

    With zeros for the reference it is the loss on raw scores, ``-log [e^(beta f+) / (e^(beta f+) + e^(beta f-))]``.

    Args:
        chosen_logps, rejected_logps: sums over scored tokens (``pair_logps``), each ``[B]``.
        ref_chosen_logps, ref_rejected_logps: the reference model's, each ``[B]``; no gradient reaches them.
        beta: how strongly the policy is held to the reference, above 0 (ipo: its tau).
        label_smoothing: the chance that a label is flipped, in [0, 1/2); for ``sigmoid`` only.
        chosen_lengths, rejected_lengths: scored lengths ``[B]``; needed by ``ipo`` only.
        weights: ``[B]``, multiply the loss of each pair; the mean still divides by B.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]``.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, means over the batch: ``rewards/chosen``
        (``beta D``), ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``. An empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "dpo_loss"
    options = check_options(where, beta, loss_type, label_smoothing, reduction)
    inputs.rows(
        where,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        optional={"weights": weights},
    )
    check_lengths(where, loss_type, chosen_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    pairs = Pairs(chosen, rejected, chosen_lengths, rejected_lengths)
    losses = PAIR_LOSSES[loss_type].function(pairs, options)
    if weights is not None:
        losses = losses * widen(weights)
    shown = pair_metrics(pairs, chosen_logps, rejected_logps, options.beta) if metrics else {}
    return LossOutput(reduce_rows(losses, reduction), shown)


def check_options(
    where: str,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    reduction: str,
    family: dict[str, PairLoss] = PAIR_LOSSES,
) -> PairOptions:
    check.one_of(where, "loss_type", loss_type, tuple(family))
    check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    beta = check.number(where, "beta", beta, low=0.0, open_low=True)
    smoothing = family[loss_type].smoothing
    if smoothing is not None:
        low, high = smoothing
        label_smoothing = check.number(where, "label_smoothing", label_smoothing, low=low, high=high, open_high=True)
    elif label_smoothing != 0.0:
        used = " or ".join(repr(name) for name, loss in family.items() if loss.smoothing is not None)
        check.fail(where, f"label_smoothing is for loss_type={used}; {loss_type!r} has none, got {label_smoothing!r}")
    return PairOptions(beta, label_smoothing)


def check_lengths(
    where: str, loss_type: str, logps: Tensor, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> None:
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if lengths is None:
            if PAIR_LOSSES[loss_type].needs_lengths:
                check.fail(where, f"loss_type={loss_type!r} divides by {name} [B], which pair_logps returns; got None")
            continue
        check.tensor(where, name, lengths)
        if lengths.shape != logps.shape:
            check.fail(where, f"{name} must have shape {tuple(logps.shape)}, got {check.describe(lengths)}")
        check.same_device(where, chosen_logps=logps, **{name: lengths})
