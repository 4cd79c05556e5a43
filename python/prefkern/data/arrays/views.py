"""Arguments as numpy views, and the compiled module that reads them."""

import functools
import operator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefkern import check

Array = npt.NDArray[Any]


_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
# Tuples, since a union would be made anew at every call.
_ARRAYS = (np.ndarray, torch.Tensor)
_LISTS = (list, tuple)


@functools.cache
def core() -> ModuleType:
    """The compiled module, loaded when it is first needed."""
    return check.require(
        "prefkern._core",
        "prefkern.data",
        "its compiled module is missing; install a wheel with `pip install --force-reinstall prefkern`, "
        "or build it in a source checkout with `maturin develop --release`",
    )


def threads() -> int:
    """As many as torch may use: 1 in DataLoader workers, OMP_NUM_THREADS where that is set."""
    return torch.get_num_threads()


def is_arrow(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "pyarrow"


LONGEST = 200


def describe(value: object) -> str:
    """What was got, for a message, which it does not fill."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if is_arrow(value):
        return f"a {type(value).__name__} of {getattr(value, 'type', 'columns')}"
    try:
        text = check.describe(value)
    except ValueError:  # an int of more than 4300 digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def is_array(value: object) -> bool:
    return isinstance(value, _ARRAYS)


def view(where: str, name: str, value: Any) -> Array:
    """A numpy view of a numpy array or a torch CPU tensor, whatever its strides."""
    if isinstance(value, torch.Tensor):
        try:
            return value.numpy()
        except (TypeError, RuntimeError):  # one of these, which cost more to ask than to try
            if value.device.type != "cpu":
                check.fail(where, f"{name} must be on the CPU, got {check.describe(value)}; move it with .cpu()")
            if value.layout != torch.strided:
                check.fail(where, f"{name} must be a dense tensor, got layout {value.layout}")
            if value.requires_grad:
                check.fail(where, f"{name} must not require a gradient; pass {name}.detach()")
            if value.dtype == torch.bfloat16:
                check.fail_type(where, f"{name} must not be bfloat16, which numpy lacks; convert it with .float()")
            raise
    if isinstance(value, np.ma.MaskedArray):
        check.fail_type(where, f"{name} must not be a numpy masked array, whose mask would be lost; pass a plain array")
    if not isinstance(value, np.ndarray):
        check.fail_type(where, f"{name} must be a numpy array or a torch tensor, got {describe(value)}")
    return value if type(value) is np.ndarray else np.asarray(value)


def packed(array: Array) -> Array:
    """C-contiguous and aligned, a copy only where the array is not."""
    layout = array.flags
    return array if layout.c_contiguous and layout.aligned else np.require(array, requirements=["C", "A"])


def flatten(where: str, name: str, rows: Any, total: int, *, integers: bool, nested: bool) -> Array:
    """The ``total`` numbers of a list, or of a list of lists, as int64 or float64."""
    values: Array = np.empty(total, dtype=np.int64 if integers else np.float64)
    core().flatten(f"prefkern.{where}", name, rows, values, integers, nested)
    return values


def vector(where: str, name: str, value: Any, *, integers: bool) -> Array:
    """A flat list or tuple of numbers, a numpy array or a torch tensor, as a numpy array."""
    if isinstance(value, _LISTS):
        return flatten(where, name, value, len(value), integers=integers, nested=False)
    return view(where, name, value)


def indices(where: str, name: str, value: Any) -> Array:
    """A vector of integers as contiguous int64."""
    array = vector(where, name, value, integers=True)
    if not np.can_cast(array.dtype, np.int64) or array.dtype.kind not in "iu":
        check.fail_type(where, f"{name} must hold integers that fit int64, got {describe(array)}")
    if array.ndim != 1:
        check.fail(where, f"{name} must have one dimension, got {describe(array)}")
    return packed(array.astype(np.int64, copy=False))


def floats(where: str, name: str, array: Array) -> Array:
    """Contiguous float32 or float64."""
    if array.dtype not in _FLOATS:
        convert = "; convert it first: a list of ints is read as float64" if array.dtype.kind in "iu" else ""
        check.fail_type(where, f"{name} must be float32 or float64, got {describe(array)}{convert}")
    return packed(array)


def flags(where: str, name: str, array: Array) -> Array:
    """bool, or numbers 0 and 1, as contiguous uint8."""
    if array.dtype.char == "?":
        return packed(array).view(np.uint8)
    if array.dtype.kind not in "iuf":
        check.fail_type(where, f"{name} must be bool or numbers 0 and 1, got {describe(array)}")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        at = tuple(int(index) for index in np.argwhere(wrong)[0])
        check.fail(where, f"{name} must hold only 0 and 1 (or be bool), got {array[at]} at {list(at)}")
    return packed(array.astype(np.uint8, copy=False))


def whole(where: str, name: str, value: Any, *, low: int) -> int:
    """An integer of at least ``low``; a bool is not one."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        check.fail_type(where, f"{name} must be an integer, got {check.describe(value)}")
    number = operator.index(value)
    if not low <= number < 2**63:
        check.fail(where, f"{name} must be an integer of at least {low} that fits int64, got {number}")
    return number
