"""Direct preference optimisation, on sequence log-probabilities and on hidden states."""

from functools import partial
from typing import Annotated, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.linear import sequence_form
from prefkern.losses.preference import PAIR_LOSSES, DPOLossType, Pairs, check_pair_options, log_ratios, pair_metrics
from prefkern.losses.reduce import reduce_rows, widen
from prefkern.losses.reference_model import ReferenceModel
from prefkern.losses.sequences import pair_logps
from prefkern.options import FINITE, above, read, takes
from prefkern.types import LossOutput, Reduction


class DPO(NamedTuple):
    """The options of `dpo_loss`, complete."""

    beta: Annotated[float, above(0.0)] = 0.1
    loss_type: DPOLossType = "sigmoid"
    label_smoothing: Annotated[float, FINITE] = 0.0
    reduction: Reduction = "mean"
    metrics: bool = True

    def check(self, where: str) -> None:
        check_pair_options(where, self.loss_type, self.label_smoothing)


class DPOOptions(TypedDict, total=False):
    """The keywords of `dpo_loss` that are no tensors."""

    beta: float
    loss_type: DPOLossType
    label_smoothing: float
    reduction: Reduction
    metrics: bool


@takes(DPO)
def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Unpack[DPOOptions],
) -> LossOutput:
    """Direct preference optimisation, https://arxiv.org/abs/2305.18290.

    With ``D = lp_theta - lp_ref`` of each side and ``d = D_c - D_r``, per pair::

        sigmoid   -(1 - e) ls(beta d) - e ls(-beta d)        e = label_smoothing; TRL 1.16 ignores e here
        hinge     relu(1 - beta d)
        ipo       (D_c / n_c - D_r / n_r - 1 / (2 beta))^2   n = lengths, at least 1
        robust    [-(1 - e) ls(beta d) + e ls(-beta d)] / (1 - 2 e)

    With zeros for the reference it is the loss on raw scores, ``-log [e^(beta f+) / (e^(beta f+) + e^(beta f-))]``.

    Args:
        chosen_logps, rejected_logps: sums over scored tokens (``pair_logps``), each ``[B]``.
        ref_chosen_logps, ref_rejected_logps: the reference model's, each ``[B]``; no gradient reaches them.
        beta: how strongly the policy is held to the reference, above 0 (ipo: its tau).
        label_smoothing: the chance that a label is flipped, in [0, 1/2); for ``sigmoid`` and ``robust``.
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
    dpo = read(where, options, DPO)
    inputs.rows(
        where,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        optional={"weights": weights},
    )
    _check_lengths(where, dpo.loss_type, chosen_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    pairs = Pairs(chosen, rejected, chosen_lengths, rejected_lengths)
    losses = PAIR_LOSSES[dpo.loss_type].function(pairs, dpo)
    if weights is not None:
        losses = losses * widen(weights)
    shown = pair_metrics(pairs, chosen_logps, rejected_logps, dpo.beta) if dpo.metrics else {}
    return LossOutput(reduce_rows(losses, dpo.reduction), shown)


class LinearDPOOptions(DPOOptions, ReferenceOptions, HeadOptions, total=False):
    """The keywords of `linear_dpo_loss` on the loss, the reference's head and the policy's."""


@takes(DPO, Reference, Head)
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    **options: Unpack[LinearDPOOptions],
) -> LossOutput:
    """``dpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    See ``dpo_loss`` for the formulas, https://arxiv.org/abs/2305.18290, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        ref_logps: sequence sums of the reference ``[2B]``, with the same ``ld_alpha``. Or instead of it:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states (of any width) and
            head, scored here without a gradient. Where the policy has a bias, scale or softcap, the reference's must be
            given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        beta, loss_type, label_smoothing, weights, reduction: as in ``dpo_loss``; the lengths are those of ``targets``.
        ld_alpha: as in ``pair_logps``, for policy and reference alike.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``dpo_loss``, and token means ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows, no reference or two; what the parts refuse, by name.
    """
    where = "linear_dpo_loss"
    dpo, form, head = read(where, options, DPO, Reference, Head)
    inputs.check_pairs(where, targets, cu_seqlens, ref_logps=ref_logps, weights=weights)
    rows = partial(
        pair_logps, targets=targets, cu_seqlens=cu_seqlens, ld_alpha=ld_alpha, ignore_index=head.ignore_index
    )
    reference = ReferenceModel(ref_logps, ref_hidden, ref_weight, form)
    ref = reference.per_sequence(where, "[2B]", head, targets, lambda logps: torch.cat(rows(logps)[:2]))

    def loss(logps: Tensor) -> LossOutput:
        chosen, rejected, n_chosen, n_rejected = rows(logps)
        given = {"chosen_lengths": n_chosen, "rejected_lengths": n_rejected, "weights": weights, **dpo._asdict()}
        return dpo_loss(chosen, rejected, *ref.chunk(2), **given)

    chosen = inputs.first_half(targets, cu_seqlens)
    return sequence_form(where, hidden, weight, targets, head, loss, chosen=chosen, metrics=dpo.metrics)


def _check_lengths(
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
