"""The arguments of a divergence, checked: two heads, the rows that count, and which divergence of them."""

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.rows import Rows
from prefkern.types import Direction, Temperature

_DIRECTIONS = {"forward": 0.0, "reverse": 1.0}


class Pairs(Rows):
    """The rows of two heads: scored by one set of targets, each head with a temperature of its own."""

    def __init__(
        self,
        where: str,
        source: Tensor,
        targets: Tensor | None,
        temperature: Temperature,
        ref_temperature: Temperature | None,
        ignore_index: int,
        V: int,
    ) -> None:
        self._all = targets is None
        if targets is None:
            targets, ignore_index = source.new_zeros(source.shape[:-1], dtype=torch.int64), -1
        super().__init__(where, source, targets, temperature, None, ignore_index, (), False, V)
        self._reference = self._temperature
        if ref_temperature is not None:
            self._reference = self._check_temperature(ref_temperature, "ref_temperature")

    def compact(self, rows: Tensor, num_scored: int | None) -> Tensor:
        if not self._all:
            return super().compact(rows, num_scored)
        if num_scored is not None and num_scored != rows.shape[0]:
            check.fail(
                self._where,
                f"num_scored must be the number of rows, {rows.shape[0]}, without targets, got {num_scored}",
            )
        return rows

    def take(self, rows: Tensor) -> Tensor:
        """Of the reference's rows those that `compact` kept of the policy's."""
        return rows if self._index is None else rows.index_select(0, self._index)

    @property
    def scored(self) -> Tensor | None:
        """Which rows count, None for all: in eager mode only those are left."""
        return None if self._all or self._index is not None else self._targets != self._ignore_index

    @property
    def temperature(self) -> tuple[Tensor | None, float]:
        row_temperature, temperature = self.arguments[1:3]
        return row_temperature, temperature

    @property
    def ref_temperature(self) -> tuple[Tensor | None, float]:
        given = self._reference  # of all rows, also where it is the policy's
        return (self.take(given), 1.0) if isinstance(given, Tensor) else (None, given)

    def full(self, value: Tensor) -> Tensor:
        return self._full(self.checked(value), self._shape)


def beta_of(where: str, direction: Direction, jsd_beta: float | None) -> float:
    """The divergence as one number: 0 forward, 1 reverse, between them Jensen-Shannon."""
    check.one_of(where, "direction", direction, tuple(_DIRECTIONS))
    if jsd_beta is None:
        return _DIRECTIONS[direction]
    if direction != "forward":
        check.fail(where, f"direction must be left at its default when jsd_beta is given, got {direction!r}")
    return check.number(where, "jsd_beta", jsd_beta, low=0.0, high=1.0)


def check_head(
    where: str,
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[int, int]:
    """V and H of a head whose arguments' names begin with ``prefix``."""
    h, w, b = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    check.tensor(where, w, weight)
    check.floating(where, **{h: hidden, w: weight, b: bias})
    if type(weight).__name__ == "DTensor" or type(hidden).__name__ == "DTensor":
        check.fail_type(where, f"{h} and {w} must be plain tensors, got a DTensor: pass {w}.full_tensor()")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        check.fail(
            where,
            f"{h} must be [..., H] and {w} [V, H] with one H, got {check.describe(hidden)} and "
            f"{check.describe(weight)}",
        )
    V, H = weight.shape
    if bias is not None and bias.shape != (V,):
        check.fail(where, f"{b} must be [V] = [{V}], got {check.describe(bias)}")
    check.number(where, f"{prefix}logit_scale", logit_scale)
    if softcap is not None:
        check.number(where, f"{prefix}softcap", softcap, low=0.0, open_low=True)
    return V, H
