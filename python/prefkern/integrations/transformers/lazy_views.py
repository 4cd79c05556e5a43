"""Casts, slices and shapes of lazy logits. Every function here has the signature of the functions of torch that it
stands for; NotImplemented makes the logits real, as every function that is not here does."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefkern.integrations.transformers.lazy_dispatch import answers, derive
from prefkern.integrations.transformers.lazy_tensor import Cell, LazyLogits

T: Any = torch.Tensor

# ------------------------------------------------------------------------------------------------- the same numbers


def _named_cast(function: Any, dtype: torch.dtype) -> None:
    @answers(function)
    def cast(x: LazyLogits) -> Any:
        return _cast(x, dtype)


_named_cast(T.float, torch.float32)
_named_cast(T.double, torch.float64)
_named_cast(T.half, torch.float16)
_named_cast(T.bfloat16, torch.bfloat16)


@answers(T.type_as)
def _type_as(x: LazyLogits, other: Tensor) -> Any:
    return _cast(x, other.dtype) if other.device == x.device else NotImplemented


@answers(T.to)
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, copy = kwargs.pop("dtype", x.dtype), bool(kwargs.pop("copy", False))
    kwargs.pop("non_blocking", None)
    for given in (*args, kwargs.pop("device", None), kwargs.pop("other", None)):
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, Tensor):
            if given.device != x.device:
                return NotImplemented
            dtype = given.dtype
        elif isinstance(given, bool):
            continue
        elif given is not None and not _same_device(given, x.device):
            return NotImplemented
    return NotImplemented if kwargs or not isinstance(dtype, torch.dtype) else _cast(x, dtype, copy=copy)


@answers(T.cpu)
def _cpu(x: LazyLogits) -> Any:
    return x if x.device.type == "cpu" else NotImplemented


def _same_device(given: Any, device: torch.device) -> bool:
    wanted = torch.device(given)
    return wanted == device or (wanted.type == device.type and wanted.index is None)


def _cast(x: LazyLogits, dtype: torch.dtype, *, copy: bool = False) -> Any:
    if dtype == x.dtype and not copy:
        return x
    return (
        derive(lambda z: z.to(dtype), x.cell, x.cell.rows, dtype=dtype) if dtype.is_floating_point else NotImplemented
    )


@answers(T.contiguous)
def _contiguous(x: LazyLogits) -> Any:
    return x


@answers(T.clone, torch.clone)
def _clone(x: LazyLogits) -> Any:
    return derive(lambda z: z.clone(), x.cell, x.cell.rows)


@answers(T.detach, torch.detach, T.data.__get__)
def _detach(x: LazyLogits) -> Any:
    return derive(lambda z: z.detach(), x.cell, x.cell.rows.detached(), alias=True)


@answers(T.__repr__, T.__str__)
def _repr(x: LazyLogits, **options: Any) -> str:
    return f"LazyLogits({x.cell.kind}, shape={tuple(x.shape)}, dtype={x.dtype}, device={x.device}, not made)"


# ------------------------------------------------------------------------------------------- the leading dimensions


def _lead(x: LazyLogits, function: Callable[[Tensor], Tensor]) -> Any:
    """A view whose function leaves the last dimension alone, whatever its size."""
    if x.cell.kind == "turned":
        return NotImplemented
    return derive(function, x.cell, x.cell.rows.lead(function), alias=True)


def _lead_dim(x: LazyLogits, dim: int) -> bool:
    return isinstance(dim, int) and -x.dim() <= dim < x.dim() - 1 and dim != -1


@answers(T.__getitem__)
def _getitem(x: LazyLogits, index: Any) -> Any:
    given = index if isinstance(index, tuple) else (index,)
    used = sum(each.ndim if _is_mask(each) else each is not None and each is not ... for each in given)
    if any(each is ... for each in given):
        at = next(place for place, each in enumerate(given) if each is ...)
        given = (*given[:at], *[slice(None)] * (x.dim() - used), *given[at + 1 :])
        used = x.dim()
    if used < x.dim():
        return _lead(x, lambda z: z[given])
    *lead, last = given
    if x.cell.kind == "turned" or not isinstance(last, slice) or last.step not in (None, 1):
        return _pick(x, tuple(lead), last)
    start, stop, _ = last.indices(x.shape[-1])
    rows = x.cell.rows.lead(lambda z: z[tuple(lead)]) if lead else x.cell.rows
    if (start, stop) != (0, x.shape[-1]):
        if x.cell.kind != "logits":
            return NotImplemented
        rows = rows.cut(last)
    return derive(lambda z: z[given], x.cell, rows, alias=True)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _pick(x: LazyLogits, lead: tuple[Any, ...], last: Any) -> Any:
    """``x[..., k]``, and ``x[arange(N), y]``: one number of each row."""
    if x.cell.kind not in ("logits", "logps", "probs"):
        return NotImplemented
    if isinstance(last, int) and not isinstance(last, bool):
        rows = x[lead] if lead else x
        return rows.gather(-1, rows.new_full((*rows.shape[:-1], 1), last % x.shape[-1], dtype=torch.int64)).squeeze(-1)
    tensors = [each for each in (*lead, last) if isinstance(each, Tensor) and each.dtype in (torch.int64, torch.int32)]
    if len(tensors) != x.dim():
        return NotImplemented
    *lead_index, token = torch.broadcast_tensors(*tensors)  # type: ignore[no-untyped-call]
    return x[tuple(lead_index)].gather(-1, token.long().unsqueeze(-1)).squeeze(-1)


def _new(name: str) -> None:
    """Tensors of the same dtype and device, whose numbers have nothing to do with it."""

    @answers(getattr(T, name))
    def new(x: LazyLogits, *args: Any, dtype: torch.dtype | None = None, **named: Any) -> Any:
        return getattr(x.cell.rows.hidden, name)(*args, dtype=dtype or x.dtype, **named)


for _each in ("new_full", "new_zeros", "new_ones", "new_empty", "new_tensor"):
    _new(_each)


@answers(T.view, T.reshape, torch.reshape)
def _view(x: LazyLogits, *shape: Any, **named: Any) -> Any:
    if named:
        shape = (named["shape"],) if set(named) == {"shape"} else ()
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | torch.dtype) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    *lead, last = sizes
    V = x.shape[-1]
    if last == -1 and math.prod(lead) * V == x.numel():
        last = V
    return _lead(x, lambda z: z.reshape(*lead, z.shape[-1])) if last == V else NotImplemented


@answers(T.flatten, torch.flatten)
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _lead(x, lambda z: z.flatten(start_dim, end_dim)) if _lead_dim(x, end_dim) else NotImplemented


@answers(T.unsqueeze, torch.unsqueeze)
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    dim = dim + x.dim() + 1 if dim < 0 else dim
    return _lead(x, lambda z: z.unsqueeze(dim)) if dim < x.dim() else NotImplemented


@answers(T.squeeze, torch.squeeze)
def _squeeze(x: LazyLogits, dim: int) -> Any:
    return _lead(x, lambda z: z.squeeze(dim)) if _lead_dim(x, dim) else NotImplemented


@answers(T.narrow, torch.narrow)
def _narrow(x: LazyLogits, dim: int, start: int, length: int) -> Any:
    return _lead(x, lambda z: z.narrow(dim, start, length)) if _lead_dim(x, dim) else NotImplemented


@answers(T.index_select, torch.index_select)
def _index_select(x: LazyLogits, dim: int, index: Tensor) -> Any:
    return _lead(x, lambda z: z.index_select(dim, index)) if _lead_dim(x, dim) else NotImplemented


@answers(T.split, torch.split)
def _split(x: LazyLogits, split_size_or_sections: Any, dim: int = 0, **named: Any) -> Any:
    size = named.get("split_size", split_size_or_sections)
    if not _lead_dim(x, dim):
        return NotImplemented
    sizes = [size] * math.ceil(x.shape[dim] / size) if isinstance(size, int) else list(size)
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    ends = [min(start + step, x.shape[dim]) for start, step in zip(starts, sizes, strict=True)]
    return tuple(x.narrow(dim, start, end - start) for start, end in zip(starts, ends, strict=True))


@answers(T.chunk, torch.chunk)
def _chunk(x: LazyLogits, chunks: int, dim: int = 0) -> Any:
    return _split(x, max(1, math.ceil(x.shape[dim] / chunks)), dim) if _lead_dim(x, dim) else NotImplemented


@answers(T.unbind, torch.unbind)
def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    if dim != 0 or x.dim() < 2 or x.cell.kind == "turned":
        return NotImplemented
    x, rows = x if torch.is_grad_enabled() else x.detach(), []  # type: ignore[assignment]
    for index in range(x.shape[0]):
        row: Any = x[index]
        row.cell.whole = x.cell, index
        rows.append(row)
    return tuple(rows)


@answers(T.__iter__)
def _iter(x: LazyLogits) -> Iterator[Any]:
    found = _unbind(x)
    return NotImplemented if found is NotImplemented else iter(found)


@answers(torch.cat)
def _cat(tensors: Any, dim: int = 0) -> Any:
    if not all(isinstance(each, LazyLogits) and each.cell.kind == "logits" for each in tensors):
        return NotImplemented
    first: Cell = tensors[0].cell
    bare = [each.cell.rows._replace(hidden=first.rows.hidden) for each in tensors]
    if not _lead_dim(tensors[0], dim) or any(each.cell.dtype != first.dtype for each in tensors):
        return NotImplemented
    if first.rows.temperature is not None or any(not _same_head(each, bare[0]) for each in bare):
        return NotImplemented
    others = tensors[1:]
    rows = first.rows._replace(hidden=torch.cat([each.cell.rows.hidden for each in tensors], dim))
    return derive(lambda z: torch.cat([z, *(each.cell.real("torch.cat") for each in others)], dim), first, rows)


def _same_head(one: Any, other: Any) -> bool:
    same = all(
        a is b for a, b in ((one.matrix.weight, other.matrix.weight), (one.matrix.bias, other.matrix.bias))
    ) and (one.matrix.lora is None) == (other.matrix.lora is None)
    if same and one.matrix.lora is not None:
        same = one.matrix.lora[0] is other.matrix.lora[0] and one.matrix.lora[2] == other.matrix.lora[2]
    rest = ("compute_dtype", "columns", "scale", "cap", "temperature")
    return same and all(getattr(one, name) == getattr(other, name) for name in rest)


@answers(T.transpose, torch.transpose)
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    dims = {dim0 % x.dim(), dim1 % x.dim()}
    return _turn(x) if x.dim() == 3 and dims == {1, 2} else NotImplemented


@answers(T.permute, torch.permute)
def _permute(x: LazyLogits, *dims: Any) -> Any:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _turn(x) if x.dim() == 3 and tuple(dim % 3 for dim in order) == (0, 2, 1) else NotImplemented


@answers(T.mT.__get__)
def _mt(x: LazyLogits) -> Any:
    return _turn(x) if x.dim() == 3 else NotImplemented


def _turn(x: LazyLogits) -> Any:
    if x.cell.kind not in ("logits", "turned"):
        return NotImplemented
    kind = "turned" if x.cell.kind == "logits" else "logits"
    return derive(lambda z: z.transpose(1, 2), x.cell, x.cell.rows, kind=kind, alias=True)  # type: ignore[arg-type]
