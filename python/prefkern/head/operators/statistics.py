"""Arguments and results that the operators of the head have in common: how logits are made, and rows' statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefkern.kernels.interface import Logits, RowStats, wide_dtype

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
LOGITS = "Tensor? row_temperature, float temperature, float? softcap, int ignore_index"
STATS = (
    "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logit, "
    "Tensor is_top1"
)


def empty_stats(rows: Tensor, targets: Tensor, outputs: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns unwritten logps, row_max, log_sum and the optional statistics of every row; those not asked for have no
    elements."""
    N, wide = rows.shape[0], wide_dtype(dtype)
    always = [rows.new_empty(shape, dtype=wide) for shape in (targets.shape, (N,), (N,))]
    optional = [
        rows.new_empty(N if name in outputs else 0, dtype=torch.bool if name == "is_top1" else wide)
        for name in OPTIONAL
    ]
    return *always, *optional


def row_stats(tensors: tuple[Tensor, ...], outputs: list[str]) -> RowStats:
    """Returns the statistics that were asked for, by name."""
    given = (value if name in outputs else None for name, value in zip(OPTIONAL, tensors[3:7], strict=True))
    return RowStats(*tensors[:3], *given)


def logits_of(
    bias: Tensor | None,
    dtype: torch.dtype,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
) -> Logits:
    """Returns how logits are made, of an operator's arguments `LOGITS` and the logit scale."""
    wide = None if bias is None else bias.to(wide_dtype(dtype))
    return Logits(wide, logit_scale, softcap, temperature if row_temperature is None else row_temperature, ignore_index)


def empty_grads(given: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns an unwritten gradient of each input that is given and needed."""
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format) if need and value is not None else None
        for value, need in zip(given, needed, strict=True)
    ]


def returned(grads: Sequence[Tensor | None], given: Sequence[Any]) -> tuple[Tensor, ...]:
    """Returns gradients as an operator does: in the dtypes of the inputs, of no elements where there is none."""
    return tuple(
        given[0].new_empty(0) if grad is None else grad.to(value.dtype)
        for grad, value in zip(grads, given, strict=True)
    )
