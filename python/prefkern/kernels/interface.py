"""What stands between the products: the tile functions' interface, and how logits are made of the raw product."""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prefkern.types import Temperature


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and row statistics: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowStats(NamedTuple):
    """Preallocated per-row outputs of the tile functions, each ``[C]``; None where a statistic was not asked for.

    With ``x`` the logits before the temperature: ``row_max = max x``, ``log_sum = log sum exp((x - row_max) / T)``.
    """

    logps: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


class LogitForm(NamedTuple):
    """How a head makes logits of its raw product: ``softcap(logit_scale (a + bias)) / temperature``."""

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: Temperature = 1.0


class DivergenceRows(NamedTuple):
    """What the backward of a divergence needs of each row, each ``[C]``: `RowStats`' maximum and log-sum of both heads,
    and ``center``: KL(q || p) (forward), KL(p || q) (reverse, NaN where infinite), KL(p || m) (Jensen-Shannon)."""

    row_max: Tensor
    log_sum: Tensor
    ref_row_max: Tensor
    ref_log_sum: Tensor
    center: Tensor

    def bound(self, beta: float) -> Tensor:
        """What no entry of a row of the unscaled gradient exceeds: 1, and ``1 + 2 D`` for the reverse divergence D."""
        return 2.0 * self.center + 1.0 if beta == 1.0 else torch.ones_like(self.center)


class Logits(NamedTuple):
    """How logits are made of the raw product: ``softcap(logit_scale (h W^T + bias)) / temperature``."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: Temperature
    ignore_index: int

    def rows(self, rows: slice) -> "Logits":
        """Of some rows: a temperature per row is cut to them."""
        temperature = self.temperature
        return self._replace(temperature=temperature[rows] if isinstance(temperature, Tensor) else temperature)

    @property
    def options(self) -> dict[str, Any]:
        """As the tile functions take them."""
        return {name: value for name, value in self._asdict().items() if name != "bias"}


def stats_rows(stats: RowStats, rows: slice | int) -> RowStats:
    return RowStats._make(None if value is None else value[rows] for value in stats)


class Scaler(Protocol):
    """Scales rows, ``out = post (row x + other_row other)`` rounded once; ``out`` may be ``x``, and rows whose factors
    are 0 are 0, whatever stands in them. A part of the tile functions of the head and of the divergences."""

    def scale_rows(
        self,
        x: Tensor,
        row: Tensor,
        out: Tensor,
        *,
        post: Tensor | None = None,
        other: tuple[Tensor, Tensor] | None = None,
    ) -> None: ...


class Tiles(Scaler, Protocol):
    """The tile functions of one head: `prefkern.kernels.reference` or `prefkern.kernels.triton`."""

    IN_PLACE: bool

    def tile_fwd(
        self,
        tile: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        stats: RowStats,
        held: Tensor | None,
        *,
        logit_scale: float,
        softcap: float | None,
        temperature: Temperature,
        ignore_index: int,
    ) -> None: ...

    def tile_bwd(
        self,
        tile: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        stats: RowStats,
        c: Tensor | None,
        e: Tensor | None,
        out: Tensor,
        *,
        v_start: int,
        logit_scale: float,
        softcap: float | None,
        temperature: Temperature,
        ignore_index: int,
    ) -> None: ...

    def held_bwd(
        self,
        held: Tensor,
        targets: Tensor,
        logps: Tensor,
        entropy: Tensor,
        c: Tensor,
        e: Tensor,
        out: Tensor,
        *,
        ignore_index: int,
    ) -> None: ...


class DivergenceTiles(Scaler, Protocol):
    """The tile functions: `prefkern.reference_divergence` or `prefkern.kernels.divergence`."""

    IN_PLACE: bool

    def tile_fwd(
        self,
        tile: Tensor,
        ref_tile: Tensor,
        scored: Tensor | None,
        divergence: Tensor,
        entropy: Tensor | None,
        rows: DivergenceRows,
        held: Tensor | None,
        *,
        form: LogitForm,
        ref_form: LogitForm,
        beta: float,
        peak: float | None,
    ) -> None: ...

    def tile_bwd(
        self,
        tile: Tensor,
        ref_tile: Tensor,
        scored: Tensor | None,
        rows: DivergenceRows,
        c: Tensor | None,
        out: Tensor,
        *,
        form: LogitForm,
        ref_form: LogitForm,
        beta: float,
        peak: float | None,
    ) -> None: ...


def activate(tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor | None:
    """Turns the raw product into logits before the temperature, in place; returns the softcap's derivative."""
    if bias is not None:
        tile.add_(bias)
    if logit_scale != 1.0:
        tile.mul_(logit_scale)
    if softcap is None:
        return None
    masked = tile == -math.inf
    t = tile.div_(softcap).tanh_()
    factor = (1 - t) * (1 + t)
    tile.mul_(softcap).masked_fill_(masked, -math.inf)
    return factor


def center(x: Tensor, row_max: Tensor, temperature: Temperature) -> Tensor:
    """``(x - row_max) / T`` in place, -inf kept; a row without any finite logit stays -inf."""
    x.sub_(row_max.masked_fill(row_max == -math.inf, 0.0).unsqueeze(-1))
    if isinstance(temperature, Tensor):
        x.div_(temperature.unsqueeze(-1))
    elif temperature != 1.0:
        x.div_(temperature)
    return x
