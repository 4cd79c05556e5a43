"""Checks that several losses share: rows, tokens in both layouts, what is scored, normalisers."""

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses.reduce import per_token, scored_mask


def required(where: str, **named: Tensor) -> None:
    """Every argument is a tensor: the checks of `prefkern.check` take None for one that was left out."""
    for name, value in named.items():
        check.tensor(where, name, value)


def rows(where: str, *, optional: dict[str, Tensor | None] | None = None, **named: Tensor) -> None:
    """Floating tensors of one shape ``[B]`` on one device; an optional one may be None."""
    required(where, **named)
    _rows(where, **named, **(optional or {}))


def _rows(where: str, **named: Tensor | None) -> None:
    check.floating(where, **named)
    for name, value in named.items():
        if value is not None and value.ndim != 1:
            check.fail(where, f"{name} must be [B], one value per sequence, got {check.describe(value)}")
    check.same_shape(where, **named)
    check.same_device(where, **named)


def tokens(
    where: str, cu_seqlens: Tensor | None, *, optional: dict[str, Tensor | None] | None = None, **named: Tensor
) -> None:
    """Floating tensors of one shape on one device, padded ``[B, T]`` or packed ``[N]``; an optional one may be None."""
    required(where, **named)
    _tokens(where, cu_seqlens, **named, **(optional or {}))


def _tokens(where: str, cu_seqlens: Tensor | None, **named: Tensor | None) -> None:
    check.floating(where, **named)
    for name, value in named.items():
        if value is not None and value.ndim not in ((1, 2) if cu_seqlens is None else (1,)):
            layout = "padded [B, T] or packed [N]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
            check.fail(where, f"{name} must be {layout}, got {check.describe(value)}")
    check.same_shape(where, **named)
    check.same_device(where, **named, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        total = next(value.numel() for value in named.values() if value is not None)
        check.offsets(where, cu_seqlens, total)


def sequences(where: str, name: str, value: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in ``value``: its rows, or those of cu_seqlens, which a packed one needs."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    if value.ndim != 2:
        check.fail(where, f"{name} is packed, {check.describe(value)}: its sequences need cu_seqlens [S + 1]")
    return value.shape[0]


def scored(
    where: str,
    like: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    ignore_index: int = -100,
    *,
    name: str = "mask",
) -> Tensor | None:
    """The bool mask of scored tokens, shaped like ``like``; None is all of them."""
    check.integer(where, targets=targets)
    if targets is not None and targets.shape != like.shape:
        check.fail(where, f"targets must have shape {tuple(like.shape)}, got {check.describe(targets)}")
    mask = check.mask(where, name, mask, like.shape)
    check.same_device(where, logps=like, targets=targets, **{name: mask})
    return scored_mask(mask, targets, ignore_index)


def flags(where: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    """A bool per element of ``like``, from bool or 0/1."""
    required(where, **{name: value})
    checked = scored(where, like, value, None, name=name)
    assert checked is not None
    return checked


def likelihood(where: str, chosen_nll: Tensor | None, like: Tensor) -> None:
    """A negative log-likelihood of the chosen: one scalar, or one value per pair; or none."""
    scalar_or_rows(where, "chosen_nll", chosen_nll, like, of="chosen_logps")


def scalar_or_rows(where: str, name: str, value: Tensor | None, like: Tensor, *, of: str = "nll") -> None:
    """One scalar, or one value for each of the rows of ``like``, which is called ``of``; or none."""
    check.floating(where, **{name: value})
    if value is not None and value.ndim != 0 and (value.shape != like.shape or value.ndim != 1):
        rows = tuple(like.shape) if like.ndim == 1 else "[B]"
        check.fail(where, f"{name} must be a scalar or {rows}, got {check.describe(value)}")
    check.same_device(where, **{of: like, name: value})


ROUNDED = 1e-3
"""By how much rounding may leave a log-probability above 0."""


def log_probabilities(where: str, **named: Tensor) -> None:
    """On the CPU, none is above 0 (but for rounding)."""
    for name, value in named.items():
        if value.device.type != "cpu" or torch.compiler.is_compiling() or not value.numel():
            continue
        largest = value.detach().max().item()
        if largest > ROUNDED:
            check.fail(
                where,
                f"{name} must hold log-probabilities, which are at most 0, got one of {largest:.4g}: negative "
                "log-likelihoods have the other sign",
            )


def spread(where: str, name: str, value: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A value per token as it is, one per sequence (``[B]``, packed ``[S]``) as one per token."""
    required(where, **{name: value})
    check.floating(where, **{name: value})
    check.same_device(where, **{name: value}, logps=like)
    per_sequence = (like.shape[0],) if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    if (like.ndim == 2 or cu_seqlens is not None) and value.shape == per_sequence:
        return per_token(value, like, cu_seqlens)
    if value.shape != like.shape:
        check.fail(
            where,
            f"{name} must be {tuple(like.shape)}, per token, or {per_sequence}, per sequence, "
            f"got {check.describe(value)}",
        )
    return value


def normalizer(where: str, value: Tensor | float | None, reduction: str, like: Tensor) -> Tensor | float | None:
    """A count to divide by: a number or a tensor of one element, brought to the device of ``like``; not negative (of a
    tensor checked on the CPU only)."""
    if value is None:
        return None
    if reduction in ("none", "sum"):
        check.fail(where, f"reduction={reduction!r} divides by nothing: leave normalizer out, got {value!r}")
    if not isinstance(value, Tensor):
        return check.number(where, "normalizer", value, low=0.0)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        check.fail(where, f"normalizer must be a number or a tensor of one element, got {check.describe(value)}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= value.item() < float("inf"):
        check.fail(where, f"normalizer must be finite and not negative, got {value.item()}")
    return value.detach().reshape(()).to(like.device, non_blocking=True)


def check_even(where: str, count: int) -> None:
    if count % 2:
        check.fail(where, f"pairs must come as 2B rows, all chosen then all rejected, got {count} rows")


def check_layout(where: str, targets: Tensor, cu_seqlens: Tensor | None) -> None:
    """Targets are padded ``[B, T]`` or packed ``[N]``, with offsets that fit."""
    required(where, targets=targets)
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
    count = sequences(where, "targets", targets, cu_seqlens)
    _per_sequence(where, "ref_logps", ref_logps, count, targets)
    return count


def check_pairs(
    where: str,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    *,
    ref_logps: Tensor | None = None,
    **per_pair: Tensor | None,
) -> None:
    """The sequences are pairs; ``ref_logps`` has one value of each sequence, and the others one of each pair."""
    count = check_rows(where, targets, cu_seqlens)
    check_even(where, count)
    _per_sequence(where, "ref_logps", ref_logps, count, targets)
    for name, value in per_pair.items():
        _per_sequence(where, name, value, count // 2, targets)


def _per_sequence(where: str, name: str, value: Tensor | None, count: int, targets: Tensor) -> None:
    check.floating(where, **{name: value})
    if value is not None and value.shape != (count,):
        check.fail(where, f"{name} must have shape ({count},), got {check.describe(value)}")
    check.same_device(where, targets=targets, **{name: value})


def first_half(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which tokens belong to the first half of the sequences, the chosen ones of pairs; bool, shaped like targets."""
    count = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return per_token(torch.arange(count, device=targets.device) < count // 2, targets, cu_seqlens)


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
