"""Rows of the waist: their targets and temperature, flat; which of them are computed; the way back to their shape."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.operators.statistics import OPTIONAL
from prefkern.types import Output, Temperature, TokenStats


class Rows:
    """Targets and temperature as flat rows, what is to be computed for each, and the way back to their shape."""

    def __init__(
        self,
        where: str,
        source: Tensor,
        targets: Tensor,
        temperature: Temperature,
        softcap: float | None,
        ignore_index: int,
        outputs: Sequence[Output],
        entropy_grad: bool,
        V: int,
    ) -> None:
        check.no_functorch(where)
        check.integer(where, targets=targets)
        check.same_device(where, **{"logits" if where == "token_logprobs" else "hidden": source}, targets=targets)
        shape = source.shape[:-1]
        several = self.several = targets.ndim == source.ndim and targets.shape[:-1] == shape
        if (targets.shape != shape and not several) or (several and targets.shape[-1] == 0):
            check.fail(
                where,
                f"targets must have shape {tuple(shape)}, or {tuple(shape)} + (Kt,) for several targets per row, "
                f"got {check.describe(targets)}",
            )
        if several and where == "token_logprobs":
            check.fail(where, "several targets per row are for linear_token_logprobs: gather from torch.log_softmax")
        if several and "is_top1" in outputs:
            check.fail(where, "is_top1 is not defined for several targets per row: leave it out of outputs")
        if softcap is not None:
            check.number(where, "softcap", softcap, low=0.0, open_low=True)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            check.fail_type(where, f"ignore_index must be an int, got {ignore_index!r}")
        for name in outputs:
            check.one_of(where, "every entry of outputs", name, ("logps", *OPTIONAL))
        if entropy_grad and "entropy" not in outputs:
            check.fail(where, f"entropy_grad=True needs 'entropy' in outputs, got outputs={tuple(outputs)!r}")
        self._where = where
        self._shape, self._targets_shape = shape, targets.shape
        self._index: Tensor | None = None
        self._poison: Tensor | None = None
        self._entropy_grad = entropy_grad
        self.outputs = tuple(name for name in OPTIONAL if name in outputs)
        flat = targets.reshape(-1, targets.shape[-1]) if several else targets.reshape(-1)
        self._targets = flat.to(torch.int64).contiguous()
        self._temperature = self._check_temperature(temperature)
        self._softcap = None if softcap is None else float(softcap)
        self._ignore_index = ignore_index
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = ((self._targets < 0) | (self._targets >= V)) & (self._targets != ignore_index)
            if outside.any():
                first = tuple(outside.nonzero()[0].tolist())
                check.fail(
                    where,
                    f"targets must lie in [0, {V}) or be ignore_index={ignore_index}, "
                    f"got {int(self._targets[first])} at row {first[0]}",
                )

    def _check_temperature(self, temperature: Temperature, name: str = "temperature") -> Temperature:
        if not isinstance(temperature, Tensor):
            return check.number(self._where, name, temperature, low=0.0, open_low=True)
        check.floating(self._where, **{name: temperature})
        if temperature.shape != self._shape or temperature.device != self._targets.device:
            check.fail(
                self._where,
                f"{name} must be a number or a tensor of one per row, shaped like targets "
                f"{tuple(self._shape)}, got {check.describe(temperature)}",
            )
        if temperature.requires_grad:
            check.fail(self._where, f"{name} gets no gradient: pass {name}.detach(), or divide the logits")
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not (temperature > 0).all():
            check.fail(self._where, f"{name} must be positive in every row")
        wide = torch.float64 if temperature.dtype == torch.float64 else torch.float32
        return temperature.reshape(-1).to(wide).contiguous()

    def compact(self, rows: Tensor, num_scored: int | None) -> Tensor:
        """Only the scored rows: without a wait where their number is known, after one ``nonzero`` in eager mode;
        under compilation or graph capture all rows are kept, since shapes must not depend on values."""
        N = self._targets.shape[0]
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
        if isinstance(self._temperature, Tensor):
            self._temperature = self._temperature[index]
        return rows.index_select(0, index)

    def take(self, per_token: Tensor) -> Tensor:
        """Values shaped like the targets as those of the rows that are computed."""
        flat = per_token.reshape(-1)
        return flat if self._index is None else flat.index_select(0, self._index)

    def checked(self, value: Tensor) -> Tensor:
        """NaN where the given number of scored rows is wrong and nobody waited to find out."""
        return value if self._poison is None else value + self._poison

    @property
    def arguments(self) -> tuple[Any, ...]:
        """targets, row_temperature, temperature, softcap, ignore_index: as every operator takes them."""
        per_row = isinstance(self._temperature, Tensor)
        return (
            self._targets,
            self._temperature if per_row else None,
            1.0 if per_row else self._temperature,
            self._softcap,
            self._ignore_index,
        )

    def stats(self, results: Sequence[Tensor]) -> TokenStats:
        """Back to the shape of the targets; 0 where not scored."""
        logps = self.checked(results[0])
        named = dict(zip(OPTIONAL, results[3:7], strict=True))
        if not self._entropy_grad:
            named["entropy"] = named["entropy"].detach()
        optional = (self._full(named[n], self._shape) if n in self.outputs else None for n in OPTIONAL)
        return TokenStats(self._full(logps, self._targets_shape), *optional)

    def _full(self, value: Tensor, shape: torch.Size) -> Tensor:
        if self._index is not None:
            value = value.new_zeros(self._shape.numel(), *value.shape[1:]).index_copy(0, self._index, value)
        return value.view(shape)
