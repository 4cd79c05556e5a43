"""Arrays of any size: they take address space, and memory only in the pages that are touched.

So a row that begins after 2^31 elements of a tensor that nobody could allocate is addressed for real.
"""

import math
import mmap
from typing import Any

import numpy as np

_NORESERVE = 0x4000  # Linux: more may be mapped than the machine has memory
_DENSE = 1 << 26


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def zeros(count: int, dtype: Any) -> Any:
    """Returns a numpy array of zeros."""
    size = np.dtype(dtype).itemsize * count
    return np.zeros(count, dtype) if size <= _DENSE else np.frombuffer(_map(size), dtype)


def tensor(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a torch tensor of zeros, of at most 2^46 bytes."""
    import torch

    size = torch.empty((), dtype=dtype).element_size() * math.prod(shape)
    return torch.frombuffer(_map(size), dtype=dtype, count=math.prod(shape)).view(shape)
