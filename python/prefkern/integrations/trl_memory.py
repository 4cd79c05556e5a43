"""How many bytes the head may hold inside TRL without raising the peak that TRL's own head has.

TRL keeps nothing from forward to backward and peaks at the end of its backward; with 16-bit operands on an accelerator
that is ``6 V H`` bytes (a float32 grad_weight and its 16-bit copy) plus a tile of up to 268 MB. Ours writes grad_weight
in its own dtype and spends the difference on held rows. Both peaks are counted here from their allocations, beyond the
inputs, which both have. Where nothing is left, nothing is held; what remains then is scratch of at most 128 MiB (or 512
rows of float32 logits), which for fewer than 2048 tokens and a frozen head or none can be more than TRL's tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import plan

TOKENS, COLUMNS = 4096, 32768
"""TRL's tile; it is allocated at its full width even for a smaller vocabulary."""


class Head(NamedTuple):
    """Shapes without the number of tokens N, bytes per element, and needed gradients."""

    H: int
    V: int
    hidden_bytes: int
    weight_bytes: int
    compute_bytes: int
    grad_hidden: bool
    grad_weight: bool
    accelerator: bool

    @staticmethod
    def of(hidden: Tensor, weight: Tensor) -> "Head":
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        V, H = weight.shape
        return Head(
            H,
            V,
            hidden.dtype.itemsize,
            weight.dtype.itemsize,
            dtype.itemsize,
            hidden.requires_grad,
            weight.requires_grad,
            device in ("cuda", "xpu"),
        )

    @property
    def wide_bytes(self) -> int:
        return max(4, self.compute_bytes)

    def trl_peak(self, N: int) -> int:
        """Of TRL's backward: tile, casts of one block, float32 gradients, and what comes on top of them at the end."""
        n, v = min(N, TOKENS), min(self.V, COLUMNS)
        tile = n * COLUMNS * self.compute_bytes
        casts = 0
        if self.weight_bytes != self.compute_bytes:
            casts += v * self.H * self.compute_bytes
        if self.hidden_bytes != self.compute_bytes:
            casts += n * self.H * self.compute_bytes
        gradients = 4 * self.H * (N * self.grad_hidden + self.V * self.grad_weight)
        rounded = self.H * (
            N * self.hidden_bytes * (self.grad_hidden and self.hidden_bytes != 4)
            + self.V * self.weight_bytes * (self.grad_weight and self.weight_bytes != 4)
        )
        # without Triton its backward has seven float32 blocks of torch temporaries at once
        temporaries = 0 if self.accelerator else 7 * 4 * n * v
        return tile + casts + gradients + max(rounded, temporaries)

    def own_peak(self, N: int) -> int:
        """Ours in forward or backward, without the held rows."""
        H, V, wide = self.H, self.V, self.wide_bytes
        narrow = self.compute_bytes < wide
        casts = (
            H
            * self.compute_bytes
            * (V * (self.weight_bytes != self.compute_bytes) + N * (self.hidden_bytes != self.compute_bytes))
        )
        if narrow and not self.accelerator:  # the CPU multiplies upcast operands
            casts += min(4 * V * H, plan.SCRATCH_BYTES) + 4 * N * H
        forward = min(N, plan.chunk_rows(V, wide)) * V * wide
        gradients = H * (N * self.hidden_bytes * self.grad_hidden + V * self.weight_bytes * self.grad_weight)
        rows = N * H * (wide * self.grad_hidden + max(2 * wide, self.compute_bytes) * self.grad_weight)
        element = self.compute_bytes + (wide if narrow or self.accelerator else 0)
        slices = plan.slice_columns(N, V, element) * N * element if N else 0
        # on the CPU the product of 16-bit operands is 16-bit, and copied where its destination is wider
        products = 0
        if narrow and not self.accelerator:
            products = 2 * H * max(N * self.grad_hidden, V * (self.grad_weight and self.weight_bytes > 2))
        return casts + max(forward, gradients + rows + slices + products)


def budget(hidden: Tensor, weight: Tensor) -> int:
    """``max_memory`` for one call: bytes that may stay held so that the peak does not exceed TRL's own.

    Under compilation it is the bound of a range of lengths, so that a new length is not a new compilation.
    """
    head = Head.of(hidden, weight)
    least = most = hidden.shape[0]
    if torch.compiler.is_compiling():
        least, most = 0, 64
        while most < hidden.shape[0]:
            least, most = most, 4 * most
    return max(0, head.trl_peak(least) - head.own_peak(most))
