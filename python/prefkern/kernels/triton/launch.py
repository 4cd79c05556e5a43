"""Shared by the launchers: the arguments of kernels, tile sizes, the device guard, argument checks. Torch is imported
where it is used, so that kernels can be compiled where there is none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import Logits


class Tile(NamedTuple):
    """The cut of a row: ``lanes * per_lane`` elements at a time, ``per_lane`` of them contiguous in one thread."""

    lanes: int
    per_lane: int
    num_warps: int
    num_stages: int


class Matrix(NamedTuple):
    """A matrix as kernels take it: contiguous rows, ``stride`` elements apart."""

    ptr: Any
    stride: Any


class Form(NamedTuple):
    """Transformation of the raw product into logits, ``softcap(scale (a + bias)) / temperature``: absent parts are
    None."""

    bias: Any  # [V]
    scale: Any
    softcap: Any
    row_temperature: Any  # [C]; None: `temperature` of all rows
    temperature: Any


def matrix(tensor: Tensor | None) -> Matrix | None:
    """Returns a matrix as kernels take it."""
    return None if tensor is None else Matrix(tensor, tensor.stride(0))


def form_of(logits: Logits) -> Form:
    """Returns how logits are made, as kernels take it."""
    scale = None if logits.logit_scale == 1.0 else logits.logit_scale
    if isinstance(logits.temperature, int | float):
        return Form(logits.bias, scale, logits.softcap, None, logits.temperature)
    return Form(logits.bias, scale, logits.softcap, logits.temperature, None)


def launch(kernel: Any, rows: Tensor, tile: Tile, *arguments: Any, **constants: Any) -> None:
    """Runs one program for each row of the matrix ``rows``, on its device."""
    if rows.shape[0] == 0:
        return
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True}
    with on_device(rows):
        kernel[(rows.shape[0],)](*arguments, TILE=tile, **constants, **options)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's. (The interpreter takes CPU tensors.)"""
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(tensor.device)


def check_rows(where: str, **tensors: Any) -> None:
    """Checks that rows are contiguous memory (of any row stride) and vectors contiguous, as the kernels read them:
    every tensor that is given, also in the fields of a tuple."""
    for name, value in tensors.items():
        if hasattr(value, "_asdict"):
            check_rows(where, **value._asdict())
        elif hasattr(value, "stride") and value.shape[-1] > 1 and value.stride(-1) != 1:
            from prefkern.check import fail

            fail(
                where,
                f"{name} must have a unit stride along its last dimension, got strides {tuple(value.stride())}: "
                f"pass {name}.contiguous()",
            )
