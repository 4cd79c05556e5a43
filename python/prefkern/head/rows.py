"""Rows of the head: their targets and temperature, flat; which of them are computed; the way back to their shape."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.operators.statistics import OPTIONAL
from prefkern.types import Output, Temperature, TokenStats


class Rows:
    """Targets and temperature as flat rows, of which those that count are computed.

    Without targets every row counts. With ``targets [..., Kt]`` a row has several.
    """

    def __init__(
        self, where: str, shape: torch.Size, targets: Tensor, temperature: Temperature, ignore_index: int | None
    ) -> None:
        self._where, self._shape, self._targets_shape = where, shape, targets.shape
        self.several = targets.ndim == len(shape) + 1
        flat = targets.reshape(-1, targets.shape[-1]) if self.several else targets.reshape(-1)
        self._targets = flat.to(torch.int64).contiguous()
        self._temperature = flat_temperature(where, "temperature", temperature, shape, targets.device)
        self._whole = ignore_index is None
        self._ignore_index = -1 if ignore_index is None else ignore_index
        self._index: Tensor | None = None
        self._poison: Tensor | None = None

    @staticmethod
    def without_targets(where: str, source: Tensor, temperature: Temperature) -> "Rows":
        """Returns rows that all count, for what needs no target."""
        shape = source.shape[:-1]
        return Rows(where, shape, source.new_zeros(shape, dtype=torch.int64), temperature, None)

    def compact(self, rows: Tensor, num_scored: int | None) -> Tensor:
        """Returns only the rows that count: without a wait where their number is known, after one ``nonzero`` in eager
        mode; under compilation or graph capture all rows are kept, since shapes must not depend on values."""
        N = self._targets.shape[0]
        if self._whole:
            if num_scored is not None and num_scored != N:
                check.fail(
                    self._where, f"num_scored must be the number of rows, {N}, without targets, got {num_scored}"
                )
            return rows
        on_cpu = rows.device.type == "cpu"
        if torch.compiler.is_compiling() or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            return rows
        if num_scored == N and not on_cpu:
            return rows
        scored = self._targets != self._ignore_index
        scored = scored.any(1) if self.several else scored
        if on_cpu or num_scored is None:
            index = scored.nonzero().squeeze(-1)
            if num_scored is not None and index.shape[0] != num_scored:
                check.fail(
                    self._where, f"num_scored must be the number of scored targets, {index.shape[0]}, got {num_scored}"
                )
        else:
            index = torch.nonzero_static(scored, size=num_scored, fill_value=0).squeeze(-1)
            # a wrong count must not give a plausible number, and checking it must not wait for the device
            self._poison = torch.where(scored.sum() == num_scored, 0.0, torch.nan)
        if index.shape[0] == N:
            return rows
        self._index = index
        self._targets = self._targets[index]
        self._temperature = self.take_rows(self._temperature)
        return rows.index_select(0, index)

    def take_tokens(self, per_token: Tensor) -> Tensor:
        """Returns values shaped like the targets as those of the rows that are computed."""
        flat = per_token.reshape(-1)
        return flat if self._index is None else flat.index_select(0, self._index)

    def take_rows(self, rows: Any) -> Any:
        """Returns of flat rows those that `compact` kept; a number stays as it is."""
        return rows.index_select(0, self._index) if isinstance(rows, Tensor) and self._index is not None else rows

    def checked(self, value: Tensor) -> Tensor:
        """Returns NaN where the given number of scored rows is wrong and nobody waited to find out."""
        return value if self._poison is None else value + self._poison

    @property
    def scored(self) -> Tensor | None:
        """Which of the computed rows count, None for all: in eager mode only those are left."""
        return None if self._whole or self._index is not None else self._targets != self._ignore_index

    @property
    def temperature(self) -> tuple[Tensor | None, float]:
        """The temperature as the operators take it: one per row, or a number."""
        return operator_temperature(self._temperature)

    def arguments(self, softcap: float | None) -> tuple[Any, ...]:
        """Returns targets, row_temperature, temperature, softcap, ignore_index: as every operator takes them."""
        return self._targets, *self.temperature, softcap, self._ignore_index

    def stats(self, results: Sequence[Tensor], outputs: Sequence[Output], *, entropy_grad: bool) -> TokenStats:
        """Returns the operators' statistics in the shape of the targets; 0 where not scored."""
        named = dict(zip(OPTIONAL, results[3:7], strict=True))
        if not entropy_grad:
            named["entropy"] = named["entropy"].detach()
        optional = (self.full(named[name], self._shape) if name in outputs else None for name in OPTIONAL)
        return TokenStats(self.full(self.checked(results[0]), self._targets_shape), *optional)

    def full(self, value: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Returns values of the computed rows in the shape of the rows, 0 elsewhere."""
        if self._index is not None:
            value = value.new_zeros(self._shape.numel(), *value.shape[1:]).index_copy(0, self._index, value)
        return value.view(self._shape if shape is None else shape)


def operator_temperature(temperature: Temperature) -> tuple[Tensor | None, float]:
    """Returns a temperature per row and a number, of which the operators read one."""
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def flat_temperature(
    where: str, name: str, temperature: Temperature, shape: torch.Size, device: torch.device
) -> Temperature:
    """Returns the checked temperature: a positive number, or one per row, flat and as wide as row mathematics."""
    if not isinstance(temperature, Tensor):
        return check.number(where, name, temperature, low=0.0, open_low=True)
    check.floating(where, **{name: temperature})
    if temperature.shape != shape or temperature.device != device:
        check.fail(
            where,
            f"{name} must be a number or a tensor of one per row, shaped like targets "
            f"{tuple(shape)}, got {check.describe(temperature)}",
        )
    if temperature.requires_grad:
        check.fail(where, f"{name} gets no gradient: pass {name}.detach(), or divide the logits")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not (temperature > 0).all():
        check.fail(where, f"{name} must be positive in every row")
    wide = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return temperature.reshape(-1).to(wide).contiguous()


def check_targets(where: str, targets: Tensor, shape: torch.Size, V: int, ignore_index: int) -> None:
    """Checks that the targets have the rows' shape, or one axis more, and on the CPU that each is in the vocabulary."""
    check.integer(where, targets=targets)
    several = targets.ndim == len(shape) + 1 and targets.shape[:-1] == shape
    if (targets.shape != shape and not several) or (several and targets.shape[-1] == 0):
        check.fail(
            where,
            f"targets must have shape {tuple(shape)}, or {tuple(shape)} + (Kt,) for several targets per row, "
            f"got {check.describe(targets)}",
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if outside.any():
            flat = targets.reshape(-1, targets.shape[-1]) if several else targets.reshape(-1)
            first = tuple(outside.reshape(flat.shape).nonzero()[0].tolist())
            check.fail(
                where,
                f"targets must lie in [0, {V}) or be ignore_index={ignore_index}, "
                f"got {int(flat[first])} at row {first[0]}",
            )


def check_outputs(
    where: str, targets: Tensor, shape: torch.Size, outputs: Sequence[Output], entropy_grad: bool
) -> None:
    """Checks which statistics are asked for."""
    for name in outputs:
        check.one_of(where, "every entry of outputs", name, ("logps", *OPTIONAL))
    if targets.ndim == len(shape) + 1 and "is_top1" in outputs:
        check.fail(where, "is_top1 is not defined for several targets per row: leave it out of outputs")
    if entropy_grad and "entropy" not in outputs:
        check.fail(where, f"entropy_grad=True needs 'entropy' in outputs, got outputs={tuple(outputs)!r}")
