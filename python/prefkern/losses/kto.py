"""Kahneman-Tversky optimisation of unpaired examples, on sequence log-probabilities and on hidden states."""

from functools import partial
from typing import Annotated, Literal, NamedTuple, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.linear import sequence_form
from prefkern.losses.objective import Objective, objective
from prefkern.losses.reduce import divide, masked_mean, per_token, reduce_rows, widen
from prefkern.losses.reference_model import ReferenceModel
from prefkern.losses.sequences import sequence_logps
from prefkern.options import above, at_least, read, takes
from prefkern.types import LossOutput, Reduction, TokenStats

KTOLossType = Literal["kto", "apo_zero_unpaired"]


class KTO(NamedTuple):
    """The options of `kto_loss`, complete."""

    beta: Annotated[float, above(0.0)] = 0.1
    desirable_weight: Annotated[float, at_least(0.0)] = 1.0
    undesirable_weight: Annotated[float, at_least(0.0)] = 1.0
    loss_type: KTOLossType = "kto"
    reduction: Reduction = "mean"
    metrics: bool = True


class KTOOptions(TypedDict, total=False):
    """The keywords of `kto_loss` that are no tensors."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    loss_type: KTOLossType
    reduction: Reduction
    metrics: bool


@objective("sequence")
def kto(log_ratios: Tensor, is_desirable: Tensor, kl: Tensor | float, options: KTO) -> Tensor:
    """Desirable ``w_d (1 - s(beta (D - kl)))``, undesirable ``w_u (1 - s(beta (kl - D)))``, each as ``s`` of the
    opposite argument, which keeps its relative accuracy near 0."""
    x = options.beta * (log_ratios - kl)
    return torch.where(
        is_desirable,
        options.desirable_weight * torch.sigmoid(-x),
        options.undesirable_weight * torch.sigmoid(x),
    )


@objective("sequence")
def apo_zero_unpaired(log_ratios: Tensor, is_desirable: Tensor, kl: Tensor | float, options: KTO) -> Tensor:
    """Desirable ``w_d (1 - s(beta D))``, undesirable ``w_u s(beta D)``; the baseline is not used."""
    return kto(log_ratios, is_desirable, 0.0, options)


class UnpairedLoss(NamedTuple):
    """A row of the table: a function of log-ratios, labels and the baseline, and its values for the example."""

    function: Objective[[Tensor, Tensor, Tensor | float, KTO], Tensor]
    expected: tuple[float, float]
    """Its values for log-ratios 1 and -0.5, a desirable and an undesirable example, baseline 0.2, beta 0.5, weights 1
    and 2."""


UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(kto, (0.40131234, 0.82676484)),
    "apo_zero_unpaired": UnpairedLoss(apo_zero_unpaired, (0.37754067, 0.87564700)),
}


@takes(KTO)
def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor | float | None = None,
    **options: Unpack[KTOOptions],
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
    chosen = read(where, options, KTO)
    inputs.rows(where, logps=logps, ref_logps=ref_logps)
    desirable = inputs.flags(where, "is_desirable", is_desirable, logps)
    kl = _baseline(where, kl, logps)
    log_ratios = widen(logps) - widen(ref_logps).detach()
    losses = UNPAIRED_LOSSES[chosen.loss_type].function(log_ratios, desirable, kl, chosen)
    shown = unpaired_metrics(log_ratios, logps, desirable, kl, chosen.beta) if chosen.metrics else {}
    return LossOutput(reduce_rows(losses, chosen.reduction), shown)


@objective("batch")
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
    with torch.no_grad():
        differences = widen(kl_logps) - widen(ref_kl_logps)
        total = torch.stack([differences.sum(), differences.new_full((), differences.numel())])
        if group is not None:
            dist.all_reduce(total, group=group)
        return divide(total[0], total[1]).clamp(min=0.0)


class LinearKTOOptions(KTOOptions, ReferenceOptions, HeadOptions, total=False):
    """The keywords of `linear_kto_loss` on the loss, the reference's head and the policy's."""


@takes(KTO, Reference, Head)
def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    is_desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    kl: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearKTOOptions],
) -> LossOutput:
    """``kto_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    See ``kto_loss`` for the formulas, https://arxiv.org/abs/2402.01306, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens [B + 1]``.
        weight: ``[V, H]``.
        targets: ``[B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        is_desirable: bool or 0/1, ``[B]``.
        ref_logps: sequence sums of the reference ``[B]``. Or instead of it:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        kl: the baseline, from mismatched completions: ``kto_kl`` of their ``sequence_logps``, scored under
            ``torch.no_grad()``. None is 0.
        beta, desirable_weight, undesirable_weight, loss_type, reduction, metrics: as in ``kto_loss``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``kto_loss``, and token means ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy`` (of the desirable).

    Raises:
        TypeError, ValueError: no reference or two; what the parts refuse, by name.
    """
    where = "linear_kto_loss"
    kto, form, head = read(where, options, KTO, Reference, Head)
    count = inputs.check_rows(where, targets, cu_seqlens, ref_logps)
    desirable = inputs.flags(where, "is_desirable", is_desirable, like=targets.new_empty(count))
    rows = partial(sequence_logps, targets=targets, cu_seqlens=cu_seqlens, ignore_index=head.ignore_index)
    ref = ReferenceModel(ref_logps, ref_hidden, ref_weight, form).per_sequence(where, "[B]", head, targets, rows)

    def loss(stats: TokenStats) -> LossOutput:
        return kto_loss(rows(stats.logps), ref, desirable, kl=kl, **kto._asdict())

    chosen = per_token(desirable, targets, cu_seqlens)
    return sequence_form(where, hidden, weight, targets, head, loss, chosen=chosen, metrics=kto.metrics)


@torch.no_grad()
def unpaired_metrics(
    log_ratios: Tensor, logps: Tensor, is_desirable: Tensor, kl: Tensor | float, beta: float
) -> dict[str, Tensor]:
    """Means over each class (0 for an absent one, whose count is 0) and the mean baseline, under TRL's names."""
    rewards, logps = beta * log_ratios, widen(logps)
    chosen, rejected = masked_mean(rewards, is_desirable), masked_mean(rewards, ~is_desirable)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": masked_mean(logps, is_desirable),
        "logps/rejected": masked_mean(logps, ~is_desirable),
        "count/chosen": is_desirable.sum(),
        "count/rejected": (~is_desirable).sum(),
        "kl": kl.mean() if isinstance(kl, Tensor) else rewards.new_full((), kl),
    }


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
