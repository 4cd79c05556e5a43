"""How much is kept from the forward to the backward pass, in which blocks the head is computed, and what that takes.

Decided from shapes, dtypes and ``max_memory`` alone, never from free memory, so that runs repeat. The products of
``2 N H V`` floating-point operations each:

| plan      | when                                                       | trainable head  | frozen head     |
|-----------|------------------------------------------------------------|-----------------|-----------------|
| score     | nothing needs a gradient                                   | 1               | 1               |
| frozen(F) | only the hidden states do: F rows of ``W[y] - E_p[W]`` kept |                 | 2 + (N - F) / N |
| hold(K)   | K rows of unscaled gradient kept, N - K recomputed         | 3 + (N - K) / N | 2 + (N - K) / N |

A gradient of the entropy costs the frozen plan one more product and keeps a second row; it costs hold none, but with a
softcap it is recomputed as with K = 0.

The bytes of `choose` are counted from the allocations of `prefkern.head` and `prefkern.head_bwd`, and held to them by a
test: the peak beyond inputs and returned gradients, within 5 %. `explain` has every plan and form of the head.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prefkern.plan_lines import Line

MIN_HELD_BYTES = 1 << 30
SCRATCH_BYTES = 128 << 20
CAST_BYTES = 8 << 20
"""Of a cast slice of the weight on a CPU: it stays in the cache, and few tokens do not pay for more."""
SLICED = 4096
"""At most so many rows, and at least so many columns, of a tile that is a slice of the vocabulary."""
ALIGNMENT = 256
"""Columns: slices of the vocabulary start at multiples of this, so that every slice of a 16-bit tile is aligned."""


class Limits(NamedTuple):
    """The rows that are kept at most: of unscaled gradient ``[K, V]``, and of a frozen head's gradient ``[F, H]``."""

    held: int
    frozen: int


def budget(H: int, V: int, max_memory: int | None) -> int:
    """Bytes that may stay held: ``max_memory``, or the ``4 V H`` that a float32 accumulator of grad_weight would take,
    and at least 1 GiB."""
    return max(4 * V * H, MIN_HELD_BYTES) if max_memory is None else max_memory


def limits(H: int, V: int, itemsize: int, bytes_: int, *, frozen: bool = False, entropy_grad: bool = False) -> Limits:
    """The rows of ``itemsize`` bytes per entry that fit into so many bytes. Independent of N: one graph for all
    lengths."""
    if frozen:
        return Limits(0, bytes_ // (H * itemsize * (1 + entropy_grad)))
    return Limits(bytes_ // (V * itemsize), 0)


def chunk_rows(V: int, itemsize: int, accelerator: bool = True, scratch: int = SCRATCH_BYTES) -> int:
    """Rows of a scratch tile of whole rows. With fewer than 512 an accelerator's product nears the time that it takes
    to read the weight once more for every tile; a CPU is content with 128."""
    return max(512 if accelerator else 128, scratch // max(V * itemsize, 1))


def tile_shape(N: int, V: int, itemsize: int, accelerator: bool, scratch: int) -> tuple[int, int]:
    """Rows and columns of a scratch tile from which nothing is kept: whole rows, unless less than the usual scratch is
    allowed and they would exceed it. Then slices of the vocabulary, wide enough that merging them is a small matter.
    """
    rows = max(1, min(N, chunk_rows(V, itemsize, accelerator, scratch)))
    if scratch >= SCRATCH_BYTES or rows * V * itemsize <= scratch:
        return rows, V
    rows = max(1, min(N, SLICED, scratch // (min(V, SLICED) * itemsize)))
    return rows, slice_columns(rows, V, itemsize, scratch)


def slice_columns(rows: int, V: int, itemsize: int, scratch: int = SCRATCH_BYTES) -> int:
    """Columns of a slice of the vocabulary, for scratch of ``itemsize`` bytes per entry over ``rows`` rows."""
    return _aligned(scratch // max(rows * itemsize, 1), V)


def cast_columns(H: int, V: int, itemsize: int, accelerator: bool, scratch: int = SCRATCH_BYTES) -> int:
    """Columns of the vocabulary whose rows of the weight are cast at once."""
    return _aligned((scratch if accelerator else min(scratch, CAST_BYTES)) // max(H * itemsize, 1), V)


def block_elements(rows: int, V: int) -> int:
    """Elements that the tile functions of a CPU take at a time, in whole rows: a sixteenth of the tile, so that
    temporaries stay small beside it, between 2 and 8 MB of float32, which the caches hold. Not fewer: every pass over a
    block waits for all threads, which costs much on busy cores."""
    step = max(1, min(max(rows * V // 16, 1 << 19), 1 << 21) // max(V, 1))
    return min(step, rows) * V


_MERGED_BYTES = 100
"""Of the statistics of a row's slice, with what merging them in float64 takes."""


def _aligned(columns: int, V: int) -> int:
    return min(V, max(ALIGNMENT, columns // ALIGNMENT * ALIGNMENT))


def row_elements(V: int, itemsize: int, accelerator: bool) -> int:
    """Elements from one row of a tile to the next: on an accelerator rows begin at multiples of 16 bytes, which wide
    loads and fast products need."""
    unit = 16 // itemsize if accelerator else 1
    return (V + unit - 1) // unit * unit


class Head(NamedTuple):
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
    """Whether a CPU multiplies 16-bit operands (`prefkern.products.native`); else they are upcast in slices."""
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


def choose(head: Head, max_memory: int | None = None) -> Plan:
    """The plan of a call while nothing else is held."""
    N, H, V = head.N, head.H, head.V
    if not (head.grad_hidden or head.grad_weight):
        return Plan("score", 0, 1.0, 0, forward_bytes(head, 0, 0), 0, 0)
    bytes_ = budget(H, V, max_memory)
    most = limits(H, V, head.compute_bytes, bytes_, frozen=head.frozen, entropy_grad=head.entropy_grad)
    K, F = min(N, most.held), min(N, most.frozen)
    kept, extra = (F, head.entropy_grad * F) if head.frozen else (K, 0)
    products = 1.0 + head.grad_hidden + head.grad_weight + (N - kept + extra) / max(N, 1)
    name = f"{'frozen' if head.frozen else 'hold'}({kept})"
    passes = forward_bytes(head, K, F), backward_bytes(head, K, F)
    return Plan(name, kept, products, held_bytes(head, K, F), *passes, head.gradient_bytes)


def held_bytes(head: Head, K: int, F: int) -> int:
    return K * head.row * head.compute_bytes + F * head.H * head.compute_bytes * (1 + head.entropy_grad)


def casts(head: Head, columns: int, *, logits: bool) -> int:
    """A slice of the weight in the compute dtype, and upcast where a CPU makes logits of 16-bit operands."""
    cast = head.compute_bytes * (head.weight_bytes != head.compute_bytes)
    upcast = head.wide * (logits and not head.accelerator and head.compute_bytes != head.wide)
    if not cast and not upcast:
        return 0
    step = cast_columns(head.H, head.V, upcast or cast, head.accelerator, head.scratch)
    return min(step, columns) * head.H * (cast + upcast)


def _operand(head: Head, rows: int) -> int:
    """Hidden states in the compute dtype, and those of some rows upcast where a CPU makes logits of 16 bits."""
    cast = head.N * head.H * head.compute_bytes * (head.hidden_bytes != head.compute_bytes)
    return cast + rows * head.H * head.wide * (not head.accelerator and head.compute_bytes != head.wide)


def forward_bytes(head: Head, K: int, F: int) -> int:
    """The peak of a forward that keeps K rows of unscaled gradient or F rows of a frozen head's."""
    N, V, wide = head.N, head.V, head.wide
    rows = head.rows(N)
    tile = rows * row_elements(V, wide, head.accelerator) * wide
    if head.direct and K == N:
        tile = 0
    sliced, columns = tile_shape(N, V, wide, head.accelerator, head.scratch)
    if columns < V:
        merged = _MERGED_BYTES * sliced * -(-V // columns)
        tile = sliced * columns * wide
        return casts(head, columns, logits=True) + _operand(head, sliced) + tile + merged + 3 * wide * N
    weight = casts(head, V, logits=True)
    whole = head.accelerator and head.scratch >= SCRATCH_BYTES
    if whole and rows < N and head.weight_bytes != head.compute_bytes:
        weight = V * head.H * head.compute_bytes
    logits = weight + _operand(head, rows)
    fold = head.block * 2 * head.entropy_grad
    if F:  # u beside the tile, kept for the next chunk; a copy of the raw product, from which the entropy starts again
        unscaled = 0 if head.direct else head.rows(F) * head.row * head.compute_bytes
        raw = rows * V * wide * (head.entropy_grad and not head.accelerator)
        logits += unscaled * (rows < N or F < N)
        fold += unscaled + raw + products_beside(head._replace(grad_weight=False), rows, V)
    return held_bytes(head, K, F) + max(logits, fold) + tile + 3 * wide * N


def backward_bytes(head: Head, K: int, F: int) -> int:
    """The peak of the backward, with what the forward has kept."""
    H, V, wide, narrow = head.H, head.V, head.wide, head.compute_bytes
    kept = held_bytes(head, K, F) + 3 * wide * head.N
    N = head.N - F
    scales = 5 * wide * head.N
    if N == 0:
        return kept + scales + CAST_BYTES
    rows = N * H * narrow * head.grad_weight
    if head.grad_hidden:
        rows += N * H * wide * (head.hidden_bytes != wide)
    columns, slices, temporaries = V, 0, 0
    if K < N or head.entropy_grad:
        element = narrow + (0 if head.direct else wide)
        columns = slice_columns(N, V, element, head.scratch)
        slices = columns * (N * narrow + (0 if head.direct else (N - K) * wide))
        if not head.accelerator:
            temporaries = block_elements(N, columns) * wide * head.entropy_grad * (1 + (K > 0))
    weight = casts(head, columns, logits=K < N)
    made = max(weight + _operand(head, (N - K) * (K < N)), temporaries, products_beside(head, N, columns))
    return kept + scales + made + rows + slices


def products_beside(head: Head, N: int, columns: int) -> int:
    """What the backward's products take on a CPU with 16-bit operands: a result of 16 bits of their own, or slices of
    both operands upcast, and a float32 result where the destination is narrower."""
    if head.accelerator or head.compute_bytes == head.wide:
        return 0
    H, narrow, wide = head.H, head.compute_bytes, head.wide
    rounded = cast_columns(H, columns, wide, False) * H * wide * (head.weight_bytes != narrow)  # of grad_weight
    if head.native:
        return max(N * H * narrow * head.grad_hidden, (rounded + rounded * narrow // wide) * head.grad_weight)
    deep = min(CAST_BYTES, (N + H) * columns * wide) * head.grad_hidden  # grad_hidden: slices of the vocabulary
    tall = (N * H * wide + min(CAST_BYTES, (N + H) * columns * wide)) * head.grad_weight
    return max(deep, tall + rounded)


def explain(
    tokens: int,
    hidden: int,
    vocab: int,
    *,
    itemsize: int = 2,
    weight_itemsize: int | None = None,
    max_memory: int | None = None,
    accelerator: bool = True,
    flops: float = 790e12,
    bandwidth: float = 4.3e12,
) -> "list[Line]":
    """Every plan for so many scored tokens: products of ``2 N H V`` operations, bytes, and a floor of the time.

    Of ``linear_token_logprobs`` and the losses on it, of ``linear_cross_entropy``, and of ``linear_kl_divergence`` with
    a reference of the same shapes.

    Args:
        tokens, hidden, vocab: N, H and V.
        itemsize, weight_itemsize: bytes per element of the operands, and of the weight if it is another.
        max_memory: as in ``linear_token_logprobs``.
        accelerator: False for a CPU, which works in other blocks.
        flops, bandwidth: of the machine, per second; by default an H200's as measured.
    """
    from prefkern import plan_lines  # which counts with this module

    weight = itemsize if weight_itemsize is None else weight_itemsize
    base = Head(tokens, hidden, vocab, itemsize, weight, itemsize, accelerator=accelerator)
    return plan_lines.lines(base, max_memory, flops, bandwidth)
