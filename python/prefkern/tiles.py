"""What stands between the products: the tile functions' interface, and how logits are made of the raw product."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prefkern import plan
from prefkern.types import RowStats, Temperature


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
    """The tile functions: `prefkern.reference` or `prefkern.kernels.fold`."""

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


def empty_tile(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, V]`` whose rows begin where wide loads and products want them."""
    return narrowed(torch.empty(rows * _stride(V, dtype, device), dtype=dtype, device=device), rows, V)


def narrowed(tile: Tensor, rows: int, V: int) -> Tensor:
    """A smaller tile in the memory of one of `empty_tile`, its rows as close together as those of a new one."""
    stride = _stride(V, tile.dtype, tile.device)
    return tile.as_strided((rows, V), (stride, 1))


def _stride(V: int, dtype: torch.dtype, device: torch.device) -> int:
    return plan.row_elements(V, dtype.itemsize, device.type != "cpu")
