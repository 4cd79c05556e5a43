"""Kahneman-Tversky optimisation on sequence log-probabilities of unpaired examples."""

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.reduce import reduce_rows, widen
from prefkern.objectives import kto
from prefkern.types import LossOutput, Reduction

KTOLossType = Literal["kto", "apo_zero_unpaired"]


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: KTOLossType = "kto",
    reduction: Reduction = "mean",
    metrics: bool = True,
) -> LossOutput:
    """Kahneman-Tversky optimisation, https://arxiv.org/abs/2402.01306.

    With ``D = lp_theta - lp_ref``, per example::

        kto                 desirable w_d (1 - s(beta (D - kl))),  undesirable w_u (1 - s(beta (kl - D)))
        apo_zero_unpaired   desirable w_d (1 - s(beta D)),         undesirable w_u s(beta D); kl is not used

    The mean is over all examples; a batch of one class only is legal. A NaN in any example is a NaN in the loss (TRL
    leaves such examples out without a word).

    Args:
        logps: sums over scored tokens (``sequence_logps``), ``[B]``.
        ref_logps: the reference model's, ``[B]``; no gradient reaches it.
        is_desirable: bool or 0/1, ``[B]``.
        kl: the baseline: a number, a tensor of one element (``kto_kl``), or one value per example ``[B]``, used as it
            is (neither clamped nor averaged) and without a gradient. None is 0.
        beta: how strongly the policy is held to the reference, above 0.
        desirable_weight, undesirable_weight: not negative.
        reduction: ``mean`` over examples, ``sum``, or ``none`` for ``[B]``.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics: ``rewards/chosen`` (``beta D``, mean over
        the desirable; 0 if there are none), ``rewards/rejected``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, ``count/chosen``, ``count/rejected``, ``kl``. An empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "kto_loss"
    options = check_options(where, beta, desirable_weight, undesirable_weight, loss_type, reduction)
    inputs.rows(where, logps=logps, ref_logps=ref_logps)
    desirable = inputs.flags(where, "is_desirable", is_desirable, logps)
    kl = _baseline(where, kl, logps)
    log_ratios = widen(logps) - widen(ref_logps).detach()
    losses = kto.UNPAIRED_LOSSES[loss_type](log_ratios, desirable, kl, options)
    shown = kto.unpaired_metrics(log_ratios, logps, desirable, kl, options.beta) if metrics else {}
    return LossOutput(reduce_rows(losses, reduction), shown)


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """KTO's baseline: ``relu(mean(lp_theta - lp_ref))`` over mismatched completions, https://arxiv.org/abs/2402.01306.

    A mismatched completion is the answer to one prompt scored after another. The mean is over the examples of every
    rank of ``group`` (one all-reduce of sum and count; a rank without examples is legal), or of this process alone
    when it is None.

    Args:
        kl_logps, ref_kl_logps: sums over scored tokens under the policy and the reference, each ``[B]``.
        group: a ``torch.distributed`` process group.

    Returns:
        A scalar without a gradient, float32 (float64 for float64); 0 for no examples. A NaN propagates.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, by name.
    """
    inputs.rows("kto_kl", kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    return kto.kto_kl(kl_logps, ref_kl_logps, group)


def check_options(
    where: str, beta: float, desirable_weight: float, undesirable_weight: float, loss_type: str, reduction: str
) -> kto.KTOOptions:
    check.one_of(where, "loss_type", loss_type, tuple(kto.UNPAIRED_LOSSES))
    check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    return kto.KTOOptions(
        check.number(where, "beta", beta, low=0.0, open_low=True),
        check.number(where, "desirable_weight", desirable_weight, low=0.0),
        check.number(where, "undesirable_weight", undesirable_weight, low=0.0),
    )


def _baseline(where: str, kl: Tensor | float | None, logps: Tensor) -> Tensor | float:
    if kl is None:
        return 0.0
    if not isinstance(kl, Tensor):
        return check.number(where, "kl", kl)
    check.floating(where, kl=kl)
    if kl.numel() != 1 and kl.shape != logps.shape:
        check.fail(where, f"kl must be one value or {tuple(logps.shape)}, got {check.describe(kl)}")
    if kl.ndim > 0:
        check.same_device(where, logps=logps, kl=kl)
    return widen(kl.reshape(()) if kl.numel() == 1 else kl).detach()
