"""What linear forms share: checks of the targets before any product is paid for, token metrics, one likelihood."""

from collections.abc import Callable

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses._head import Head
from prefkern.losses.linear import linear_loss
from prefkern.losses.reduce import masked_mean, per_token
from prefkern.losses.sequences import check_even
from prefkern.objectives.likelihood import negative_log_likelihood
from prefkern.types import LossOutput, Output, TokenStats


def check_layout(where: str, targets: Tensor, cu_seqlens: Tensor | None) -> None:
    """Targets are padded ``[B, T]`` or packed ``[N]``, with offsets that fit."""
    inputs.required(where, targets=targets)
    check.integer(where, targets=targets)
    check.same_device(where, targets=targets, cu_seqlens=cu_seqlens)
    if targets.ndim not in ((1, 2) if cu_seqlens is None else (1,)):
        layout = "padded [B, T] or packed [N]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        check.fail(where, f"targets must be {layout}, got {check.describe(targets)}")
    if cu_seqlens is not None:
        check.offsets(where, cu_seqlens, targets.numel())


def check_rows(where: str, targets: Tensor, cu_seqlens: Tensor | None, ref_logps: Tensor | None = None) -> int:
    """The number of sequences in the targets; ``ref_logps`` has one value of each."""
    check_layout(where, targets, cu_seqlens)
    count = inputs.sequences(where, "targets", targets, cu_seqlens)
    _per_sequence(where, "ref_logps", ref_logps, count, targets)
    return count


def check_pairs(
    where: str,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    *,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """The sequences are pairs; ``ref_logps`` has one value of each sequence, and ``weights`` one of each pair."""
    count = check_rows(where, targets, cu_seqlens)
    check_even(where, count)
    _per_sequence(where, "ref_logps", ref_logps, count, targets)
    _per_sequence(where, "weights", weights, count // 2, targets)


def _per_sequence(where: str, name: str, value: Tensor | None, count: int, targets: Tensor) -> None:
    check.floating(where, **{name: value})
    if value is not None and value.shape != (count,):
        check.fail(where, f"{name} must have shape ({count},), got {check.describe(value)}")
    check.same_device(where, targets=targets, **{name: value})


def first_half(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which tokens belong to the first half of the sequences, the chosen ones of pairs; bool, shaped like targets."""
    count = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return per_token(torch.arange(count, device=targets.device) < count // 2, targets, cu_seqlens)


class ChosenLikelihood:
    """The mean negative log-likelihood of the chosen rows, over ``nll_targets``, from the same pass as the pairs.

    ``targets`` become the union of both: a chosen row scored in either is scored once. Where both are, they must
    agree: on the CPU that is checked, and on an accelerator such a token gives NaN, as one out of range does.
    """

    def __init__(
        self, where: str, targets: Tensor, nll_targets: Tensor | None, chosen: Tensor, ignore_index: int
    ) -> None:
        self.mask, self.targets = chosen & (targets != ignore_index), targets
        if nll_targets is None:
            return
        check.integer(where, nll_targets=nll_targets)
        check.same_shape(where, targets=targets, nll_targets=nll_targets)
        check.same_device(where, targets=targets, nll_targets=nll_targets)
        paired, self.mask = targets != ignore_index, chosen & (nll_targets != ignore_index)
        differ = paired & self.mask & (targets != nll_targets)
        if targets.device.type == "cpu" and not torch.compiler.is_compiling() and differ.any():
            check.fail(where, "nll_targets must equal targets wherever both are scored in a chosen row, got others")
        outside = -1 if ignore_index != -1 else -2
        self.targets = torch.where(paired, targets, nll_targets.masked_fill(~self.mask, ignore_index))
        self.targets = self.targets.masked_fill(differ, outside)

    def nll(self, logps: Tensor) -> Tensor:
        return masked_mean(negative_log_likelihood(logps, self.mask, None), self.mask)


def scored_targets(
    where: str, targets: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Targets that are ignored outside ``mask``, so that no product is paid for them, and what they score."""
    check_layout(where, targets, cu_seqlens)
    mask = check.mask(where, "mask", mask, targets.shape)
    check.same_device(where, targets=targets, mask=mask)
    if mask is not None:
        targets = targets.masked_fill(~mask, ignore_index)
    return targets, targets != ignore_index


def sequence_form(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: Callable[[Tensor], LossOutput],
    head: Head,
    *,
    chosen: Tensor,
    metrics: bool,
    scored: Tensor | None = None,
) -> LossOutput:
    """``linear_loss`` of ``fn(logps)``, with the means over tokens that TRL shows: the entropy over ``scored`` (by
    default all scored targets), the logits of its chosen and its other tokens, and how often a chosen one was first."""
    if not metrics:
        return linear_loss(hidden, weight, targets, lambda stats: fn(stats.logps), **head._asdict())

    mask = targets != head.ignore_index if scored is None else scored

    def with_token_metrics(stats: TokenStats) -> LossOutput:
        loss, shown = fn(stats.logps)
        return LossOutput(loss, shown | _token_metrics(stats, mask, chosen))

    outputs: tuple[Output, ...] = ("logps", "entropy", "mean_logit", "is_top1")
    return linear_loss(hidden, weight, targets, with_token_metrics, outputs=outputs, **head._asdict())


@torch.no_grad()
def _token_metrics(stats: TokenStats, mask: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    assert stats.entropy is not None
    assert stats.mean_logit is not None
    assert stats.is_top1 is not None
    return {
        "entropy": masked_mean(stats.entropy, mask),
        "logits/chosen": masked_mean(stats.mean_logit, mask & chosen),
        "logits/rejected": masked_mean(stats.mean_logit, mask & ~chosen),
        "mean_token_accuracy": masked_mean(stats.is_top1, mask & chosen),
    }


def token_form(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Callable[..., LossOutput],
    head: Head,
    *,
    entropy: bool,
    entropy_grad: bool,
) -> LossOutput:
    """``linear_loss`` of ``loss(logps, entropy=...)``: the entropy where it is shown, with its gradient where it is
    part of the loss."""
    outputs: tuple[Output, ...] = ("logps", "entropy") if entropy or entropy_grad else ("logps",)

    def fn(stats: TokenStats) -> LossOutput:
        return loss(stats.logps, entropy=stats.entropy)

    return linear_loss(hidden, weight, targets, fn, outputs=outputs, entropy_grad=entropy_grad, **head._asdict())
