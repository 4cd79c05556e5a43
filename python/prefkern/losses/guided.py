"""DPO with a KL penalty, as introductions write KTO: on sequence log-probabilities and on hidden states."""

from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Unpack

from torch import Tensor

from prefkern import check
from prefkern.head.divergence import linear_kl_divergence
from prefkern.head.inputs import Head, HeadOptions, Reference, ReferenceOptions
from prefkern.losses import inputs
from prefkern.losses.dpo import DPO, DPOOptions, dpo_loss
from prefkern.losses.linear import sequence_form
from prefkern.losses.ratios import kl_penalty
from prefkern.losses.reduce import masked_mean, reduce_rows, scored, widen
from prefkern.losses.reference_model import ReferenceModel
from prefkern.losses.sequences import pair_logps
from prefkern.options import at_least, joined, read, takes
from prefkern.types import LossOutput, TokenStats

KLForm = Literal["exact", "k1", "k2", "k3"]


class Guidance(NamedTuple):
    """The option of `kl_guided_dpo_loss` beside those of `dpo_loss`."""

    kl_coef: Annotated[float, at_least(0.0)] = 0.1


KLGuidedDPO = joined("KLGuidedDPO", __name__, DPO, Guidance)
"""The options of `kl_guided_dpo_loss`, complete."""


class _GuidanceOptions(TypedDict, total=False):
    kl_coef: float


class KLGuidedDPOOptions(DPOOptions, _GuidanceOptions, total=False):
    """The keywords of `kl_guided_dpo_loss` that are no tensors."""


@takes(DPO, Guidance)
def kl_guided_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    kl: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    margin: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    **options: Unpack[KLGuidedDPOOptions],
) -> LossOutput:
    """``L_DPO + kl_coef KL(pi || pi_ref)``: what some introductions call KTO.

    The published KTO, https://arxiv.org/abs/2402.01306, is ``kto_loss``. It has no pairs: each example is desirable or
    not by itself, and its KL is a baseline without a gradient, inside the sigmoid. Here the examples come in pairs, and
    the KL is a penalty that pulls the policy back to the reference. The same two answers, and the same KL:

    >>> import torch, prefkern as pk
    >>> chosen, rejected = torch.tensor([-3.0]), torch.tensor([-7.0])
    >>> ref_chosen, ref_rejected = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> kl = torch.tensor(0.4, requires_grad=True)
    >>> guided = pk.kl_guided_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, kl, beta=0.5, kl_coef=0.1).loss
    >>> guided.backward()
    >>> round(guided.item(), 4), round(kl.grad.item(), 4)  # log(1 + e^-1.5) + 0.1 * 0.4
    (0.2414, 0.1)
    >>> both, ref = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
    >>> kto = pk.kto_loss(both, ref, torch.tensor([True, False]), kl=kl, beta=0.5).loss
    >>> round(kto.item(), 4), kto.requires_grad  # [s(-0.8) + s(-0.7)] / 2
    (0.3209, False)

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, ..., chosen_nll: as in ``dpo_loss``.
        kl: a scalar, or one value per pair ``[B]``, with its gradient: the mean over scored tokens of
            ``kl_divergence(..., direction="reverse")``, or of an estimate from the tokens (`linear_kl_guided_dpo_loss`
            makes either).
        kl_coef: its weight, not negative.
        beta, loss_type, ..., metrics: as in ``dpo_loss``; a scalar ``kl`` counts in every pair.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``dpo_loss``, and ``kl``. An empty batch gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "kl_guided_dpo_loss"
    dpo, guidance = read(where, options, DPO, Guidance)
    inputs.required(where, kl=kl, chosen_logps=chosen_logps)
    inputs.scalar_or_rows(where, "kl", kl, chosen_logps, of="chosen_logps")
    losses, shown = dpo_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
        margin=margin,
        chosen_nll=chosen_nll,
        **dpo._replace(reduction="none")._asdict(),
    )
    losses = losses + guidance.kl_coef * widen(kl)
    shown |= {"kl": masked_mean(kl.detach(), None)} if dpo.metrics else {}
    return LossOutput(reduce_rows(losses, dpo.reduction), shown)


class LinearKLGuidedDPOOptions(KLGuidedDPOOptions, ReferenceOptions, HeadOptions, total=False):
    """The keywords of `linear_kl_guided_dpo_loss` on the loss, the reference's head and the policy's."""


@takes(DPO, Guidance, Reference, Head)
def linear_kl_guided_dpo_loss(
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
    kl_estimator: KLForm = "exact",
    **options: Unpack[LinearKLGuidedDPOOptions],
) -> LossOutput:
    """``kl_guided_dpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    The KL is the mean over all scored tokens, of chosen and rejected rows alike. ``exact`` is over the vocabulary,
    without logits in memory: ``linear_kl_divergence(direction="reverse")``, at the price of both heads once more. The
    estimates are from the tokens, ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``. On tokens that
    the policy wrote, k1 has the value of the divergence and a gradient that is 0 on average, k2 has its gradient, and
    k3's is that of the forward divergence; on tokens from a data set none of them is the divergence.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``); ``ignore_index`` is not scored.
        ref_logps: the reference's log-probabilities of the tokens, shaped like ``targets``, for an estimate. Or:
        ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap: the reference's hidden states and head, as in
            ``linear_dpo_loss``; needed by ``exact``.
        ref_temperature: default: that of the policy.
        kl_estimator: ``exact``, ``k1``, ``k2`` or ``k3``.
        kl_coef, beta, loss_type, ..., weights, margin, reduction: as in ``kl_guided_dpo_loss``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``; ``lora`` is for the estimates.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``linear_dpo_loss``, and ``kl``.

    Raises:
        TypeError, ValueError: an odd number of rows, no reference or two; what the parts refuse, by name.
    """
    where = "linear_kl_guided_dpo_loss"
    dpo, guidance, form, head = read(where, options, DPO, Guidance, Reference, Head)
    check.one_of(where, "kl_estimator", kl_estimator, ("exact", "k1", "k2", "k3"))
    inputs.check_pairs(where, targets, cu_seqlens, weights=weights, margin=margin)
    ref = _reference(where, kl_estimator, ReferenceModel(ref_logps, ref_hidden, ref_weight, form), head, targets)
    layout: dict[str, Any] = {"targets": targets, "cu_seqlens": cu_seqlens, "ignore_index": head.ignore_index}
    mask = targets != head.ignore_index

    def divergence(stats: TokenStats) -> Tensor:
        if kl_estimator != "exact":
            return kl_penalty(scored(stats.logps, mask), scored(ref, mask), kl_estimator)
        assert ref_hidden is not None
        assert ref_weight is not None
        heads: dict[str, Any] = {**head._asdict(), **form._asdict()}
        given = (hidden, weight, ref_hidden, ref_weight, targets)
        exact: Tensor = linear_kl_divergence(*given, direction="reverse", **heads)
        return exact

    def loss(stats: TokenStats) -> LossOutput:
        policy, reference = pair_logps(stats.logps, **layout), pair_logps(ref, **layout)
        given: dict[str, Any] = {"weights": weights, "margin": margin, **dpo._asdict(), **guidance._asdict()}
        given |= {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
        sides = (policy.chosen, policy.rejected, reference.chosen, reference.rejected)
        return kl_guided_dpo_loss(*sides, masked_mean(divergence(stats), mask), **given)

    chosen = inputs.first_half(targets, cu_seqlens)
    return sequence_form(where, hidden, weight, targets, head, loss, chosen=chosen, metrics=dpo.metrics)


def _reference(where: str, estimator: KLForm, reference: ReferenceModel, head: Head, targets: Tensor) -> Tensor:
    """The reference's log-probabilities of the tokens."""
    if estimator == "exact" and (reference.hidden is None or reference.weight is None):
        check.fail(
            where,
            "kl_estimator='exact' compares vocabularies and needs ref_hidden and ref_weight, got "
            f"{'ref_logps' if reference.logps is not None else 'no reference'}: give them, or estimate the KL from the "
            "log-probabilities of the tokens, kl_estimator='k3'",
        )
    if estimator == "exact" and head.lora is not None:
        check.fail(where, "kl_estimator='exact' takes no lora: merge the adapter into weight, or take 'k3'")
    ref = reference.per_token(where, head, targets)
    if ref is None:
        check.fail(
            where, "the reference must be either ref_logps shaped like targets, or ref_hidden and ref_weight, got none"
        )
    check.floating(where, ref_logps=ref)
    check.same_shape(where, targets=targets, ref_logps=ref)
    check.same_device(where, targets=targets, ref_logps=ref)
    return ref
