"""The matrix products: 16-bit operands, float32 accumulation, and a float32 result where it must not be rounded."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prefkern.head.engine import blocks
from prefkern.kernels.interface import wide_dtype


class ProductCount:
    """Counts the multiply-adds of the products that were run; `products` gives them in multiples of N H V."""

    def __init__(self) -> None:
        self.multiply_adds = 0

    def products(self, N: int, H: int, V: int) -> float:
        return self.multiply_adds / (N * H * V)


_counters: list[ProductCount] = []


@contextmanager
def count_products() -> Iterator[ProductCount]:
    """Counts the head's products inside the block (tests and benchmarks; not under ``torch.compile``)."""
    counter = ProductCount()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Writes ``out (+)= a @ b``, accumulated in float32, and rounded once if ``out`` is 16-bit.

    On the CPU there is no product of 16-bit operands with a float32 result, so where it multiplies bfloat16 natively
    partial results are rounded before they are added up; `Weight.logits` upcasts instead, since log-probabilities must
    not be rounded. Where it does not, operands are upcast slice by slice.
    """
    for counter in _counters:
        counter.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
    if not a.is_cuda and not native(a.dtype):
        _upcast_mm(a, b, out, accumulate)
    elif a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))


def _bfloat16_units() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_BFLOAT16 = _bfloat16_units()


def native(dtype: torch.dtype) -> bool:
    """Tells whether this CPU has units for products of the dtype. Without them torch's 16-bit products are 5 to 100
    times slower than float32 ones (docs/cpu-head.md), and those of float16 would overflow with them too."""
    return _BFLOAT16 if dtype == torch.bfloat16 else dtype != torch.float16


def _upcast_mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """`mm` by float32 products of slices: of the longer side of ``a``, so that the other operand's copy is small."""
    M, K = a.shape
    P = b.shape[1]
    if K >= M:
        wide = out if out.dtype == torch.float32 else torch.empty(M, P)
        step = max(1, blocks.CAST_BYTES // (4 * (M + P)))
        for start in range(0, K, step):
            part = slice(start, start + step)
            if start or (accumulate and wide is out):
                torch.addmm(wide, a[:, part].float(), b[part].float(), out=wide)
            else:
                torch.mm(a[:, part].float(), b[part].float(), out=wide)
        if wide is not out:
            out.add_(wide) if accumulate else out.copy_(wide)
        return
    b = b.float()
    step = max(1, blocks.CAST_BYTES // (4 * (K + P)))
    for start in range(0, M, step):
        rows = out[start : start + step]
        product = torch.mm(a[start : start + step].float(), b)
        rows.add_(product) if accumulate else rows.copy_(product)


class Weight:
    """An output matrix ``[V, H]`` and its two products, in the compute dtype.

    Where its own dtype is another one, or a CPU multiplies upcast 16-bit operands, columns of the vocabulary are cast
    slice by slice, so that no copy of the whole is made; ``keep`` makes one, for an accelerator that would cast every
    slice once for each chunk of rows. ``scratch`` bounds the bytes of a cast slice.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, *, keep: bool = False, scratch: int = blocks.SCRATCH_BYTES
    ) -> None:
        self.wide = wide_dtype(dtype)
        self.shape = weight.shape
        self.scratch = scratch
        self._weight = weight.to(dtype) if keep and weight.is_cuda else weight
        self._dtype = dtype
        self._factors = self.wide if not weight.is_cuda else dtype  # of the product that makes logits

    @property
    def casts(self) -> bool:
        """Whether columns are cast for `times_weight`: then it adds up several slices."""
        return self._weight.dtype != self._dtype

    def _columns(self, dtype: torch.dtype) -> int:
        V, H = self._weight.shape
        return blocks.cast_columns(H, V, dtype.itemsize, self._weight.is_cuda, self.scratch)

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        """Writes ``out = hidden @ weight[columns].T`` in float32, never rounded to 16 bits."""
        hidden = hidden.to(self._factors)
        casts = self.casts or self._dtype != self._factors
        step = self._columns(self._factors) if casts else self._weight.shape[0]
        for start, stop in _slices(columns, step):
            # no name for the cast slice: it must be gone before the next is made
            part = out[:, start - columns.start : stop - columns.start]
            mm(hidden, self._weight[start:stop].to(self._dtype).to(self._factors).T, part)

    def times_weight(self, tile: Tensor, columns: slice, out: Tensor, *, accumulate: bool = False) -> None:
        """Writes ``out (+)= tile @ weight[columns]`` for a tile of those columns, in the compute dtype or wider; with
        several slices ``out`` should be wide, since it is added to."""
        casts = self.casts or tile.dtype != self._dtype
        step = self._columns(tile.dtype) if casts else self._weight.shape[0]
        for start, stop in _slices(columns, step):
            part = tile[:, start - columns.start : stop - columns.start]
            weight = self._weight[start:stop].to(self._dtype).to(tile.dtype)
            mm(part, weight, out, accumulate=accumulate or start > columns.start)
            del weight  # it must be gone before the next is made


def _slices(columns: slice, step: int) -> Iterator[tuple[int, int]]:
    for start in range(columns.start, columns.stop, step):
        yield start, min(start + step, columns.stop)
