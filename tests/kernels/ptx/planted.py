"""Triton kernels that are wrong in ways that Triton's interpreter does not show, and their sound twins."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def narrow_in_place(tile_ptr, out_ptr, V, stride, LANES: tl.constexpr):
    """Writes 16-bit results over the float32 row that they come from: a fast warp overruns what a slow one reads."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, LANES)
    for v in tl.range(0, V, LANES):
        x = tl.load(tile_ptr + row * stride + v + cols)
        tl.store(out_ptr + row * 2 * stride + v + cols, x.to(tl.bfloat16))


@triton.jit
def shift(x_ptr, out_ptr, by, BLOCK: tl.constexpr):
    """``out[i + by] = x[i]``: in place, programs and warps read what others write."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i + by, tl.load(x_ptr + i))


@triton.jit
def sum_rows(x_ptr, out_ptr, V, stride, WIDE: tl.constexpr, LANES: tl.constexpr):
    """The sums of rows, whose offsets are 64-bit (``WIDE``) or not."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    cols = tl.arange(0, LANES)
    total = tl.sum(tl.load(x_ptr + row * stride + cols, mask=cols < V, other=0.0), 0)
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit
def unmasked(x_ptr, out_ptr, V, stride, MASK: tl.constexpr, LANES: tl.constexpr):
    """A row's tail with a mask or without."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, LANES)
    mask = cols < V if MASK else cols < LANES
    tl.store(out_ptr + row * stride + cols, tl.load(x_ptr + row * stride + cols, mask=mask), mask=mask)


@triton.jit
def promised(x_ptr, out_ptr, start, PROMISE: tl.constexpr, LANES: tl.constexpr):
    """Copies from ``start`` on, with the promise that it is a multiple of so much."""
    cols = tl.arange(0, LANES)
    at = tl.max_contiguous(tl.multiple_of(start + cols, PROMISE), LANES)
    tl.store(out_ptr + cols, tl.load(x_ptr + at))


@triton.jit
def total(x_ptr, out_ptr, LANES: tl.constexpr):
    """Every program stores its sum in one place."""
    x = tl.sum(tl.load(x_ptr + tl.program_id(0) * LANES + tl.arange(0, LANES)), 0)
    tl.store(out_ptr, x)


@triton.jit
def add_in_place(x_ptr, out_ptr, LANES: tl.constexpr):
    """Every thread reads the total, one writes it: a fast warp's write comes before a slow one's read."""
    x = tl.sum(tl.load(x_ptr + tl.arange(0, LANES)), 0)
    tl.store(out_ptr, tl.load(out_ptr) + x)


class Vector(NamedTuple):
    """A kernel's argument that is several: pointers, one of them absent, and a number."""

    start: Any
    bias: Any
    scale: Any


@triton.jit
def scaled(x, out_ptr, LANES: tl.constexpr):
    """``out = scale (start + bias)`` of a `Vector`."""
    i = tl.arange(0, LANES)
    y = tl.load(x.start + i)
    if x.bias is not None:
        y += tl.load(x.bias + i)
    tl.store(out_ptr + i, y * x.scale)
