"""Row scaling: what a loss contributes to the head's products is one factor a row. One program a row.

    out = post (row x + other_row other)        in float32, rounded once to the dtype of out

of hidden states before their product with the tile, of the product that became grad_hidden (in place, or narrowed to
its dtype), and of a frozen head's two kept gradients. A row whose factors are 0 is 0 and is not read: what stands in
the rows of ignored targets reaches nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, launch, matrix

if TYPE_CHECKING:
    from torch import Tensor


class Other(NamedTuple):
    """A second matrix ``[N, H]`` as kernels take it, with its factors."""

    ptr: Any
    stride: Any
    row_ptr: Any  # [N]


@triton.jit(do_not_specialize=["row_step"])
def _scale_rows_kernel(
    x,  # Matrix [N, H]
    row_ptr,  # [N]
    row_step,  # 0: one factor for all rows
    other,  # Other or None
    post_ptr,  # [] or None
    out,  # Matrix [N, H], may be x or other
    H,
    TILE: tl.constexpr,
):
    LANES: tl.constexpr = TILE.lanes
    PER_LANE: tl.constexpr = TILE.per_lane
    i = tl.program_id(0).to(tl.int64)
    factor = tl.load(row_ptr + i * row_step)
    if post_ptr is not None:  # a power of two: exact
        factor = factor * tl.load(post_ptr)
    read = factor != 0.0
    if other is not None:
        other_factor = tl.load(other.row_ptr + i)
        if post_ptr is not None:
            other_factor = other_factor * tl.load(post_ptr)
        read = read | (other_factor != 0.0)
    dtype = out.ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    # H is a multiple of 16 in every model, which Triton specialises: then the mask does not narrow the loads
    for h in tl.range(0, H, LANES * PER_LANE, num_stages=TILE.num_stages):
        cols = h + lane
        inside = cols < H
        y = tl.load(x.ptr + i * x.stride + cols, mask=inside & read, other=0.0).to(tl.float32) * factor
        if other is not None:
            z = tl.load(other.ptr + i * other.stride + cols, mask=inside & read, other=0.0)
            y += z.to(tl.float32) * other_factor
        tl.store(out.ptr + i * out.stride + cols, y.to(dtype), mask=inside)


# 16 bytes a lane and load; four warps, so that a width of a thousand fills them
SCALE = {2: Tile(lanes=128, per_lane=8, num_warps=4, num_stages=1), 4: Tile(128, 4, 4, 1)}


def scale_rows(
    x: Tensor,  # [N, H], of any floating dtype
    row: Tensor,  # [N] float32, may be expanded from one number
    out: Tensor,  # [N, H], of any floating dtype; `x` or `other` itself, or aliasing neither
    *,
    post: Tensor | None = None,  # [], a power of two
    other: tuple[Tensor, Tensor] | None = None,  # [N, H] and its factors [N]
) -> None:
    """Writes ``out = post (row x + other_row other)``, rounded once; a row whose factors are 0 is 0 and not read."""
    if x.stride(-1) != 1 and x is not out:
        x = x.contiguous()
    second, second_row = (None, None) if other is None else other
    check_rows("kernels.scale_rows", x=x, other=second, other_row=second_row, out=out)
    given = None if second is None else Other(second, second.stride(0), second_row)
    arguments = (matrix(x), row, row.stride(0), given, post, matrix(out), x.shape[1])
    launch(_scale_rows_kernel, x, SCALE[min(x.element_size(), 4)], *arguments)
