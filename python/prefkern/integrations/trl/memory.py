"""How many bytes the head may hold inside TRL without raising the peak that TRL's own head has.

TRL keeps nothing from forward to backward and peaks at the end of its backward; with 16-bit operands on an accelerator
that is ``6 V H`` bytes (a float32 grad_weight and its 16-bit copy) plus a tile of up to 268 MB. Ours writes grad_weight
in its own dtype and spends the difference on held rows. Both peaks are counted here from their allocations, beyond the
inputs, which both have. Where nothing is left, nothing is held; and where even the usual scratch would be more than
TRL's tile (fewer than about 2048 tokens without a weight's gradient), scratch is what TRL's peak leaves of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.head import costs
from prefkern.head.engine import blocks, products

TOKENS, COLUMNS = 4096, 32768
"""TRL's tile; it is allocated at its full width even for a smaller vocabulary."""


def head_of(hidden: Tensor, weight: Tensor, N: int) -> costs.Call:
    """The call as TRL makes it, with N tokens."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    V, H = weight.shape
    return costs.Call(
        N,
        H,
        V,
        hidden.dtype.itemsize,
        weight.dtype.itemsize,
        dtype.itemsize,
        hidden.requires_grad and torch.is_grad_enabled(),
        weight.requires_grad and torch.is_grad_enabled(),
        accelerator=device != "cpu",
        native=products.native(dtype),
    )


def trl_peak(head: costs.Call) -> int:
    """Of TRL's backward: tile, casts of one block, float32 gradients, and what comes on top of them at the end."""
    n, v = min(head.N, TOKENS), min(head.V, COLUMNS)
    tile = n * COLUMNS * head.compute_bytes
    casts = 0
    if head.weight_bytes != head.compute_bytes:
        casts += v * head.H * head.compute_bytes
    if head.hidden_bytes != head.compute_bytes:
        casts += n * head.H * head.compute_bytes
    gradients = 4 * head.H * (head.N * head.grad_hidden + head.V * head.grad_weight)
    rounded = head.H * (
        head.N * head.hidden_bytes * (head.grad_hidden and head.hidden_bytes != 4)
        + head.V * head.weight_bytes * (head.grad_weight and head.weight_bytes != 4)
    )
    # without Triton its backward has seven float32 blocks of torch temporaries at once
    temporaries = 0 if head.accelerator else 7 * 4 * n * v
    return tile + casts + gradients + max(rounded, temporaries)


class Bounds(NamedTuple):
    """Bytes that one call may hold from forward to backward, and of its scratch."""

    held: int
    scratch: int


LEAST_SCRATCH = 1 << 16


def own_peak(head: costs.Call) -> int:
    """Ours in forward or backward, without held rows."""
    return max(costs.forward_bytes(head, 0, 0), costs.backward_bytes(head, 0, 0) + head.gradient_bytes)


def bounds(least: costs.Call, most: costs.Call) -> Bounds:
    """So that the peak of a call between the two does not exceed TRL's own."""
    peak, scratch = trl_peak(least), blocks.SCRATCH_BYTES
    left = peak - own_peak(most)
    while left < 0 and scratch > LEAST_SCRATCH:
        scratch //= 2
        left = peak - own_peak(most._replace(scratch=scratch))
    return Bounds(left if scratch == blocks.SCRATCH_BYTES else 0, scratch)


def bounds_of(hidden: Tensor, weight: Tensor) -> Bounds:
    """Of one call. Under compilation those of a range of lengths, so that a new length is not a new compilation."""
    least = most = hidden.shape[0]
    if torch.compiler.is_compiling():
        least, most = 1, 16
        while most < hidden.shape[0]:
            least, most = most, 4 * most
    return bounds(head_of(hidden, weight, least), head_of(hidden, weight, most))
