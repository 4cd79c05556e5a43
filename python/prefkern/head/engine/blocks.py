"""Sizes of blocks: in which pieces the head is computed, and how a tile stands in memory."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

SCRATCH_BYTES = 128 << 20
"""Bytes of a scratch tile, unless a caller allows less."""

CAST_BYTES = 8 << 20
"""Bytes of one cast slice of the weight on a CPU: it stays in the cache, and few tokens do not pay for more."""

SLICE_ROWS = 4096
"""Rows at most, and columns at least, of a tile that is a slice of the vocabulary."""

ALIGNMENT = 256
"""Columns: slices of the vocabulary start at multiples of this, so that every slice of a 16-bit tile is aligned."""


def chunk_rows(V: int, itemsize: int, accelerator: bool = True, scratch: int = SCRATCH_BYTES) -> int:
    """Returns the rows of a scratch tile of whole rows. With fewer than 512 an accelerator's product nears the time
    that it takes to read the weight once more for every tile; a CPU is content with 128."""
    return max(512 if accelerator else 128, scratch // max(V * itemsize, 1))


def row_chunks(N: int, kept: int, rows: int) -> Iterator[slice]:
    """Yields chunks of at most so many rows, the kept rows first: a chunk is either wholly kept or not at all."""
    for start, stop in pairwise([*range(0, kept, rows), *range(kept, N, rows), N]):
        yield slice(start, stop)


def tile_shape(N: int, V: int, itemsize: int, accelerator: bool, scratch: int) -> tuple[int, int]:
    """Returns the rows and columns of a scratch tile from which nothing is kept: whole rows, unless less than the usual
    scratch is allowed and they would exceed it. Then slices of the vocabulary, wide enough that merging them is a small
    matter."""
    rows = max(1, min(N, chunk_rows(V, itemsize, accelerator, scratch)))
    if scratch >= SCRATCH_BYTES or rows * V * itemsize <= scratch:
        return rows, V
    rows = max(1, min(N, SLICE_ROWS, scratch // (min(V, SLICE_ROWS) * itemsize)))
    return rows, slice_columns(rows, V, itemsize, scratch)


def slice_columns(rows: int, V: int, itemsize: int, scratch: int = SCRATCH_BYTES) -> int:
    """Returns the columns of a slice of the vocabulary, for scratch of ``itemsize`` bytes per entry over ``rows``
    rows."""
    return _aligned(scratch // max(rows * itemsize, 1), V)


def cast_columns(H: int, V: int, itemsize: int, accelerator: bool, scratch: int = SCRATCH_BYTES) -> int:
    """Returns the columns of the vocabulary whose rows of the weight are cast at once."""
    return _aligned((scratch if accelerator else min(scratch, CAST_BYTES)) // max(H * itemsize, 1), V)


def _aligned(columns: int, V: int) -> int:
    return min(V, max(ALIGNMENT, columns // ALIGNMENT * ALIGNMENT))


def row_elements(V: int, itemsize: int, accelerator: bool) -> int:
    """Returns the elements from one row of a tile to the next: on an accelerator rows begin at multiples of 16 bytes,
    which wide loads and fast products need."""
    unit = 16 // itemsize if accelerator else 1
    return (V + unit - 1) // unit * unit


def empty_tile(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an unwritten ``[rows, V]`` whose rows begin where wide loads and products want them."""
    return narrowed(torch.empty(rows * _stride(V, dtype, device), dtype=dtype, device=device), rows, V)


def narrowed(tile: Tensor, rows: int, V: int) -> Tensor:
    """Returns a smaller tile in the memory of one of `empty_tile`, its rows as close together as those of a new one."""
    stride = _stride(V, tile.dtype, tile.device)
    return tile.as_strided((rows, V), (stride, 1))


def _stride(V: int, dtype: torch.dtype, device: torch.device) -> int:
    return row_elements(V, dtype.itemsize, device.type != "cpu")
