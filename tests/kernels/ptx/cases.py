"""Cases of the library's kernels for the machine: a launch, what it should have written, the bytes it must move.

`launchers` makes them of a shape and options; here is what a case is, how matrices lie in memory, and which cases the
tests run: the fast ones in every test run, the others with `make ptx`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FLOAT, "bf16": BF16, "fp16": HALF}
Result = tuple[Tensor, Tensor, Tensor]  # written, by float64, by plain float32


class Shape(NamedTuple):
    """Rows of a matrix; ``aligned``: rows begin at multiples of 16 elements, which the JIT knows and vectorises."""

    rows: int
    columns: int
    aligned: bool


class Case(NamedTuple):
    """A launch, its results by name, and the bytes that it must read and write at least."""

    launch: Callable[[], None]
    results: Callable[[], dict[str, Result]]
    read: int
    written: int


class Launcher(NamedTuple):
    """A launcher of the library: how a case is made of a shape and options, and the options there are."""

    make: Callable[..., Case]
    axes: dict[str, tuple[Any, ...]]

    def options(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


def matrix(values: Tensor, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a copy whose rows are aligned, or begin at odd elements; NaN stands between them."""
    dtype = dtype or values.dtype
    rows, columns = values.shape
    stride = -(-columns // 16) * 16 if shape.aligned else columns + 7 + columns % 2
    memory = torch.full((rows * stride + 64,), float("nan"), dtype=dtype)
    start = -(memory.data_ptr() // memory.element_size()) % 64 if shape.aligned else 1
    out = memory.as_strided((rows, columns), (stride, 1), start)
    out.copy_(values)
    return out


def empty(shape: Shape, dtype: torch.dtype) -> Tensor:
    return matrix(torch.full(shape[:2], float("nan")), shape, dtype)


def _of(launcher: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return launcher, options


FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "scoring bfloat16": _of("scoring", dtype="bf16", held=None, wanted="e", softcap=False),
    "gradient bfloat16": _of("logits_bwd", dtype="bf16", written="bf16", c=True, e=True, softcap=False),
    "fold, held bfloat16": _of("fold", dtype="fp32", held="bf16", wanted="", softcap=False),
    "fold backward": _of("tile_bwd", dtype="fp32", written="bf16", c=True, e=True, softcap=False),
    "held backward": _of("held_bwd", dtype="bf16", written="bf16"),
    "scaled rows": _of("scale_rows", dtype="fp32", written="bf16", post=True, other=False),
    "forward divergence": _of("divergence_fwd", beta=0.0, dtype="fp32", held="bf16", entropy=False, full=False),
    "divergence backward": _of("divergence_bwd", beta=1.0, dtype="fp32", written="bf16", c=True, full=False),
}
_FULL: dict[str, Any] = {"softcap": True, "bias": True, "scale": True, "temperature": "rows"}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "all statistics float32": _of("scoring", dtype="fp32", held=None, wanted="eqmt", softcap=True, temperature="rows"),
    "all statistics float16": _of("scoring", dtype="fp16", held=None, wanted="eqmt", softcap=False),
    "all statistics bfloat16": _of("scoring", dtype="bf16", held=None, wanted="eqmt", softcap=True),
    "gradient float32, softcap": _of(
        "logits_bwd", dtype="fp32", written="fp32", c=True, e=True, softcap=True, temperature="rows"
    ),
    "gradient float16": _of("logits_bwd", dtype="fp16", written="fp16", c=True, e=False, softcap=False),
    "fold without held": _of("fold", dtype="fp32", held=None, wanted="m", softcap=False),
    "fold, all options": _of("fold", dtype="fp32", held="bf16", wanted="eqmt", **_FULL),
    "fold, held float32, scale": _of("fold", dtype="fp32", held="fp32", wanted="e", softcap=False, scale=True),
    "fold backward, all options": _of("tile_bwd", dtype="fp32", written="fp32", c=True, e=True, **_FULL),
    "fold backward, only u": _of("tile_bwd", dtype="fp32", written="bf16", c=False, e=False, softcap=False),
    "held backward float32": _of("held_bwd", dtype="fp32", written="fp32"),
    "two scaled rows": _of("scale_rows", dtype="bf16", written="bf16", post=False, other=True),
    "reverse divergence": _of("divergence_fwd", beta=1.0, dtype="bf16", held=None, entropy=True, full=False),
    "Jensen-Shannon": _of("divergence_fwd", beta=0.3, dtype="fp32", held="bf16", entropy=True, full=True),
    "divergence backward, full": _of("divergence_bwd", beta=0.3, dtype="fp32", written="bf16", c=True, full=True),
}


def case(name: str, shape: Shape) -> Case:
    """Returns one of the cases above, with inputs that depend on its name only."""
    from ptx.launchers import LAUNCHERS

    launcher, options = (FAST | MORE)[name]
    torch.manual_seed(sum(map(ord, name)))
    return LAUNCHERS[launcher].make(shape, **options)
