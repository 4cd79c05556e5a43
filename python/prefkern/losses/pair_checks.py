"""What the losses of pairs are asked for, held to what the rows of their table take."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from prefkern import check
from prefkern.losses.preference import PAIR_LOSSES, PairLoss


def loss_names(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """The names of a mixture; one name is a mixture of one."""
    return tuple(loss_type) if isinstance(loss_type, list | tuple) else (cast(str, loss_type),)


def check_loss_types(
    where: str, loss_type: str | Sequence[str], label_smoothing: float, family: dict[str, PairLoss] = PAIR_LOSSES
) -> None:
    """Checks that the losses are of their family, and that the smoothing is in the range of each that has one."""
    names = loss_names(loss_type)
    if not names:
        check.fail(where, f"loss_type must name at least one loss of {_listed(family)}, got {loss_type!r}")
    for name in names:
        check.one_of(where, "loss_type", name, tuple(family))
    smoothed = {name: family[name].smoothing for name in names if family[name].smoothing is not None}
    for name, range_ in smoothed.items():
        assert range_ is not None
        low, high, open_low, open_high = range_
        if open_low and label_smoothing == low:
            check.fail(
                where,
                f"loss_type={name!r} needs a label_smoothing in ({low}, {high}), for example 1e-3, "
                f"got {label_smoothing!r}",
            )
        check.number(
            where, "label_smoothing", label_smoothing, low=low, high=high, open_low=open_low, open_high=open_high
        )
    if not smoothed and label_smoothing != 0.0:
        used = _listed(family, lambda row: row.smoothing is not None)
        check.fail(where, f"label_smoothing is for loss_type={used}; {_without(names)}, got {label_smoothing!r}")


def check_mixture(where: str, loss_type: str | Sequence[str], loss_weights: Sequence[float] | None, link: str) -> None:
    """Checks one weight for each loss, and that each takes the link."""
    names = loss_names(loss_type)
    if loss_weights is not None:
        if not isinstance(loss_weights, list | tuple):
            check.fail_type(where, f"loss_weights must be a list of numbers, got {check.describe(loss_weights)}")
        if len(loss_weights) != len(names):
            check.fail(
                where,
                f"loss_weights must have one weight for each loss_type, {len(names)} for {_named(names)}, "
                f"got {len(loss_weights)}",
            )
        for weight in loss_weights:
            check.number(where, "loss_weights", weight)
    refused = [name for name in names if not PAIR_LOSSES[name].links]
    if link != "reverse_kl" and refused:
        check.fail(
            where,
            f"f_divergence_type={link!r} is for loss_type={_listed(PAIR_LOSSES, lambda row: row.links)}; "
            f"{refused[0]!r} has no form under it: leave it at 'reverse_kl'",
        )


def check_pair_tensors(where: str, names: tuple[str, ...], *, weights: Tensor | None, margin: Tensor | None) -> None:
    """Checks that weights and margins of pairs meet losses that keep the pairs together."""
    sorting = [name for name in names if PAIR_LOSSES[name].sorts]
    if weights is not None and sorting:
        check.fail(
            where, f"weights are of pairs, which loss_type={sorting[0]!r} takes apart by sorting: leave them out"
        )
    if margin is not None and not any(PAIR_LOSSES[name].margin for name in names):
        takes = _listed(PAIR_LOSSES, lambda row: row.margin)
        check.fail(where, f"margin is for loss_type={takes}; {_without(names)}: leave it out")


def _named(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))


def _without(names: tuple[str, ...]) -> str:
    return f"{_named(names)} {'has' if len(names) == 1 else 'have'} none"


def _listed(family: dict[str, Any], having: Callable[[Any], bool] = lambda row: True) -> str:
    return " or ".join(repr(name) for name, row in family.items() if having(row))
