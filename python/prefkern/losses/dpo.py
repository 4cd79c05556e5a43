"""Direct preference optimisation, on sequence log-probabilities and on hidden states."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.cross_entropy import ChosenLikelihood
from prefkern.losses.linear import sequence_form
from prefkern.losses.links import LINKS, FDivergence
from prefkern.losses.pair_checks import check_loss_types, check_mixture, check_pair_tensors, loss_names
from prefkern.losses.preference import PAIR_LOSSES, DPOLossType, PairOptions, Pairs, log_ratios, pair_metrics
from prefkern.losses.reduce import divide, reduce_rows, widen
from prefkern.losses.reference_model import ReferenceModel
from prefkern.losses.sequences import pair_logps, wpo_weights
from prefkern.options import FINITE, Range, above, read, takes
from prefkern.types import LossOutput, Output, PairLogps, Reduction, TokenStats


class DPO(NamedTuple):
    """The options of `dpo_loss`, complete."""

    beta: Annotated[float, above(0.0)] = 0.1
    loss_type: DPOLossType | Sequence[DPOLossType] = "sigmoid"
    label_smoothing: Annotated[float, FINITE] = 0.0
    loss_weights: Sequence[float] | None = None
    f_divergence_type: FDivergence = "reverse_kl"
    f_alpha_divergence_coef: Annotated[float, FINITE] = 0.5
    discopop_tau: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.05
    reduction: Reduction = "mean"
    metrics: bool = True

    def check(self, where: str) -> None:
        check_loss_types(where, self.loss_type, self.label_smoothing)
        check_mixture(where, self.loss_type, self.loss_weights, self.f_divergence_type)


class DPOOptions(TypedDict, total=False):
    """The keywords of `dpo_loss` that are no tensors."""

    beta: float
    loss_type: DPOLossType | Sequence[DPOLossType]
    label_smoothing: float
    loss_weights: Sequence[float] | None
    f_divergence_type: FDivergence
    f_alpha_divergence_coef: float
    discopop_tau: float
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
    margin: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    **options: Unpack[DPOOptions],
) -> LossOutput:
    """Direct preference optimisation and the losses of preference pairs, https://arxiv.org/abs/2305.18290.

    With ``D = lp_theta - lp_ref`` of each side, ``d = g(D_c) - g(D_r)``, n the lengths, s the sigmoid, ls its logarithm
    and e = label_smoothing, per pair::

        sigmoid        -(1 - e) ls(beta d) - e ls(-beta d)            e in [0, 1/2); TRL 1.16 ignores e here
        hinge          relu(1 - beta d)
        ipo            (g(D_c) / n_c - g(D_r) / n_r - 1 / (2 beta))^2
        exo_pair       q_w (log q_w - log(1 - e)) + q_l (log q_l - log e)      q_w, q_l = s(+-beta d), e in (0, 1/2)
        nca_pair       -ls(beta D_c) - ls(-beta D_c) / 2 - ls(-beta D_r) / 2
        robust         [-(1 - e) ls(beta d) + e ls(-beta d)] / (1 - 2 e)       e in [0, 1/2)
        bco_pair       -ls(beta D_c) - ls(-beta D_r)
        sppo_hard      (D_c - 1 / (2 beta))^2 + (D_r + 1 / (2 beta))^2
        aot            as sigmoid, of sort(lp_c - lp_r) - sort(ref_c - ref_r), sorted over the batch
        aot_unpaired   as sigmoid, of sort(D_c) - sort(D_r)
        apo_zero       1 - s(beta D_c) + s(beta D_r)
        apo_down       s(beta D_c) + 1 - s(beta (D_c - D_r))
        discopop       -ls(u) (1 - w) + e^-u w                        u = beta d, w = s(u / discopop_tau)
        sigmoid_norm   -ls(beta (g(D_c) / n_c - g(D_r) / n_r))
        sft            the mean of -lp over the tokens of all chosen, in every pair

    and g the link of the f-divergence, its exponents held at 80 without a gradient beyond::

        reverse_kl  x          forward_kl  1 - e^-x          js_divergence  log 2 + ls(x)
        alpha_divergence  (e^((a - 1) x) - 1) / (a - 1), a = f_alpha_divergence_coef

    With zeros for the reference, ``sigmoid`` is the loss on raw scores f that introductions begin with,
    ``-log [e^(beta f+) / (e^(beta f+) + e^(beta f-))]``:

    >>> import torch, prefkern as pk
    >>> better, worse, zero = torch.tensor([1.0]), torch.tensor([-1.0]), torch.zeros(1)
    >>> round(pk.dpo_loss(better, worse, zero, zero, beta=0.5).loss.item(), 4)  # log(1 + e^-1)
    0.3133

    Args:
        chosen_logps, rejected_logps: sums over scored tokens (``pair_logps``), each ``[B]``.
        ref_chosen_logps, ref_rejected_logps: the reference model's, each ``[B]``; no gradient reaches them.
        beta: how strongly the policy is held to the reference, above 0 (ipo: its tau).
        loss_type: a name, or a list of them for the weighted sum (MPO: sigmoid, bco_pair and sft).
        loss_weights: one number for each of ``loss_type``, by default 1.
        label_smoothing: the chance that a label is flipped; for the losses with an e.
        f_divergence_type, f_alpha_divergence_coef: the link (``js`` and ``alpha`` for short) and its a,
            https://arxiv.org/abs/2309.16240; other links than reverse_kl are for the losses with a g, and ``sft``.
        discopop_tau: in (0, 1].
        chosen_lengths, rejected_lengths: scored lengths ``[B]``; for ``ipo`` and ``sigmoid_norm``.
        weights: ``[B]``, multiply the loss of each pair (``wpo_weights``); the mean still divides by B. Refused with
            the sorted losses.
        margin: ``[B]``, by how much the reward of the chosen should lead: ``d - margin / beta`` (ODPO,
            https://arxiv.org/abs/2402.10571); no gradient reaches it. For sigmoid, hinge, exo_pair, robust, discopop
            and sigmoid_norm.
        chosen_nll: the likelihood of ``sft``, a scalar or ``[B]``; by default made of chosen_logps and chosen_lengths.
        reduction: ``mean`` over pairs, ``sum``, or ``none`` for ``[B]`` (of sorted values: in their order).
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
    names = loss_names(dpo.loss_type)
    inputs.rows(
        where,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        optional={"weights": weights, "margin": margin},
    )
    check_pair_tensors(where, names, weights=weights, margin=margin)
    _check_lengths(where, names, chosen_logps, chosen_lengths, rejected_lengths)
    inputs.likelihood(where, chosen_nll, chosen_logps)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    link = LINKS[dpo.f_divergence_type]
    pairs = Pairs(
        link(chosen, dpo.f_alpha_divergence_coef),
        link(rejected, dpo.f_alpha_divergence_coef),
        chosen_lengths,
        rejected_lengths,
        None if margin is None else widen(margin).detach(),
        *_differences(names, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps),
        _likelihood(where, names, chosen_nll, chosen_logps, chosen_lengths),
    )
    losses = mixture(names, dpo.loss_weights, pairs, PairOptions(dpo.beta, dpo.label_smoothing, dpo.discopop_tau))
    if weights is not None:
        losses = losses * widen(weights)
    ratios = Pairs(chosen, rejected)
    shown = pair_metrics(ratios, chosen_logps, rejected_logps, dpo.beta) if dpo.metrics else {}
    return LossOutput(reduce_rows(losses, dpo.reduction), shown)


def mixture(names: tuple[str, ...], weights: Sequence[float] | None, pairs: Pairs, options: PairOptions) -> Tensor:
    """The weighted sum of the losses of each pair."""
    losses = [PAIR_LOSSES[name].function(pairs, options) for name in names]
    if weights is not None:
        losses = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    total, *others = losses
    for loss in others:
        total = total + loss
    return total


def _differences(
    names: tuple[str, ...], chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """``lp_c - lp_r`` of policy and reference, for the losses that sort them."""
    if not any(PAIR_LOSSES[name].sorts for name in names):
        return None, None
    return widen(chosen) - widen(rejected), (widen(ref_chosen) - widen(ref_rejected)).detach()


def _likelihood(
    where: str, names: tuple[str, ...], nll: Tensor | None, logps: Tensor, lengths: Tensor | None
) -> Tensor | None:
    """The negative log-likelihood of the chosen, for the losses that read it: the given one, or the mean over all."""
    reading = [name for name in names if PAIR_LOSSES[name].needs_likelihood]
    if nll is not None or not reading:
        return nll
    if lengths is None:
        check.fail(
            where,
            f"loss_type={reading[0]!r} needs chosen_lengths [B], which pair_logps returns, or chosen_nll; got neither",
        )
    return -divide(widen(logps).sum(), lengths.sum())


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
    margin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
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
        beta, loss_type, ..., weights, margin, reduction: as in ``dpo_loss``; the lengths are those of ``targets``.
        ld_alpha: as in ``pair_logps``, for policy and reference alike; the likelihood of ``sft`` is of whole answers.
        use_weighting: multiplies each pair by its ``wpo_weights``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``dpo_loss``, and token means ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows, no reference or two; what the parts refuse, by name.
    """
    where = "linear_dpo_loss"
    dpo, form, head = read(where, options, DPO, Reference, Head)
    inputs.check_pairs(where, targets, cu_seqlens, ref_logps=ref_logps, weights=weights, margin=margin)
    layout: dict[str, Any] = {"targets": targets, "cu_seqlens": cu_seqlens, "ignore_index": head.ignore_index}

    def rows(logps: Tensor) -> PairLogps:
        return pair_logps(logps, ld_alpha=ld_alpha, **layout)

    reference = ReferenceModel(ref_logps, ref_hidden, ref_weight, form)
    ref = reference.per_sequence(where, "[2B]", head, targets, lambda logps: torch.cat(rows(logps)[:2]))
    chosen = inputs.first_half(targets, cu_seqlens)

    def loss(stats: TokenStats) -> LossOutput:
        policy = rows(stats.logps)
        given: dict[str, Any] = {"weights": weights, "margin": margin, **dpo._asdict()}
        given |= {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
        if use_weighting:
            assert stats.log_sum_sq_probs is not None
            aligned = wpo_weights(stats.logps, stats.log_sum_sq_probs, **layout)
            given["weights"] = aligned if weights is None else aligned * widen(weights)
        if ld_alpha is not None:  # sft is the likelihood of whole answers
            likelihood = ChosenLikelihood(where, targets, None, chosen, head.ignore_index)
            given["chosen_nll"] = likelihood.nll(stats.logps)
        return dpo_loss(policy.chosen, policy.rejected, *ref.chunk(2), **given)

    outputs: tuple[Output, ...] = ("log_sum_sq_probs",) if use_weighting else ()
    form_of = partial(sequence_form, where, hidden, weight, targets, head, loss, outputs=outputs)
    return form_of(chosen=chosen, metrics=dpo.metrics)


def _check_lengths(
    where: str, names: tuple[str, ...], logps: Tensor, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> None:
    dividing = [name for name in names if PAIR_LOSSES[name].needs_lengths]
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if lengths is None:
            if dividing:
                check.fail(
                    where, f"loss_type={dividing[0]!r} divides by {name} [B], which pair_logps returns; got None"
                )
            continue
        check.tensor(where, name, lengths)
        if lengths.shape != logps.shape:
            check.fail(where, f"{name} must have shape {tuple(logps.shape)}, got {check.describe(lengths)}")
        check.same_device(where, chosen_logps=logps, **{name: lengths})
