"""Which calls of torch on a lazy tensor are answered, and what becomes of the others: they get real tensors."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prefkern.integrations.transformers.lazy_rows import Rows
from prefkern.integrations.transformers.lazy_tensor import (
    _NO_TORCH_FUNCTION,
    Cell,
    Kind,
    LazyLogits,
    calling_line,
    real,
)

T: Any = torch.Tensor
_ANSWERS: dict[Any, tuple[Callable[..., Any], inspect.Signature]] = {}

_METADATA = {
    *(getattr(T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")),
    *(getattr(T, name).__get__ for name in ("grad_fn", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested")),
    *(
        getattr(T, name).__get__
        for name in ("is_meta", "is_mps", "is_xpu", "itemsize", "nbytes", "grad", "_version", "_base")
    ),
    *(T.size, T.dim, T.ndimension, T.numel, T.nelement, T.element_size, T.stride, T.storage_offset, T.get_device),
    *(T.is_contiguous, T.is_floating_point, T.is_complex, T.is_inference, T.__len__, T.__hash__, T.is_same_size),
    *(
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_inference,
        torch.result_type,
        T.retains_grad.__get__,
    ),
}
"""What is known of a tensor without its numbers."""


def answers(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an answer for functions of torch, whose signature it has as far as it knows it."""

    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _ANSWERS[function] = answer, inspect.signature(answer)
        return answer

    return register


def answer(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function of torch on arguments among which is a lazy tensor."""
    if function in _METADATA and all(each.cell.made is None for each in _lazies(args)):
        with _NO_TORCH_FUNCTION():
            return function(*args, **kwargs)
    name = _name(function)
    if _changes_in_place(name) and args and isinstance(args[0], LazyLogits):
        return _in_place(function, name, args, kwargs)
    result = _asked(function, args, kwargs)
    if result is NotImplemented:
        asked = f"{_module(function)}{name}"
        result = function(*real(args, asked), **real(kwargs, asked))
    return result


def _asked(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the answer from hidden states, or NotImplemented."""
    lazies = list(_lazies(args))
    if function not in _ANSWERS or not lazies or any(each.cell.made is not None or each.adopted for each in lazies):
        return NotImplemented
    for each in lazies:
        each.refuse_stale()
    found, signature = _ANSWERS[function]
    try:
        signature.bind(*args, **kwargs)
    except TypeError:  # a form of the call that is not known here
        return NotImplemented
    return found(*args, **kwargs)


def _lazies(args: Any) -> Iterator[LazyLogits]:
    for each in args:
        if isinstance(each, LazyLogits):
            yield each
        elif isinstance(each, list | tuple):
            yield from _lazies(each)


def derive(
    function: Callable[[Tensor], Tensor],
    cell: Cell,
    rows: Rows | None,
    *,
    kind: Kind | None = None,
    dtype: torch.dtype | None = None,
    factor: float | None = None,
    alias: bool = False,
) -> Any:
    """Returns a lazy tensor that ``function`` makes of the cell's; one that shares its memory, if an alias."""
    if rows is None:
        return NotImplemented
    if not torch.is_grad_enabled():
        rows = rows.detached()
    return LazyLogits.of(
        Cell(
            cell.kind if kind is None else kind,
            rows,
            cell.dtype if dtype is None else dtype,
            cell.origin,
            parent=cell,
            function=_as_now(function, rows.hidden.device.type),
            factor=cell.factor if factor is None else factor,
            memory=cell.memory if alias else None,
        )
    )


def _as_now(function: Callable[[Tensor], Tensor], device: str) -> Any:
    """The function under the autocast of now, for when it is called later."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def again(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=enabled):
            return function(x)

    return again


def answered(cell: Cell, value: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """Returns a result in the dtype that torch would give it, and counts it."""
    if value is None:
        return NotImplemented
    cell.origin.book.answered += 1
    return value.to(cell.dtype if dtype is None else dtype)


def wide_dtype(cell: Cell, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of softmax and of losses: autocast makes it float32."""
    if dtype is not None:
        return dtype
    return torch.float32 if torch.is_autocast_enabled(cell.rows.hidden.device.type) else cell.dtype


def is_last(x: Tensor, dim: Any) -> bool:
    if isinstance(dim, list | tuple):
        return len(dim) == 1 and is_last(x, dim[0])
    return isinstance(dim, int) and dim in (-1, x.dim() - 1)


# ------------------------------------------------------------------------------------------------- changes in place

_OUT_OF_PLACE = {
    "div_": T.div,
    "mul_": T.mul,
    "true_divide_": T.div,
    "__itruediv__": T.div,
    "__idiv__": T.div,
    "__imul__": T.mul,
    "neg_": T.neg,
    "tanh_": T.tanh,
}
_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__ilshift__", "__irshift__", "__imatmul__"}


def _changes_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or name in _IN_PLACE_OPERATORS
    return name.endswith("_")


def _in_place(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    """Changes what a tensor stands for. Others that share its memory cannot follow: they refuse to be used from now on,
    unless they are real, as then all is done in the real memory."""
    lazy: LazyLogits = args[0]
    lazy.refuse_stale()
    before, others = lazy.cell, lazy.cell.memory.others(lazy)
    changed = NotImplemented
    if before.made is None and all(other.cell.made is None for other in others):
        changed = _asked(_OUT_OF_PLACE.get(name), args, kwargs)
    if changed is not NotImplemented and changed.dtype == before.dtype:
        file, line = calling_line()
        for other in others:
            other.stale = f"{name} at {file}:{line}"
        lazy.box[0] = changed.cell
        lazy.cell.memory.add(lazy)
        return lazy
    before.memory.changes += 1
    function(*real(args, name), **real(kwargs, name))
    return None if name in ("__setitem__", "__set__") else lazy


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    owner = getattr(function, "__self__", None)  # the getter of a property
    return getattr(owner, "__name__", name) if name == "__get__" else name


def _module(function: Any) -> str:
    if function is getattr(functional, _name(function), None):
        return "torch.nn.functional."
    return "torch.Tensor." if function is getattr(T, _name(function), None) else "torch."
