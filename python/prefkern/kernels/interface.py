"""The tile functions' interface: all that stands between the products, and how logits are made of the raw product."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefkern.types import Temperature


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits and row statistics: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Logits(NamedTuple):
    """Transformation of the raw product into logits, ``softcap(logit_scale (h W^T + bias)) / temperature``, and the
    target of a row that is not scored."""

    bias: Tensor | None = None  # [V], in the dtype of the logits
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: Temperature = 1.0
    ignore_index: int = -100

    def rows(self, rows: slice) -> "Logits":
        """Returns those of some rows: a temperature per row is cut to them."""
        temperature = self.temperature
        return self._replace(temperature=temperature[rows]) if isinstance(temperature, Tensor) else self

    def columns(self, columns: slice | Tensor) -> "Logits":
        """Returns those of some columns of the vocabulary, or of entries in the columns of an index: with their
        biases."""
        return self if self.bias is None else self._replace(bias=self.bias[columns])

    def activate(self, tile: Tensor) -> Tensor | None:
        """Turns the raw product into logits before the temperature, in place; returns the softcap's derivative."""
        if self.bias is not None:
            tile.add_(self.bias)
        if self.logit_scale != 1.0:
            tile.mul_(self.logit_scale)
        if self.softcap is None:
            return None
        masked = tile == -math.inf
        t = tile.div_(self.softcap).tanh_()
        slope = (1 - t) * (1 + t)
        tile.mul_(self.softcap).masked_fill_(masked, -math.inf)
        return slope

    def center(self, x: Tensor, row_max: Tensor) -> Tensor:
        """Returns ``(x - row_max) / T``, in place, -inf kept; a row without any finite logit stays -inf."""
        x.sub_(row_max.masked_fill(row_max == -math.inf, 0.0).unsqueeze(-1))
        if isinstance(self.temperature, Tensor):
            x.div_(self.temperature.unsqueeze(-1))
        elif self.temperature != 1.0:
            x.div_(self.temperature)
        return x


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

    def rows(self, rows: slice | int) -> "RowStats":
        """Returns those of some rows."""
        return RowStats._make(None if value is None else value[rows] for value in self)


class Factors(NamedTuple):
    """The loss's share of a row's gradient ``c u + e p (log p + entropy) (1 - t)(1 + t)``, each ``[R]``: ``c`` of None
    is 1, ``e`` of None is 0."""

    c: Tensor | None = None
    e: Tensor | None = None

    def rows(self, rows: slice) -> "Factors":
        """Returns those of some rows."""
        return Factors._make(None if value is None else value[rows] for value in self)


class DivergenceStats(NamedTuple):
    """Statistics of each row that the backward of a divergence needs, each ``[C]``: `RowStats`' maximum and log-sum of
    both heads, and ``center``: KL(q || p) (forward), KL(p || q) (reverse, NaN where infinite), KL(p || m)
    (Jensen-Shannon)."""

    row_max: Tensor
    log_sum: Tensor
    ref_row_max: Tensor
    ref_log_sum: Tensor
    center: Tensor

    def rows(self, rows: slice) -> "DivergenceStats":
        """Returns those of some rows."""
        return DivergenceStats._make(value[rows] for value in self)

    def bound(self, beta: float) -> Tensor:
        """Returns a bound of the entries of each row of the unscaled gradient: 1, and ``1 + 2 D`` for the reverse D."""
        return 2.0 * self.center + 1.0 if beta == 1.0 else torch.ones_like(self.center)


class DivergenceResults(NamedTuple):
    """Preallocated results of a divergence's forward, each ``[C]``; ``entropy`` is None where not asked for."""

    divergence: Tensor
    entropy: Tensor | None  # of the policy
    stats: DivergenceStats

    def rows(self, rows: slice) -> "DivergenceResults":
        """Returns those of some rows."""
        entropy = None if self.entropy is None else self.entropy[rows]
        return DivergenceResults(self.divergence[rows], entropy, self.stats.rows(rows))


class TilePair(NamedTuple):
    """The raw products of two heads in the same rows and columns, which rows count, and how each becomes logits."""

    tile: Tensor  # [C, V], of any floating dtype
    ref_tile: Tensor  # [C, V]
    scored: Tensor | None  # [C] bool, None: all
    logits: Logits
    ref_logits: Logits

    def rows(self, rows: slice) -> "TilePair":
        """Returns those of some rows."""
        scored = None if self.scored is None else self.scored[rows]
        return TilePair(
            self.tile[rows], self.ref_tile[rows], scored, self.logits.rows(rows), self.ref_logits.rows(rows)
        )


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
    """The tile functions of one head: `prefkern.kernels.reference.logprobs` or `prefkern.kernels.triton.logprobs`.

    Targets are columns of the whole vocabulary, of which a tile may have those from ``v_start`` on. A tile may be
    overwritten, unless ``keep_tile``.
    """

    IN_PLACE: bool
    """Whether ``held`` and ``out`` may be the tile itself."""

    def tile_fwd(
        self,
        tile: Tensor,
        targets: Tensor,
        stats: RowStats,
        held: Tensor | None,
        logits: Logits,
        *,
        keep_tile: bool = False,
    ) -> None: ...

    def tile_bwd(
        self,
        tile: Tensor,
        targets: Tensor,
        stats: RowStats,
        factors: Factors,
        out: Tensor,
        logits: Logits,
        *,
        v_start: int = 0,
        keep_tile: bool = False,
    ) -> None: ...

    def held_bwd(
        self,
        held: Tensor,
        targets: Tensor,
        stats: RowStats,
        factors: Factors,
        out: Tensor,
        logits: Logits,
        *,
        v_start: int = 0,
    ) -> None: ...


class DivergenceTiles(Scaler, Protocol):
    """The tile functions of two heads: `prefkern.kernels.reference.divergence` or `prefkern.kernels.triton.divergence`.

    ``beta`` names the divergence; with a ``peak`` the gradient of a row is held times ``peak / bound``.
    """

    IN_PLACE: bool

    def tile_fwd(
        self, pair: TilePair, results: DivergenceResults, held: Tensor | None, *, beta: float, peak: float | None
    ) -> None: ...

    def tile_bwd(
        self,
        pair: TilePair,
        stats: DivergenceStats,
        c: Tensor | None,
        out: Tensor,
        *,
        beta: float,
        peak: float | None,
    ) -> None: ...
