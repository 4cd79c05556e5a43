"""The matrix products: 16-bit operands, float32 accumulation, and a float32 result where it must not be rounded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prefkern import plan


class ProductCount:
    """Multiply-adds of the products that were run, in units that `products` turns into multiples of N H V."""

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
    """``out (+)= a @ b``, accumulated in float32, and rounded once if ``out`` is 16-bit.

    On the CPU there is no product of 16-bit operands with a float32 result, so bfloat16 partial results are rounded
    before they are added up; `Weight.logits` upcasts instead, since log-probabilities must not be rounded.
    """
    for counter in _counters:
        counter.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
    if a.dtype == torch.float16 and not a.is_cuda:
        a, b = a.float(), b.float()  # CPUs have no float16 product worth the name, and its result would overflow
    if a.dtype == out.dtype:
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


class Weight:
    """The weight in the compute dtype, and the raw product with it in float32 (float64 for float64 operands)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        # CPU, 16 bits: the product runs on upcast operands; the upcast weight is kept where it is small
        self._upcast = dtype != self.wide and not weight.is_cuda
        self._step = plan.slice_columns(weight.shape[1], weight.shape[0], 4)
        self._kept: Tensor | None = None

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        if not self._upcast:
            mm(hidden, self.weight[columns].T, out)
            return
        hidden = hidden.to(self.wide)
        for start in range(columns.start, columns.stop, self._step):
            stop = min(start + self._step, columns.stop)
            mm(hidden, self._wide_rows(start, stop).T, out[:, start - columns.start : stop - columns.start])

    def _wide_rows(self, start: int, stop: int) -> Tensor:
        if self._step < self.weight.shape[0]:
            return self.weight[start:stop].to(self.wide)
        if self._kept is None:
            self._kept = self.weight.to(self.wide)
        return self._kept[start:stop]
