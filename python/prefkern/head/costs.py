"""Predicts the products and the bytes of a call of the head from its shapes, dtypes and ``max_memory``.

The bytes are counted from the allocations of the forward and the backward, and held to them by a test: the peak beyond
inputs and returned gradients, within 5 %.
"""

from typing import NamedTuple

from prefkern.head.engine.blocks import (
    CAST_BYTES,
    SCRATCH_BYTES,
    cast_columns,
    chunk_rows,
    row_elements,
    slice_columns,
    tile_shape,
)
from prefkern.head.engine.memory import budget, limits
from prefkern.kernels.reference.rows import block_elements

_MERGED_BYTES = 100
"""Of the statistics of a row's slice, with what merging them in float64 takes."""


class Call(NamedTuple):
    """Shapes of one call, bytes per element, and what needs a gradient; ``N`` rows are scored."""

    N: int
    H: int
    V: int
    hidden_bytes: int
    weight_bytes: int
    compute_bytes: int
    grad_hidden: bool = True
    grad_weight: bool = True
    entropy_grad: bool = False
    accelerator: bool = True
    native: bool = True
    """Whether a CPU multiplies 16-bit operands (`engine.products.native`); else they are upcast in slices."""
    scratch: int = SCRATCH_BYTES
    """Bytes of a scratch tile, and of a cast slice of the weight; with less than the default nothing is kept."""

    @property
    def wide(self) -> int:
        return max(4, self.compute_bytes)

    @property
    def frozen(self) -> bool:
        return self.grad_hidden and not self.grad_weight

    @property
    def direct(self) -> bool:
        """Whether the gradient stands where the logits stood."""
        return not self.accelerator and self.compute_bytes == self.wide

    @property
    def row(self) -> int:
        return row_elements(self.V, self.compute_bytes, self.accelerator)

    def rows(self, N: int) -> int:
        return min(N, chunk_rows(self.V, self.wide, self.accelerator, self.scratch))

    @property
    def gradient_bytes(self) -> int:
        return self.H * (self.N * self.hidden_bytes * self.grad_hidden + self.V * self.weight_bytes * self.grad_weight)

    @property
    def block(self) -> int:
        """One temporary of a CPU's tile functions; kernels have none."""
        rows = self.rows(self.N)
        return 0 if self.accelerator else block_elements(rows, self.V) * self.wide


class Plan(NamedTuple):
    """Products and bytes. Those of the two passes are peaks beyond the inputs; the backward's count no gradients."""

    name: str
    kept_rows: int
    products: float
    held_bytes: int
    """What stays from forward to backward, statistics of the rows apart."""
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int

    @property
    def extra_bytes(self) -> int:
        """The peak beyond inputs and returned gradients."""
        return max(self.forward_bytes - self.gradient_bytes, self.backward_bytes)


def choose(call: Call, max_memory: int | None = None) -> Plan:
    """The plan of a call while nothing else is held."""
    N, H, V = call.N, call.H, call.V
    if not (call.grad_hidden or call.grad_weight):
        return Plan("score", 0, 1.0, 0, forward_bytes(call, 0, 0), 0, 0)
    bytes_ = budget(H, V, max_memory)
    most = limits(H, V, call.compute_bytes, bytes_, frozen=call.frozen, entropy_grad=call.entropy_grad)
    K, F = min(N, most.held), min(N, most.frozen)
    kept, extra = (F, call.entropy_grad * F) if call.frozen else (K, 0)
    products = 1.0 + call.grad_hidden + call.grad_weight + (N - kept + extra) / max(N, 1)
    name = f"{'frozen' if call.frozen else 'hold'}({kept})"
    passes = forward_bytes(call, K, F), backward_bytes(call, K, F)
    return Plan(name, kept, products, held_bytes(call, K, F), *passes, call.gradient_bytes)


def held_bytes(call: Call, K: int, F: int) -> int:
    return K * call.row * call.compute_bytes + F * call.H * call.compute_bytes * (1 + call.entropy_grad)


def casts(call: Call, columns: int, *, logits: bool) -> int:
    """A slice of the weight in the compute dtype, and upcast where a CPU makes logits of 16-bit operands."""
    cast = call.compute_bytes * (call.weight_bytes != call.compute_bytes)
    upcast = call.wide * (logits and not call.accelerator and call.compute_bytes != call.wide)
    if not cast and not upcast:
        return 0
    step = cast_columns(call.H, call.V, upcast or cast, call.accelerator, call.scratch)
    return min(step, columns) * call.H * (cast + upcast)


def _operand(call: Call, rows: int) -> int:
    """Hidden states in the compute dtype, and those of some rows upcast where a CPU makes logits of 16 bits."""
    cast = call.N * call.H * call.compute_bytes * (call.hidden_bytes != call.compute_bytes)
    return cast + rows * call.H * call.wide * (not call.accelerator and call.compute_bytes != call.wide)


def forward_bytes(call: Call, K: int, F: int) -> int:
    """The peak of a forward that keeps K rows of unscaled gradient or F rows of a frozen head's."""
    N, V, wide = call.N, call.V, call.wide
    rows = call.rows(N)
    tile = rows * row_elements(V, wide, call.accelerator) * wide
    if call.direct and K == N:
        tile = 0
    sliced, columns = tile_shape(N, V, wide, call.accelerator, call.scratch)
    if columns < V:
        merged = _MERGED_BYTES * sliced * -(-V // columns)
        tile = sliced * columns * wide
        return casts(call, columns, logits=True) + _operand(call, sliced) + tile + merged + 3 * wide * N
    weight = casts(call, V, logits=True)
    whole = call.accelerator and call.scratch >= SCRATCH_BYTES
    if whole and rows < N and call.weight_bytes != call.compute_bytes:
        weight = V * call.H * call.compute_bytes
    logits = weight + _operand(call, rows)
    fold = call.block * 2 * call.entropy_grad
    if F:  # u beside the tile, kept for the next chunk; a copy of the raw product, from which the entropy starts again
        unscaled = 0 if call.direct else call.rows(F) * call.row * call.compute_bytes
        raw = rows * V * wide * (call.entropy_grad and not call.accelerator)
        logits += unscaled * (rows < N or F < N)
        fold += unscaled + raw + product_scratch_bytes(call._replace(grad_weight=False), rows, V)
    return held_bytes(call, K, F) + max(logits, fold) + tile + 3 * wide * N


def backward_bytes(call: Call, K: int, F: int) -> int:
    """The peak of the backward, with what the forward has kept."""
    H, V, wide, narrow = call.H, call.V, call.wide, call.compute_bytes
    kept = held_bytes(call, K, F) + 3 * wide * call.N
    N = call.N - F
    scales = 5 * wide * call.N
    if N == 0:
        return kept + scales + CAST_BYTES
    rows = N * H * narrow * call.grad_weight
    if call.grad_hidden:
        rows += N * H * wide * (call.hidden_bytes != wide)
    columns, slices, temporaries = V, 0, 0
    if K < N or call.entropy_grad:
        element = narrow + (0 if call.direct else wide)
        columns = slice_columns(N, V, element, call.scratch)
        slices = columns * (N * narrow + (0 if call.direct else (N - K) * wide))
        if not call.accelerator:
            temporaries = block_elements(N, columns) * wide * call.entropy_grad * (1 + (K > 0))
    weight = casts(call, columns, logits=K < N)
    made = max(weight + _operand(call, (N - K) * (K < N)), temporaries, product_scratch_bytes(call, N, columns))
    return kept + scales + made + rows + slices


def product_scratch_bytes(call: Call, N: int, columns: int) -> int:
    """What the backward's products take on a CPU with 16-bit operands: a result of 16 bits of their own, or slices of
    both operands upcast, and a float32 result where the destination is narrower."""
    if call.accelerator or call.compute_bytes == call.wide:
        return 0
    H, narrow, wide = call.H, call.compute_bytes, call.wide
    rounded = cast_columns(H, columns, wide, False) * H * wide * (call.weight_bytes != narrow)  # of grad_weight
    if call.native:
        return max(N * H * narrow * call.grad_hidden, (rounded + rounded * narrow // wide) * call.grad_weight)
    deep = min(CAST_BYTES, (N + H) * columns * wide) * call.grad_hidden  # grad_hidden: slices of the vocabulary
    tall = (N * H * wide + min(CAST_BYTES, (N + H) * columns * wide)) * call.grad_weight
    return max(deep, tall + rounded)
