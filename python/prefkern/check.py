"""Argument validation: the only place where it is written. Every message names the function, the argument, what was
expected and what was got, so that a user can act on it. Shapes, dtypes and devices are always checked; values only on
the CPU, because reading them elsewhere would wait for the device."""

import importlib
import math
import numbers
import re
import reprlib
from collections.abc import Collection
from types import ModuleType
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = _SHORT.maxlong = 200
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
MOST_BYTES = 1 << 62
"""What an unlimited size counts as: an operator takes it as an int64."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MissingDependency(ImportError):  # noqa: N818 - the public name
    """An optional package that this feature needs is not installed; the message says which command installs it."""


def require(module: str, feature: str, install: str) -> ModuleType:
    """Imports ``module``, or says what ``feature`` needs and the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(f"{feature} needs {module.partition('.')[0]}: {install} ({error})") from error


def fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"prefkern.{where}: {message}")


def fail_type(where: str, message: str) -> NoReturn:
    raise TypeError(f"prefkern.{where}: {message}")


def no_functorch(where: str) -> None:
    """torch.func transforms do not see through the operators: refused, rather than failing inside them."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"prefkern.{where}: torch.func transforms (grad, vmap, jvp ...) are not supported: "
            "use torch.autograd, and a leading dimension in place of vmap"
        )


def describe(value: object) -> str:
    """Returns ``float32 (4, 8) on cpu`` for a tensor, else its type and its value, cut to some 200 characters."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {short(value)}"


def short(value: object) -> str:
    """Returns the ``repr`` of a value as it can stand in a sentence: long containers, numbers and texts are cut."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHORT.maxother else f"{text[: _SHORT.maxother]} ..."


def tensor(where: str, name: str, value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor):
        fail_type(where, f"{name} must be a torch.Tensor, got {describe(value)}")
    return True


def floating(where: str, **named: Tensor | None) -> None:
    """Each named tensor is float16, bfloat16, float32 or float64 (None is skipped)."""
    for name, value in named.items():
        if value is None:
            continue
        tensor(where, name, value)
        if value.dtype not in FLOATS:
            hint = "; dequantise it first (prefkern reads plain floating-point tensors)" if name == "weight" else ""
            fail_type(where, f"{name} must be float16, bfloat16, float32 or float64, got {describe(value)}{hint}")


def integer(where: str, **named: Tensor | None) -> None:
    for name, value in named.items():
        if value is None:
            continue
        tensor(where, name, value)
        if value.dtype not in (torch.int64, torch.int32):
            fail_type(where, f"{name} must be int64 or int32, got {describe(value)}")


def mask(where: str, name: str, value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask of 0 and 1, of ``shape``, as bool. Any dtype is taken; on the CPU other values are an error."""
    if value is None:
        return None
    tensor(where, name, value)
    if value.shape != shape:
        fail(where, f"{name} must have shape {tuple(shape)}, got {describe(value)}")
    if value.dtype == torch.bool:
        return value
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not ((value == 0) | (value == 1)).all():
        fail(where, f"{name} must hold only 0 and 1 (or be bool), got values outside them in {describe(value)}")
    return value != 0


def same_shape(where: str, **named: Tensor | None) -> None:
    """All named tensors have one shape (None is skipped)."""
    given = {name: value for name, value in named.items() if value is not None}
    shapes = [value.shape for value in given.values()]
    if any(shape != shapes[0] for shape in shapes):  # pair by pair: a set would make lengths constants of a graph
        names = " and ".join(given) if len(given) == 2 else ", ".join(given)
        fail(where, f"{names} must have the same shape, got {' and '.join(str(tuple(shape)) for shape in shapes)}")


def same_device(where: str, **named: Tensor | None) -> None:
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if len({value.device for value in given.values()}) > 1:
        devices = ", ".join(f"{name} on {value.device}" for name, value in given.items())
        fail(where, f"all tensors must be on one device, got {devices}")


def number(
    where: str,
    name: str,
    value: Any,
    *,
    low: float = float("-inf"),
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A finite real number in an interval, as float; a bool is not a number."""
    if type(value) is float and low < value < high:
        return value
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        fail_type(where, f"{name} must be a number, got {describe(value)}")
    real = float(value)
    below = real <= low if open_low else real < low
    above = real >= high if open_high else real > high
    if below or above or real != real or real in (float("inf"), float("-inf")):
        opens, closes = open_low or low == -math.inf, open_high or high == math.inf
        interval = f"{'(' if opens else '['}{low}, {high}{')' if closes else ']'}"
        fail(where, f"{name} must be a finite number in {interval}, got {short(value)}")
    return real


def one_of(where: str, name: str, value: object, allowed: Collection[Any]) -> None:
    if value not in allowed:
        fail(where, f"{name} must be one of {', '.join(map(repr, allowed))}, got {short(value)}")


def count(where: str, name: str, value: Any) -> int | None:
    """Returns a count of at least 0, or None."""
    if value is None or (type(value) is int and value >= 0):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        fail(where, f"{name} must be None or an int >= 0, got {short(value)}")
    return int(value)


def size(where: str, name: str, value: Any) -> int | None:
    """Returns a number of bytes: of an int, ``math.inf`` (no limit), or a text as ``"2GB"``, ``"512 MiB"``; or None."""
    if value is None or (type(value) is int and 0 <= value <= MOST_BYTES):
        return value
    given = value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        digits, unit, binary = match.groups()
        power = " kmgt".index(unit.lower() or " ")
        given = round(float(digits) * (1024 if binary else 1000) ** power)
    whole = isinstance(given, numbers.Integral) or (isinstance(given, float) and not given % 1 > 0)
    if isinstance(given, bool) or not whole or not given >= 0:
        fail(where, f"{name} must be bytes >= 0: an int, a text such as '2GB', or math.inf, got {short(value)}")
    return int(min(given, MOST_BYTES))


def offsets(where: str, cu_seqlens: Tensor, total: int) -> None:
    """``cu_seqlens [S + 1]``: 0, then non-decreasing, up to the number of packed tokens (values on the CPU only)."""
    integer(where, cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        fail(where, f"cu_seqlens must be [S + 1] offsets beginning with 0, got {describe(cu_seqlens)}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((cu_seqlens.diff() < 0).any()):
        fail(
            where,
            f"cu_seqlens must start at 0, never decrease and end at the number of tokens {total}, "
            f"got {cu_seqlens.tolist() if cu_seqlens.numel() <= 9 else describe(cu_seqlens)}",
        )
