"""How much is kept from the forward to the backward pass, and in which blocks the head is computed.

Decided from shapes, dtypes and ``max_memory`` alone, never from free memory, so that runs repeat. The products of
``2 N H V`` floating-point operations each:

| plan      | when                                                  | products: trainable head | frozen head |
|-----------|-------------------------------------------------------|--------------------------|-------------|
| score     | nothing needs a gradient                              | 1                        | 1           |
| hold(K)   | K rows of unscaled gradient kept, N - K recomputed    | 3 + (N - K) / N          | 2 + (N - K) / N |
"""

from typing import NamedTuple

MIN_HELD_BYTES = 1 << 30
SCRATCH_BYTES = 128 << 20
ALIGNMENT = 256
"""Columns: slices of the vocabulary start at multiples of this, so that every slice of a 16-bit tile is aligned."""


class Plan(NamedTuple):
    """What one forward and backward of the head will do, for ``N`` scored rows."""

    name: str
    held_rows: int
    products: float
    held_bytes: int
    scratch_bytes: int


def max_held_rows(H: int, V: int, itemsize: int, max_memory: int | None) -> int:
    """K at most: the rows of ``itemsize`` bytes per entry that fit ``max_memory`` (default ``4 V H`` bytes, what a
    float32 accumulator of grad_weight would take, and at least 1 GiB). Independent of N: one graph for all lengths."""
    budget = max(4 * V * H, MIN_HELD_BYTES) if max_memory is None else max_memory
    return budget // max(V * itemsize, 1)


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a scratch tile of whole rows. At least 512: with fewer, an accelerator's product nears the time that it
    takes to read the weight once more for every tile."""
    return max(512, SCRATCH_BYTES // max(V * itemsize, 1))


def slice_columns(rows: int, V: int, itemsize: int) -> int:
    """Columns of a slice of the vocabulary, for scratch of ``itemsize`` bytes per entry over ``rows`` rows."""
    columns = SCRATCH_BYTES // max(rows * itemsize, 1)
    return min(V, max(ALIGNMENT, columns // ALIGNMENT * ALIGNMENT))


def explain(
    N: int, H: int, V: int, itemsize: int, *, max_memory: int | None = None, trainable: bool = True, score: bool = False
) -> Plan:
    """The plan for N scored rows: its products, and the bytes held and used as scratch on an accelerator."""
    tile = min(N, chunk_rows(V, 4)) * V * 4
    if score:
        return Plan("score", 0, 1.0, 0, tile)
    held = min(N, max_held_rows(H, V, itemsize, max_memory))
    products = (3.0 if trainable else 2.0) + ((N - held) / N if N else 0.0)
    if held < N:
        tile = max(tile, slice_columns(N, V, 4 + itemsize) * N * (4 + itemsize))
    return Plan(f"hold({held})", held, products, held * V * itemsize, tile)
