"""Row scaling: what a loss contributes to the head's products is one factor a row. One program a row.

    out = post (row x + other_row other)        in float32, rounded once to the dtype of out

of hidden states before their product with the tile, of the product that became grad_hidden (in place, or narrowed to
its dtype), and of a frozen head's two kept gradients. A row whose factors are 0 is 0 and is not read: what stands in
the rows of ignored targets reaches nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, on_device

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit(do_not_specialize=["row_step"])
def _scale_rows_kernel(
    x_ptr,  # [N, H]
    row_ptr,  # [N]
    other_ptr,  # [N, H] or None
    other_row_ptr,  # [N] or None
    post_ptr,  # [] or None
    out_ptr,  # [N, H], may be x or other
    H,
    stride,
    other_stride,
    out_stride,
    row_step,  # 0: one factor for all rows
    HAS_OTHER: tl.constexpr,
    HAS_POST: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(row_ptr + row * row_step)
    other_factor = tl.load(other_row_ptr + row) if HAS_OTHER else 0.0
    if HAS_POST:  # a power of two: exact
        post = tl.load(post_ptr)
        factor = factor * post
        other_factor = other_factor * post
    read = (factor != 0.0) | (other_factor != 0.0)
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    # H is a multiple of 16 in every model, which Triton specialises: then the mask does not narrow the loads
    for h in tl.range(0, H, LANES * PER_LANE, num_stages=STAGES):
        cols = h + lane
        inside = cols < H
        y = tl.load(x_ptr + row * stride + cols, mask=inside & read, other=0.0).to(tl.float32) * factor
        if HAS_OTHER:
            z = tl.load(other_ptr + row * other_stride + cols, mask=inside & read, other=0.0)
            y += z.to(tl.float32) * other_factor
        tl.store(out_ptr + row * out_stride + cols, y.to(dtype), mask=inside)


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
    """``out = post (row x + other_row other)``, rounded once; rows whose factors are 0 are 0 and are not read."""
    N, H = x.shape
    if N == 0:
        return
    if x.stride(-1) != 1 and x is not out:
        x = x.contiguous()
    second, second_row = (None, None) if other is None else other
    check_rows("kernels.scale_rows", x=x, other=second, other_row=second_row, out=out)
    tile = SCALE[min(x.element_size(), 4)]
    with on_device(x):
        _scale_rows_kernel[(N,)](
            x,
            row,
            second,
            second_row,
            post,
            out,
            H,
            x.stride(0),
            0 if second is None else second.stride(0),
            out.stride(0),
            row.stride(0),
            HAS_OTHER=second is not None,
            HAS_POST=post is not None,
            LANES=tile.lanes,
            PER_LANE=tile.per_lane,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
