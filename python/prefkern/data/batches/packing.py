"""Packing sequences into rows of one capacity."""

from typing import Any

import numpy as np

from prefkern import check
from prefkern.data.arrays.views import Array, core, describe, indices, is_arrow, whole
from prefkern.data.types import Packs

WHERE = "data.pack"


def pack(lengths: Any, capacity: int) -> Packs:
    """Best-fit decreasing: the longest item first, each into the fullest bin that still holds it.

    ``lengths [n]``: integers in a list, a numpy array, a torch CPU tensor or an Arrow array. ``Packs(order, offsets)``
    are int64 numpy arrays: bin b holds the items ``order[offsets[b] : offsets[b + 1]]``. The bins, their order and the
    order within them are those of TRL's ``packing_strategy="bfd"`` over the same items; ties go to the lower item.
    `Fewer Truncations Improve Language Modeling <https://arxiv.org/abs/2404.10830>`_.

    An item of length 0 holds no token and is in no bin, as in TRL. An item longer than ``capacity`` is refused with its
    row, where TRL would cut it: pass ``np.minimum(lengths, capacity)`` for that. So is a negative length.
    """
    capacity = whole(WHERE, "capacity", capacity, low=1)
    items = integers(WHERE, "lengths", lengths)
    order, offsets = np.empty(len(items), dtype=np.int64), np.empty(len(items) + 1, dtype=np.int64)
    placed, bins = core().pack(items, capacity, order, offsets)
    return Packs(order[:placed], offsets[: bins + 1].copy())


def integers(where: str, name: str, value: Any) -> Array:
    """Integers in a list, a numpy array, a torch CPU tensor or an Arrow array, as contiguous int64."""
    return indices(where, name, _from_arrow(where, name, value) if is_arrow(value) else value)


def _from_arrow(where: str, name: str, value: Any) -> Any:
    import pyarrow as pa  # an Arrow object was given, so that it is loaded

    if not isinstance(value, pa.Array | pa.ChunkedArray) or not pa.types.is_integer(value.type):
        check.fail_type(where, f"{name} must be an Arrow array of integers, got {describe(value)}")
    if value.null_count:
        check.fail(where, f"{name}[{value.is_null().index(True).as_py()}] is null")
    return value.to_numpy()
