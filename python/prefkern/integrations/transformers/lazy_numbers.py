"""What trainers compute of logits, answered from hidden states: scales and caps, softmax, losses, statistics.

Every function here has the signature of the functions of torch that it stands for; NotImplemented makes the logits
real, as every function that is not here does.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prefkern.integrations.transformers.lazy_dispatch import answered, answers, derive, is_last, wide_dtype
from prefkern.integrations.transformers.lazy_rows import Rows
from prefkern.integrations.transformers.lazy_tensor import Cell, LazyLogits, asked_by_torch_distributed

T: Any = torch.Tensor

# ---------------------------------------------------------------------------------------------- arithmetic on all of it


@answers(T.mul, torch.mul, torch.multiply, T.multiply, T.__mul__, T.__rmul__)
def _mul(x: Any, other: Any) -> Any:
    if not isinstance(x, LazyLogits):
        x, other = other, x
    if isinstance(other, LazyLogits):
        return _product(x.cell, other)
    number = _number(other)
    if number is not None:
        return _times(x.cell, number, lambda z: z * other)
    return _by_rows(x.cell, other, lambda z: z * other, inverse=True) if isinstance(other, Tensor) else NotImplemented


@answers(T.div, torch.div, T.divide, torch.divide, T.true_divide, torch.true_divide, T.__truediv__, T.__div__)
def _div(x: Any, other: Any) -> Any:
    if not isinstance(x, LazyLogits) or isinstance(other, LazyLogits):
        return NotImplemented
    number = _number(other)
    if number is not None:
        return _times(x.cell, 1.0 / number, lambda z: z / other) if number else NotImplemented
    return _by_rows(x.cell, other, lambda z: z / other) if isinstance(other, Tensor) else NotImplemented


@answers(T.neg, torch.neg, T.__neg__, torch.negative, T.negative)
def _neg(x: LazyLogits) -> Any:
    return _times(x.cell, -1.0, lambda z: -z)


def _number(other: Any) -> float | None:
    if isinstance(other, Tensor):
        return None if other.ndim or other.requires_grad or other.is_complex() else float(other)
    return float(other) if isinstance(other, int | float) else None


def _times(cell: Cell, number: float, function: Any) -> Any:
    if cell.kind == "logits":
        return derive(function, cell, cell.rows.times(number))
    if not math.isfinite(number):
        return NotImplemented
    return derive(function, cell, cell.rows, factor=cell.factor * number)


def _by_rows(cell: Cell, other: Tensor, function: Any, *, inverse: bool = False) -> Any:
    if cell.kind != "logits" or not other.is_floating_point():
        return NotImplemented
    rows = cell.rows.divided_by_rows(1.0 / other if inverse else other)
    return derive(function, cell, rows, dtype=torch.promote_types(cell.dtype, other.dtype))


def _product(cell: Cell, other: LazyLogits) -> Any:
    """Probabilities times what they are of: summed over the vocabulary that is an entropy."""
    kinds = {cell.kind: cell, other.cell.kind: other.cell}
    if "probs" not in kinds or not {"logps", "logits"} & set(kinds) or not _same(cell.rows, other.cell.rows):
        return NotImplemented
    kind: Any = "probs * logps" if "logps" in kinds else "probs * logits"
    dtype = torch.promote_types(cell.dtype, other.cell.dtype)

    def function(z: Tensor) -> Tensor:
        return z * other.cell.real("a product")

    return derive(function, cell, cell.rows, kind=kind, factor=cell.factor * other.cell.factor, dtype=dtype)


def _same(one: Rows, other: Rows) -> bool:
    """Whether two are the same numbers with the same gradient, if any."""
    if one is other or torch.is_grad_enabled():
        return one is other
    pairs = ((one.hidden, other.hidden), (one.matrix.weight, other.matrix.weight))
    same = all(a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() for a, b in pairs)
    return (
        same
        and all(getattr(one, name) == getattr(other, name) for name in ("columns", "scale", "cap"))
        and (one.temperature is other.temperature)
    )


@answers(T.tanh, torch.tanh, functional.tanh)
def _tanh(x: LazyLogits) -> Any:
    return derive(lambda z: z.tanh(), x.cell, x.cell.rows.tanh()) if x.cell.kind == "logits" else NotImplemented


# ------------------------------------------------------------------------------------------------- over the vocabulary


@answers(functional.log_softmax, T.log_softmax, torch.log_softmax)
def _log_softmax(x: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    return _softmax_kind(x, "logps", dim, dtype)


@answers(functional.softmax, T.softmax, torch.softmax)
def _softmax(x: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    return _softmax_kind(x, "probs", dim, dtype)


def _softmax_kind(x: LazyLogits, kind: Any, dim: int | None, dtype: torch.dtype | None) -> Any:
    if x.cell.kind != "logits" or not is_last(x, dim):
        return NotImplemented
    function = torch.log_softmax if kind == "logps" else torch.softmax
    made = derive(
        lambda z: function(z, -1, dtype=dtype), x.cell, x.cell.rows, kind=kind, dtype=wide_dtype(x.cell, dtype)
    )
    if made.cell.rows is x.cell.rows:
        made.cell.whole = (x.cell, ...)  # one pass for its statistics and theirs
    return made


@answers(T.exp, torch.exp)
def _exp(x: LazyLogits) -> Any:
    if x.cell.kind != "logps" or x.cell.factor != 1.0:
        return NotImplemented
    return derive(lambda z: z.exp(), x.cell, x.cell.rows, kind="probs")


@answers(T.logsumexp, torch.logsumexp)
def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if x.cell.kind != "logits" or not is_last(x, dim):
        return NotImplemented
    found = answered(x.cell, x.cell.logsumexp(), wide_dtype(x.cell))
    return found.unsqueeze(-1) if keepdim else found


@answers(T.gather, torch.gather)
def _gather(x: LazyLogits, dim: int, index: Tensor) -> Any:
    cell = x.cell
    if cell.kind not in ("logits", "logps", "probs") or not is_last(x, dim) or index.shape[:-1] != x.shape[:-1]:
        return NotImplemented
    if cell.kind == "logits":
        return answered(cell, cell.logits_at(index))
    logps = cell.logps(index)
    return answered(cell, cell.factor * (logps.exp() if cell.kind == "probs" else logps))


@answers(T.mean, torch.mean)
def _mean(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if dim is None:
        found = _mean(x, -1, dtype=dtype)
        return found if found is NotImplemented else found.mean()
    if x.cell.kind not in ("logits", "logps") or not is_last(x, dim):
        return NotImplemented
    mean = x.cell.rows.mean()
    if mean is not None and x.cell.kind == "logps":
        mean = x.cell.factor * (mean - x.cell.logsumexp())
    return _kept(x.cell, mean, keepdim, dtype)


@answers(T.sum, torch.sum)
def _sum(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    cell = x.cell
    if dim is None:
        found = _sum(x, -1, dtype=dtype)
        return found if found is NotImplemented else found.sum()
    if not is_last(x, dim):
        return NotImplemented
    if cell.kind in ("logits", "logps"):
        found = _mean(x, dim, keepdim, dtype=dtype)
        return found if found is NotImplemented else found * x.shape[-1]
    if cell.kind not in ("probs * logps", "probs * logits"):
        return NotImplemented
    grad = torch.is_grad_enabled() and x.requires_grad
    entropy = cell.rows.some_stats(("entropy",), grad=grad).entropy
    assert entropy is not None
    total = -entropy if cell.kind == "probs * logps" else cell.logsumexp() - entropy
    return _kept(cell, cell.factor * total, keepdim, dtype)


def _kept(cell: Cell, value: Tensor | None, keepdim: bool, dtype: torch.dtype | None) -> Any:
    found = answered(cell, value, dtype)
    return found.unsqueeze(-1) if keepdim and found is not NotImplemented else found


@answers(T.argmax, torch.argmax)
def _argmax(x: LazyLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    if x.cell.kind != "logits" or dim is None or not is_last(x, dim):
        return NotImplemented
    return _kept(x.cell, x.cell.rows.largest()[1], keepdim, torch.int64)


@answers(T.max, torch.max)
def _max(x: LazyLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    grad = torch.is_grad_enabled() and x.requires_grad
    if x.cell.kind != "logits" or dim is None or not is_last(x, dim) or grad:
        return NotImplemented
    values, tokens = x.cell.rows.largest()
    return torch.return_types.max((_kept(x.cell, values, keepdim, None), _kept(x.cell, tokens, keepdim, torch.int64)))


# ------------------------------------------------------------------------------------------------------------- losses


@answers(functional.cross_entropy)
def _cross_entropy(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    cell = input.cell
    if weight is not None or size_average is not None or reduce is not None or cell.kind not in ("logits", "turned"):
        return NotImplemented
    if target.shape != cell.rows.shape[:-1] or (cell.kind == "logits" and input.dim() > 2):
        return NotImplemented
    if target.dtype not in (torch.int64, torch.int32) or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    loss = cell.rows.cross_entropy(target, ignore_index, "none" if label_smoothing else reduction)
    if label_smoothing:
        mean = cell.rows.mean()
        if mean is None:
            return NotImplemented
        mask = target != ignore_index
        uniform = (cell.logsumexp() - mean).masked_fill(~mask, 0.0)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
        loss = loss if reduction == "none" else loss.sum() / (mask.sum() if reduction == "mean" else 1)
    return answered(cell, loss, wide_dtype(cell))


@answers(functional.nll_loss)
def _nll_loss(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    cell = input.cell
    if cell.kind != "logps" or cell.factor != 1.0 or weight is not None or input.dim() > 2:
        return NotImplemented
    if size_average is not None or reduce is not None or target.shape != input.shape[:-1]:
        return NotImplemented
    return answered(cell, cell.rows.cross_entropy(target, ignore_index, reduction), wide_dtype(cell))


# --------------------------------------------------------------------------------------------------------- hooks on it


@answers(T.register_hook)
def _register_hook(x: LazyLogits, hook: Any) -> Any:
    """FSDP hangs its own on every output of a module; a hook of a user is to see the gradient of the logits."""
    if not asked_by_torch_distributed():
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return T.register_hook(x, hook)
