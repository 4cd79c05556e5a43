"""Corrections to Triton's interpreter, so that what it computes is what a GPU would.

bfloat16 lives there as uint16: its arithmetic, comparisons, reductions and ``tl.dot`` work on the bit patterns, casts
to it truncate. Here they pass through float32 and round to nearest even. Also corrected: a scan along a negative axis
is silently wrong, a comparison of integers keeps their dtype and cannot be a mask, every call of a device function
patches the language anew, and CPU memory is copied onto itself after each launch. And it becomes a memory checker:
every address that is loaded or stored must lie within a tensor that the kernel was given.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def decode(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns: round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _widen(value: Any) -> Any:
    return Handle(decode(value.data), tl.float32) if _is_bf16(value) else value


def _narrow(handle: Any) -> Any:
    return Handle(encode(handle.data), tl.bfloat16)


def _through_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an operation on float32 copies of its bfloat16 operands and rounds a floating-point result."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_bf16, args)) or np.where in args or np.abs in args:  # a choice of bits is no arithmetic
            out = method(self, *args, **kwargs)
        else:
            out = method(self, *map(_widen, args), **kwargs)
            if out.data.dtype != np.bool_:
                return _narrow(out)
        if out.data.dtype == np.bool_ and out.dtype != tl.int1:
            return Handle(out.data, tl.int1)
        return out

    return call


def _cast(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return source
        source = _widen(source)
        if target.scalar == tl.bfloat16:
            return _narrow(Handle(source.data.astype(np.float32), tl.float32))
        if source.dtype.scalar == tl.float32 and target.scalar in (tl.float16, tl.float32):
            return Handle(source.data.astype(interpreter._get_np_dtype(target)), target.scalar)
        return method(self, source, target, *rounding)

    return call


def _dot(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return method(self, _widen(a), _widen(b), *args)

    return call


def _reduce(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        if not _is_bf16(first.handle):
            return method(self, inputs, *args, **kwargs)
        wide = self.to_tensor(decode(first.handle.data), tl.float32)
        out = method(self, wide, *args, **kwargs)
        values, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        if values.dtype != tl.float32:  # an index
            return out
        kind = tl.block_type(tl.bfloat16, list(values.shape)) if values.shape else tl.bfloat16
        narrow = tl.tensor(_narrow(values.handle), kind)
        return (narrow, *others) if others else narrow

    return call


def _scan(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, inputs: Any) -> Any:
        if self.axis < 0:
            self.axis += inputs[0].handle.data.ndim
        return method(self, inputs)

    return call


def _device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a device function patches the language only where the launch has not done so."""
    if any(tl.core.is_builtin(module.arange) for module in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@functools.cache
def _languages(fn: Callable[..., Any]) -> list[Any]:
    return [value for value in fn.__globals__.values() if value is tl or value is tl.core]


_extents: list[tuple[int, int]] = []  # the addresses of the tensors of the running kernel


def _extent(tensor: Any) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() if tensor.numel() else 0


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    """The tensors among the arguments, also those in tuples of any depth."""
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "data_ptr"):
            yield value


def _launch(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _extents[:] = [_extent(value) for value in _tensors((*args, *kwargs.values()))]
        with np.errstate(all="ignore"):  # as a GPU: infinities and NaN without a word
            return method(self, *args, **kwargs)

    return call


def _access(method: Callable[..., Any]) -> Callable[..., Any]:
    """A masked load or store: its active addresses lie within one tensor."""

    @functools.wraps(method)
    def call(self: Any, pointers: Any, *args: Any) -> Any:
        mask = next(value for value in args if isinstance(value, Handle) and value.data.dtype == np.bool_)
        active = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if active.size:
            first, last = (
                int(active.min()),
                int(active.max()) + max(1, pointers.get_element_ty().primitive_bitwidth // 8),
            )
            if not any(low <= first and last <= high for low, high in _extents):
                near = min((min(abs(first - low), abs(last - high)) for low, high in _extents), default=-1)
                raise IndexError(f"{method.__name__} of {active.size} elements, some {near} bytes outside any tensor")
        return method(self, pointers, *args)

    return call


def _restore(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, args: Any, args_host: Any, kwargs: Any, kwargs_host: Any) -> None:
        if any(value.is_cuda for value in _tensors((*args, *kwargs.values()))):
            method(self, args, args_host, kwargs, kwargs_host)

    return call


@functools.cache
def install() -> None:
    """Corrects the interpreter of this process; a second call does nothing."""
    for owner, names, correct in (
        (interpreter.InterpreterBuilder, ("binary_op", "unary_op", "ternary_op", "create_fma"), _through_float32),
        (interpreter.InterpreterBuilder, ("cast_impl", "create_fp_to_fp"), _cast),
        (interpreter.InterpreterBuilder, ("create_dot",), _dot),
        (interpreter.InterpreterBuilder, ("create_masked_load", "create_masked_store"), _access),
        (interpreter.ReduceOps, ("sum", "min_max"), _reduce),
        (interpreter.ScanOps, ("cumsum", "cumprod"), _reduce),
        (interpreter.ScanOps, ("apply_impl",), _scan),
        (interpreter.GridExecutor, ("__call__",), _launch),
        (interpreter.GridExecutor, ("_restore_args_dev",), _restore),
    ):
        for name in names:
            setattr(owner, name, correct(getattr(owner, name)))
    interpreter.InterpretedFunction.__call__ = _device_call
