"""What launchers share: tile sizes, the device guard, argument checks. Torch is imported where it is used, so that
kernels can be compiled where there is none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.types import Temperature


class Tile(NamedTuple):
    """How a row is cut: ``lanes * per_lane`` elements at a time, ``per_lane`` of them contiguous in one thread."""

    lanes: int
    per_lane: int
    num_warps: int
    num_stages: int


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's. (The interpreter takes CPU tensors.)"""
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(tensor.device)


def check_rows(where: str, **tensors: Tensor | None) -> None:
    """The kernels read rows as contiguous memory (any row stride) and vectors as contiguous."""
    for name, value in tensors.items():
        if value is not None and value.shape[-1] > 1 and value.stride(-1) != 1:
            from prefkern.check import fail

            fail(
                where,
                f"{name} must have a unit stride along its last dimension, got strides {tuple(value.stride())}: "
                f"pass {name}.contiguous()",
            )


def row_temperature(temperature: Temperature) -> tuple[Tensor | None, float]:
    """One temperature per row as a pointer, or one number for all."""
    return (None, temperature) if isinstance(temperature, int | float) else (temperature, 1.0)
